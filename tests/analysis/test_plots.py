import gc
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from pgt_hf.__main__ import main
from pgt_hf.analysis import (
    CURVE_ALPHAS,
    History,
    plot_against_alpha,
    plot_filter_norms,
    plot_gradients,
    plot_logits,
    plot_normalization,
    plot_probabilities,
    plot_reliability,
    plot_training_curve,
    reliability,
)
from pgt_hf.analysis.figures import freed
from pgt_hf.runs import draw_runs

pytest.importorskip("matplotlib")

HISTORY = [
    {"epoch": 0.5, "loss": 2.0, "learning_rate": 0.1},
    {"epoch": 1.0, "eval_loss": 1.8, "eval_top1": 0.4, "eval_top5": 0.8},
    {"epoch": 1.0, "loss": 1.5, "learning_rate": 0.05},
    {"epoch": 1.0, "train_runtime": 3.0},
]


LOSS, EVALUATION_LOSS, TOP1, TOP5 = "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd"  # matplotlib's C0, C1, C2, C4


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def shows(picture: np.ndarray, colour: str) -> bool:
    """Whether a marker or a line of this colour is there, not only its entry in a legend."""
    return (np.abs(picture - np.array(ImageColor.getrgb(colour))).sum(-1) < 30).sum() > 40


def test_training_curve_is_a_picture_of_what_the_history_has(tmp_path):
    plot_training_curve(HISTORY, tmp_path / "all.png", "a title")
    plot_training_curve(HISTORY[1:2], tmp_path / "accuracy.png")
    everything, part = (pixels(tmp_path / name) for name in ("all.png", "accuracy.png"))
    assert len(everything) > len(part)  # three panels, or two
    for colour, in_both in ((LOSS, False), (EVALUATION_LOSS, True), (TOP1, True), (TOP5, True)):
        assert (shows(everything, colour), shows(part, colour)) == (True, in_both), colour


@pytest.mark.slow
def test_curves_that_are_drawn_over_and_over_in_a_training_leave_no_figure_in_memory(tmp_path):
    from matplotlib.figure import Figure

    # With a logarithmic axis and several panels, one collection does not find all.
    history = [{"epoch": n / 10, "loss": 2 / (1 + n), "eval_loss": 1 / (1 + n), "eval_top1": 0.3} for n in range(50)]
    figures = []
    gc.disable()
    try:
        for context in (freed, nullcontext):
            gc.collect()
            for _ in range(2):
                with context():
                    plot_training_curve(history, tmp_path / "curve.png")
            figures.append(sum(type(item) is Figure for item in gc.get_objects()))
    finally:
        gc.enable()
    assert figures == [0, 2]


def test_history_without_anything_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_training_curve(HISTORY[3:], tmp_path / "none.png")


def recorded(folder, alpha: float, layers: int = 5) -> None:
    """The files that a run of 12 snapshots leaves, one layer's filters dead at the end."""
    history, generator = History(), np.random.default_rng(0)
    for step in range(0, 120, 10):
        values = {"logit_norm": 1.0 + step, "logit_variance": 2.0, "feature_norm": 3.0, "alpha": alpha}
        values |= {"gradient_cosine": 1 - step / 200, "target_histogram": generator.integers(9, size=(2, 20))}
        values |= {"class_histogram": generator.integers(9, size=(2, 40))}
        values["curve_power_sums"] = np.linspace(2.3, 0.1, len(CURVE_ALPHAS) + 1)
        for layer in range(layers):
            values[f"filter/layer{layer}.conv"] = generator.random(100) * (layer > 0 or step < 60)
            values[f"gradient/layer{layer}.conv"] = generator.random() * (step > 0)
            for kind in ("weight_norm", "effective_lr", "angle", "norm_scale", "norm_bias"):
                values[f"{kind}/layer{layer}.conv"] = generator.random() if layer or step < 60 else np.inf
        history.add(step, values)
    folder.mkdir()
    history.save(folder / "diagnostics.npz")
    state = {"log_history": [*HISTORY, {"epoch": 1.0, "loss": 1 / alpha, "powergrad_alpha": alpha}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))


@pytest.mark.slow
def test_one_command_draws_all_that_the_runs_files_hold(tmp_path, capsys):
    for alpha in (1.0, 0.1):
        recorded(tmp_path / f"run-{alpha:g}", alpha)
    (tmp_path / "run-0.1" / "diagnostics.npz").unlink()  # its history alone has its alpha, too
    folders = [str(tmp_path / name) for name in ("run-1", "run-0.1")]
    main(["plot", *folders])
    pictures = {"logits", "filters", "gradients", "normalization", "probabilities", "training_curve"}
    first, second = ({path.stem for path in (tmp_path / name / "plots").iterdir()} for name in ("run-1", "run-0.1"))
    assert (first, second) == (pictures | {"against_alpha"}, {"training_curve"})
    printed = capsys.readouterr().out.split()
    assert len(printed) == 8
    assert all(pixels(Path(path)).std() > 5 for path in printed)


def test_run_with_a_checkpoint_alone_gives_its_training_curve(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    assert [path.name for path in draw_runs([tmp_path])] == ["training_curve.png"]


def test_folder_without_a_run_is_an_error_without_a_traceback(tmp_path):
    with pytest.raises(SystemExit, match="error: .* has no record of a run"):
        main(["plot", str(tmp_path)])


def test_reliability_diagrams_with_empty_bins_and_left_over_panels_are_drawn(tmp_path):
    diagrams = {f"{bins} bins": reliability([0.3, 0.9, 0.95], [0, 1, 1], bins) for bins in (1, 5, 15, 30)}
    plot_reliability(diagrams, tmp_path / "r.png", "a title")
    picture = pixels(tmp_path / "r.png")
    assert shows(picture, LOSS) and picture[:, :: picture.shape[1] - 1].min() == 255


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: plot_logits({"step": [0]}, path), "data has nothing to draw"),
        (lambda path: plot_filter_norms({"step": [0]}, path), "no filter norms"),
        (lambda path: plot_gradients({"step": [0]}, path), "no gradient norms"),
        (lambda path: plot_normalization({"step": [0]}, path), "no normalised layers"),
        (lambda path: plot_probabilities({"step": [0]}, path), "no logits were seen"),
        (lambda path: plot_reliability({}, path), "at least one diagram, got none"),
        (lambda path: plot_against_alpha({"a": {"alpha": 1, "loss": 1}}, path), "at least two"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_that_says_why(draw, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
