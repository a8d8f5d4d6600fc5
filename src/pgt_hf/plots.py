"""Pictures of a training run; matplotlib is imported only when one is drawn (``pip install 'pgt_hf[plots]'``)."""

import importlib.util
import os
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["plot_training_curve", "require_matplotlib"]


def require_matplotlib() -> None:
    """Says at once, before hours of training, that a picture cannot be drawn.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra that brings it.

    Example:
        >>> require_matplotlib()
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("drawing the training curve needs matplotlib: pip install 'pgt_hf[plots]'")


def plot_training_curve(
    history: Iterable[Mapping[str, Any]], path: str | os.PathLike[str], title: str | None = None
) -> None:
    """Draws loss, top-1 accuracy and learning rate over the epochs, one below the other, as a PNG.

    Args:
        history: ``trainer.state.log_history``: mappings with "epoch" and any of "loss", "eval_loss", "eval_top1",
            "eval_top5", "learning_rate". What is missing is left out.
        path: Where the picture is written.
        title: A line above it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing in ``history`` to draw.

    Example:
        >>> plot_training_curve(trainer.state.log_history, "training_curve.png")
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = list(history)
    panels = [panel for panel in _PANELS if any(_series(entries, key)[0] for key in panel[1])]
    if not panels:
        raise ValueError("history has nothing to draw: no entry holds an epoch and a loss, accuracy or learning rate")

    figure = Figure(figsize=(7, 0.8 + 2.2 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, curves, scale) in zip(all_axes, panels, strict=True):
        for key, (name, style) in curves.items():
            epochs, values = _series(entries, key)
            if epochs:
                axes.plot(epochs, [scale * value for value in values], style, markersize=3, linewidth=1.4, label=name)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(frameon=False)
    all_axes[-1].set_xlabel("epoch")
    figure.align_ylabels()
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=150)


_Curves = dict[str, tuple[str, str]]
_PANELS: list[tuple[str, _Curves, float]] = [
    ("loss", {"loss": ("training", "C0-"), "eval_loss": ("validation", "C1o-")}, 1.0),
    ("accuracy (%)", {"eval_top1": ("top-1", "C2o-"), "eval_top5": ("top-5", "C4o-")}, 100.0),
    ("learning rate", {"learning_rate": ("learning rate", "C7-")}, 1.0),
]


def _series(entries: list[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(entry["epoch"], entry[key]) for entry in entries if "epoch" in entry and key in entry]
    return [epoch for epoch, _ in points], [value for _, value in points]
