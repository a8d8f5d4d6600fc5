import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch.utils.data import Dataset
from transformers import EvalPrediction, ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from pgt_hf import fold_powergrad
from pgt_hf.analysis import ClassificationMetrics, probability_scores, reliability, score_logits, top_k_accuracy

CLASSES = 12


@pytest.fixture
def scores() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, CLASSES, generator=generator)
    # Labels that the logits know something about, so that no figure is trivial.
    return logits, torch.multinomial((0.5 * logits).softmax(-1), 1, generator=generator)[:, 0]


def reference(logits: torch.Tensor, labels: torch.Tensor, scale: float = 1.0, bins: int = 15) -> dict[str, float]:
    """Guo et al.'s and Brier's formulas in float64, as plainly as can be."""
    z, y = logits.double().numpy() * scale, labels.numpy()
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == y
    ece = 0.0
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    one_hot = np.eye(p.shape[1])[y]
    return {
        "nll": log_loss(y, p, labels=range(p.shape[1])),
        "ece": ece,
        "brier": ((p - one_hot) ** 2).sum(axis=1).mean(),
    }


def evaluate_in_batches(metrics: ClassificationMetrics, logits, labels, size: int) -> dict[str, float]:
    kept = [metrics.preprocess(logits[i : i + size], labels[i : i + size]) for i in range(0, len(labels), size)]
    return metrics(EvalPrediction(tuple(torch.cat(parts).numpy() for parts in zip(*kept)), labels.numpy()))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_accuracy_counts_what_numpy_counts(k, scores):
    logits, labels = scores
    better = (logits.numpy() > logits.numpy()[np.arange(200), labels][:, None]).sum(axis=1)
    ranked = logits.topk(5).indices
    result = top_k_accuracy(ranked, labels, k=(k,))
    assert result == {f"top{k}": pytest.approx((better < k).mean())}


@pytest.mark.parametrize("bins", [1, 7, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_raw_and_folded_scores_are_those_of_the_formulas(scores, bins, dtype):
    logits, labels = scores
    result = evaluate_in_batches(ClassificationMetrics(alpha=0.25, bins=bins), logits.to(dtype), labels, 200)
    folded = {f"{name}_folded": value for name, value in reference(logits, labels, 0.25, bins).items()}
    expected = reference(logits, labels, bins=bins) | folded
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_batches_score_like_all_images_at_once(scores):
    metrics = ClassificationMetrics(alpha=0.5)
    assert evaluate_in_batches(metrics, *scores, 64) == pytest.approx(evaluate_in_batches(metrics, *scores, 200))


@pytest.mark.parametrize("alpha", [None, 1, 1.0])
def test_without_an_alpha_to_fold_there_are_no_folded_scores(alpha, scores):
    result = evaluate_in_batches(ClassificationMetrics(alpha), *scores, 50)
    assert set(result) == {"top1", "top5", "nll", "ece", "brier"}


def test_folded_scores_are_those_of_the_folded_model():
    model = torch.nn.Linear(8, 5)
    inputs, labels = 4 * torch.randn(300, 8), torch.randint(5, (300,))
    before = evaluate_in_batches(ClassificationMetrics(alpha=0.25), model(inputs).detach(), labels, 300)
    after = evaluate_in_batches(
        ClassificationMetrics(), fold_powergrad(model, alpha=0.25)(inputs).detach(), labels, 300
    )
    assert before["top1"] == after["top1"]
    for name in ("nll", "ece", "brier"):
        assert before[f"{name}_folded"] == pytest.approx(after[name], rel=1e-5)


def test_calibrated_probabilities_have_almost_no_calibration_error_and_sharpened_ones_do():
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(100_000, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    assert evaluate_in_batches(ClassificationMetrics(), logits, labels, 20_000)["ece"] < 0.005
    assert evaluate_in_batches(ClassificationMetrics(), 4 * logits, labels, 20_000)["ece"] > 0.1


def test_bins_are_open_below_and_closed_above():
    bins = reliability([0.2, 0.2 + 1e-9, 1.0, 0.0], [1, 0, 1, 0], bins=5)
    assert bins.count.tolist() == [2, 1, 0, 0, 1]
    assert bins.accuracy[0] == 0.5 and np.isnan(bins.accuracy[2])


def test_images_without_a_label_count_nowhere_and_are_reported(scores):
    logits, labels = scores
    metrics = ClassificationMetrics(alpha=0.25)
    expected = evaluate_in_batches(metrics, logits[:150], labels[:150], 150)
    labels = labels.clone()
    labels[150:] = -100
    assert evaluate_in_batches(metrics, logits, labels, 64) == pytest.approx(expected | {"skipped": 50})


def test_few_numbers_per_image_are_kept_and_the_best_class_comes_first(scores):
    logits, labels = scores
    best, raw = ClassificationMetrics().preprocess((logits, "hidden states"), labels)
    assert (best.shape, raw.shape) == ((200, 5), (200, 3))
    assert torch.equal(best[:, 0], logits.argmax(dim=1))


def test_half_precision_logits_are_scored_in_single_precision(scores):
    logits, labels = scores
    rounded = logits.bfloat16()
    assert torch.equal(score_logits(rounded, labels), score_logits(rounded.float(), labels))


def test_confident_logits_give_finite_scores():
    logits = torch.tensor([[0.0, 1e4], [1e4, 0.0]])
    result = evaluate_in_batches(ClassificationMetrics(), logits, torch.tensor([1, 1]), 2)
    assert (result["nll"], result["ece"], result["brier"]) == (5000, 0.5, 1)


@pytest.mark.parametrize("classes", [3, 5])
def test_with_no_more_classes_than_five_there_is_no_second_accuracy(classes):
    result = evaluate_in_batches(ClassificationMetrics(), torch.eye(classes)[:3], torch.tensor([0, 1, 1]), 3)
    assert result["top1"] == pytest.approx(2 / 3)
    assert [key for key in result if "top" in key] == ["top1"]


def test_loss_of_nothing_but_certainty_has_no_sign():
    result = evaluate_in_batches(ClassificationMetrics(), 1e4 * torch.eye(3), torch.arange(3), 3)
    assert str(result["nll"]) == "0.0"


MINE = """
import datasets
import evaluate

class Mine(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, first=0):
        return {"%s": sum(p == r for p, r in zip(predictions, references)) + first}
"""


def test_metrics_of_the_evaluate_package_are_combined_by_name(scores, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    names = []
    for name in ("right", "also_right"):
        (tmp_path / name).mkdir()
        names.append(str(tmp_path / name / f"{name}.py"))
        (tmp_path / name / f"{name}.py").write_text(MINE % name)
    metrics = ClassificationMetrics(also=names, first=1000)
    result = evaluate_in_batches(metrics, *scores, 64)
    right = (scores[0].argmax(1) == scores[1]).sum().item()
    assert (result["right"], result["also_right"]) == (1000 + right, 1000 + right)
    assert result["top1"] == pytest.approx(right / 200)


class Images(Dataset):
    """40 images of noise, two of them without a label."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        pixels = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixels, "labels": -100 if index in (3, 17) else index % 6}


def test_trainer_reports_what_a_loop_by_hand_counts(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=6)
    model, metrics = ResNetForImageClassification(config), ClassificationMetrics(alpha=0.5)
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path, per_device_eval_batch_size=16, report_to="none"),
        eval_dataset=Images(),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.preprocess,
    )
    results = trainer.evaluate()
    examples = [example for index in range(40) if (example := Images()[index])["labels"] >= 0]
    with torch.no_grad():
        logits = model.eval()(torch.stack([example["pixel_values"] for example in examples])).logits
    labels = torch.tensor([example["labels"] for example in examples])
    expected = {f"eval_{name}": value for name, value in reference(logits, labels).items()}
    expected["eval_top1"] = (logits.argmax(1) == labels).double().mean().item()
    assert results["eval_skipped"] == 2
    assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert results["eval_loss"] == pytest.approx(results["eval_nll"], rel=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k_accuracy([[0, 1]], [0], k=(0, 5)), "k must be a whole number of at least 1, got 0"),
        (lambda: ClassificationMetrics(top_k=0), "top_k must be a whole number of at least 1, got 0"),
        (lambda: ClassificationMetrics(bins=0), "bins must be a whole number of at least 1, got 0"),
        (lambda: ClassificationMetrics(alpha=-1), "alpha must lie in"),
        (lambda: reliability([0.5], [1], bins=0), "bins must be a whole number of at least 1, got 0"),
        (lambda: reliability([0.5, 0.6], [1]), r"shape \(N,\), got \(2,\) and \(1,\)"),
        (lambda: score_logits(torch.zeros(2, 3), torch.tensor([0, 3])), r"labels must lie in \[0, 3\) .* got 0 to 3"),
        (lambda: score_logits(torch.zeros(2, 3), torch.tensor([0])), r"got \(2, 3\) and \(1,\)"),
        (lambda: probability_scores(np.zeros((1, 3)), [0], bins=0), "bins must be"),
    ],
)
def test_what_cannot_be_scored_is_an_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_scores_of_a_diverged_model_are_nan():
    assert all(np.isnan(value) for value in probability_scores([[np.nan] * 3], [0]).values())
