import pytest

from pgt_hf.plots import plot_training_curve

HISTORY = [
    {"epoch": 0.5, "loss": 2.0, "learning_rate": 0.1},
    {"epoch": 1.0, "eval_loss": 1.8, "eval_top1": 0.4, "eval_top5": 0.8},
    {"epoch": 1.0, "loss": 1.5, "learning_rate": 0.05},
    {"epoch": 1.0, "train_runtime": 3.0},
]


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
