import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from pgt_hf.metrics import TopKAccuracy, compute_metrics, keep_top_k
from pgt_hf.plots import plot_training_curve

HISTORY = [
    {"epoch": 0.5, "loss": 2.0, "learning_rate": 0.1},
    {"epoch": 1.0, "eval_loss": 1.8, "eval_top1": 0.4, "eval_top5": 0.8},
    {"epoch": 1.0, "loss": 1.5, "learning_rate": 0.05},
    {"epoch": 1.0, "train_runtime": 3.0},
]


@pytest.fixture
def scores() -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(200, 12, generator=generator), torch.randint(12, (200,), generator=generator).numpy()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_accuracy_counts_what_numpy_counts(k, scores):
    logits, labels = scores
    better = (logits.numpy() > logits.numpy()[np.arange(200), labels][:, None]).sum(axis=1)
    result = TopKAccuracy().compute(predictions=keep_top_k(logits).numpy(), references=labels, k=(k,))
    assert result == {f"top{k}": pytest.approx((better < k).mean())}


def test_batches_added_one_by_one_count_like_all_at_once(scores):
    logits, labels = scores
    kept = keep_top_k(logits).numpy()
    metric = TopKAccuracy()
    for start in range(0, 200, 64):
        metric.add_batch(predictions=kept[start : start + 64], references=labels[start : start + 64])
    assert metric.compute() == TopKAccuracy().compute(predictions=kept, references=labels)


def test_only_five_numbers_per_image_are_kept_and_the_best_comes_first(scores):
    kept = keep_top_k((scores[0], "hidden states"))
    assert kept.shape == (200, 5)
    assert torch.equal(kept[:, 0], scores[0].argmax(dim=1))


def test_with_fewer_classes_than_five_the_figure_is_named_after_their_number():
    prediction = EvalPrediction(predictions=np.array([[1, 2, 0], [0, 1, 2]]), label_ids=np.array([2, 0]))
    assert compute_metrics(prediction) == {"top1": 0.5, "top3": 1.0}


def test_k_below_one_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"k must be at least 1, got \(0, 5\)"):
        TopKAccuracy().compute(predictions=[[0, 1]], references=[0], k=(0, 5))


def test_training_curve_is_a_picture_of_what_the_history_has(tmp_path):
    pytest.importorskip("matplotlib")
    plot_training_curve(HISTORY, tmp_path / "all.png", "a title")
    plot_training_curve(HISTORY[1:2], tmp_path / "accuracy.png")
    everything, part = (tmp_path / name for name in ("all.png", "accuracy.png"))
    assert everything.read_bytes().startswith(b"\x89PNG")
    assert everything.stat().st_size > part.stat().st_size > 0


def test_history_without_anything_to_draw_is_an_error(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_training_curve(HISTORY[3:], tmp_path / "none.png")
