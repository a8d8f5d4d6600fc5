"""Pictures of a training run, as files.

Each function writes ``path``, in the format of its suffix, with ``title`` above the picture. It raises ImportError
without matplotlib, and ValueError if there is nothing to draw.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..limits import checked
from .diagnostics import CURVE_ALPHAS, ZERO_NORM, lemma_threshold
from .figures import Target, finish, new_figure, save, shorten


@checked
def plot_training_curve(history: Iterable[Mapping[str, Any]], path: Target, title: str | None = None) -> None:
    """Draws losses, accuracies and learning rate of ``trainer.state.log_history`` over the epochs.

    Example:
        >>> plot_training_curve(trainer.state.log_history, "training_curve.png")
    """
    entries = list(history)
    panels = [panel for panel in _PANELS if any(_series(entries, key)[0] for key in panel[1])]
    if not panels:
        raise ValueError("history has nothing to draw: no entry holds an epoch and a loss, accuracy or learning rate")

    figure, grid = new_figure(len(panels), 1, (4.8, 0.6 + 1.8 * len(panels)), sharex=True)
    all_axes = grid[:, 0]
    for axes, (label, curves, scale) in zip(all_axes, panels, strict=True):
        for key, (name, style) in curves.items():
            epochs, values = _series(entries, key)
            if epochs:
                marker = "o" if len(epochs) <= _FEW else ""
                axes.plot(epochs, [scale * v for v in values], style + marker, markersize=3, linewidth=1.4, label=name)
        values = [value for key in curves for value in _series(entries, key)[1]]
        if label == "loss" and 0 < 20 * min(values) < max(values):  # one peak would flatten all that comes after it
            axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if len(curves) > 1:  # above the panel: inside, it may lie on a curve
            axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.97), borderpad=0)
    all_axes[-1].set_xlabel("epoch")
    figure.align_ylabels()
    save(figure, path, title)


@checked
def plot_logits(data: Mapping[str, Any], path: Target, title: str | None = None) -> None:
    """Draws logit statistics, pooled-feature norm and gradient direction over the steps of a run.

    Example:
        >>> plot_logits(History.read("runs/digits/diagnostics.npz"), "logits.png")
    """
    panels = [(key, label) for key, label in _STATISTICS.items() if key in data]
    if not panels:
        raise ValueError(f"data has nothing to draw: none of {', '.join(_STATISTICS)}")
    rows = math.ceil(len(panels) / 3)
    figure, grid = new_figure(rows, 3, (11, 0.6 + 2.5 * rows), sharex=True)
    for axes, (key, label) in zip(grid.flat, panels, strict=False):
        axes.plot(data["step"], data[key], _line(data, "C0"), markersize=3, linewidth=1.4)
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
        if key != "gradient_cosine":  # a norm's zero is worth seeing, and a cosine's is far away
            axes.set_ylim(bottom=0)
    finish(grid, len(panels), "step")
    save(figure, path, title)


@checked
def plot_filter_norms(data: Mapping[str, Any], path: Target, title: str | None = None) -> None:
    """Draws each filter's L2 norm over the steps, one panel per layer, with the number that has zeroed out.

    Of a layer with more than 64 filters, 64 are drawn, evenly from the smallest to the largest at the end.
    """
    layers = _layers(data, "filter", "filter norms")
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure, grid = new_figure(rows, columns, (3.1 * columns, 0.6 + 1.9 * rows), sharex=True)
    for axes, (name, norms) in zip(grid.flat, layers.items(), strict=False):
        norms = norms.astype(np.float32)
        order = np.argsort(norms[-1])
        drawn = order[np.unique(np.linspace(0, len(order) - 1, 64).round().astype(int))]
        axes.plot(data["step"], norms[:, drawn], _line(data, "C0"), markersize=2, linewidth=0.7, alpha=0.5)
        dead = int((norms[-1] <= ZERO_NORM).sum())
        axes.set_title(f"{shorten(name)}: {dead} of {len(order)} at 0", fontsize=8, color="C3" if dead else "black")
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    finish(grid, len(layers), "step")
    save(figure, path, title)


@checked
def plot_gradients(data: Mapping[str, Any], path: Target, title: str | None = None) -> None:
    """Draws the gradient norm of every layer over the steps, from the first layer (dark) to the last (light)."""
    layers = _layers(data, "gradient", "gradient norms")
    figure, grid = new_figure(1, 1, (8, 4.5))
    axes = grid[0, 0]
    _draw_layers(axes, data, layers)
    axes.set_xlabel("step")
    axes.set_ylabel("L2 norm of the weight's gradient")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path, title)


@checked
def plot_normalization(data: Mapping[str, Any], path: Target, title: str | None = None) -> None:
    """Draws how fast each layer under a batch or group norm learns, from the first (dark) to the last (light)."""
    panels = [key for key in _NORMALIZATION if any(name.startswith(f"{key}/") for name in data)]
    if not panels:
        raise ValueError("data has no normalised layers to draw")
    figure, grid = new_figure(2, 3, (12, 6), sharex=True)
    for axes, key in zip(grid.flat, panels, strict=False):
        _draw_layers(axes, data, _layers(data, key, key), log=key != "norm_bias")
        axes.set_title(_NORMALIZATION[key], fontsize=10)
    grid.flat[len(panels) - 1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    finish(grid, len(panels), "step")
    save(figure, path, title)


def _draw_layers(axes: Any, data: Mapping[str, Any], layers: Mapping[str, Any], log: bool = True) -> None:
    """A line for each layer; of many, only the first and the last are named."""
    from matplotlib import colormaps

    colours = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    named = {0, len(layers) - 1} if len(layers) > 12 else range(len(layers))
    log = log and any((values > 0).any() for values in layers.values())
    for number, ((name, values), colour) in enumerate(zip(layers.items(), colours, strict=True)):
        drawn = np.where(np.isfinite(values) & ((values > 0) | (not log)), values, np.nan)
        label = shorten(name) if number in named else None
        axes.plot(data["step"], drawn, _line(data), markersize=3, color=colour, linewidth=1.1, label=label)
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)


@checked
def plot_probabilities(data: Mapping[str, Any], path: Target, title: str | None = None) -> None:
    """Draws p' against p for several alpha with Lemma 1's thresholds, and how probabilities are distributed.

    The curves are those of an image whose ``sum_j p_j^alpha`` is the (geometric) mean of the last snapshot's batch.
    """
    if "curve_power_sums" not in data:
        raise ValueError("data has no probabilities to draw: no logits were seen in the run")
    figure, grid = new_figure(1, 3, (13, 4.2))
    curves, of_target, of_classes = grid[0]

    alpha = float(data["alpha"][-1])
    sums = dict(zip((*CURVE_ALPHAS, alpha), np.exp(data["curve_power_sums"][-1].astype(float)), strict=True))
    p = np.geomspace(1e-6, 1, 200)
    curves.plot(p, p, color="black", linewidth=0.8, linestyle=":", label="p' = p")
    for number, (exponent, total) in enumerate(sorted(sums.items())):
        if exponent == 1:
            continue
        own, t = exponent == alpha, lemma_threshold(total, exponent)
        curves.plot(p, p**exponent / total, f"C{number}", linewidth=2.4 if own else 1.2, label=f"alpha = {exponent:g}")
        curves.plot(t, t, "o", color=f"C{number}", markersize=6 if own else 4)
    curves.set_xscale("log")
    curves.set_yscale("log")
    curves.set_xlim(1e-6, 1.2)
    curves.set_ylim(1e-6, 1.2)
    curves.set_xlabel("p")
    curves.set_ylabel("p'")
    curves.set_title("p' against p; dots: Lemma 1's threshold", fontsize=10)
    curves.legend(frameon=False, fontsize=8, loc="lower right")

    shown = [("p", "C7"), ("p'", "C0")] if alpha != 1 else [("p = p'", "C0")]
    for axes, key, low, high, label in (
        (of_target, "target_histogram", 0, 1, "probability of the target"),
        (of_classes, "class_histogram", -10, 0, "log10 of the probability of each class"),
    ):
        counts = data[key][-1]
        edges = np.linspace(low, high, counts.shape[1] + 1)
        for (name, colour), row in zip(shown, counts, strict=False):
            axes.stairs(row / max(row.sum(), 1), edges, fill=True, alpha=0.45, color=colour, label=name)
        axes.set_title(f"{label}, step {data['step'][-1]}", fontsize=10)
        axes.set_ylabel("share")
        axes.legend(frameon=False)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    save(figure, path, title)


@checked
def plot_against_alpha(runs: Mapping[str, Mapping[str, float]], path: Target) -> None:
    """Draws the final values of at least two runs, those of ``FINALS``, against the alpha of each.

    Example:
        >>> plot_against_alpha({"a": {"alpha": 1, "loss": 0.8}, "b": {"alpha": 0.1, "loss": 2.0}}, "alpha.png")
    """
    panels = [(key, label) for key, label in FINALS.items() if sum(key in run for run in runs.values()) > 1]
    if len(runs) < 2 or not panels:
        raise ValueError(f"runs must be at least two with any of {', '.join(FINALS)}, got {list(runs)}")
    figure, grid = new_figure(1, len(panels), (3.4 * len(panels), 3.2))
    for axes, (key, label) in zip(grid[0], panels, strict=True):
        points = sorted((run["alpha"], run[key]) for run in runs.values() if key in run)
        axes.plot(*zip(*points, strict=True), "C0o:", markersize=5, linewidth=0.8)
        axes.set_xlabel("alpha")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
    save(figure, path, None)


_FEW = 40  # points of a curve that are marked one by one
_Curves = dict[str, tuple[str, str]]
_PANELS: list[tuple[str, _Curves, float]] = [
    ("loss", {"loss": ("training", "C0-"), "eval_loss": ("validation", "C1-")}, 1.0),
    ("accuracy (%)", {"eval_top1": ("top-1", "C2-"), "eval_top5": ("top-5", "C4-")}, 100.0),
    ("learning rate", {"learning_rate": ("learning rate", "C7-")}, 1.0),
]


def _line(data: Mapping[str, Any], colour: str = "") -> str:
    """The style of a line over the recorded steps, with markers if these are few."""
    return f"{colour}o-" if len(data["step"]) <= _FEW else f"{colour}-"


def _series(entries: list[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(entry["epoch"], entry[key]) for entry in entries if "epoch" in entry and key in entry]
    return [epoch for epoch, _ in points], [value for _, value in points]


_STATISTICS = {
    "logit_norm": "mean L2 norm of the logits",
    "logit_abs_mean": "mean |mean logit|",
    "logit_abs_max": "mean |max logit|",
    "logit_variance": "mean variance of the logits",
    "feature_norm": "mean L2 norm of the pooled features",
    "gradient_cosine": "cosine of PGT's and the plain gradient",
}
_NORMALIZATION = {
    "weight_norm": "L2 norm of the weight",
    "effective_lr": "learning rate / norm of the weight squared",
    "angle": "angle turned by the step (radians)",
    "norm_scale": "mean |scale| of the norm",
    "norm_bias": "mean bias of the norm",
}
FINALS = {
    "loss": "training loss",
    "eval_loss": "validation loss",
    "eval_top1": "validation top-1",
    "logit_norm": "logit norm",
    "gradient_cosine": "cosine to the plain gradient",
}


def _layers(data: Mapping[str, Any], kind: str, what: str) -> dict[str, Any]:
    """The entries ``kind/LAYER`` by layer."""
    found = {key.removeprefix(f"{kind}/"): value for key, value in data.items() if key.startswith(f"{kind}/")}
    if not found:
        raise ValueError(f"data has no {what} to draw")
    return found
