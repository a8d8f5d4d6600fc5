"""What every picture of this package begins and ends with; matplotlib is imported only when one is drawn."""

import importlib.util
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["finish", "new_figure", "require_matplotlib", "save", "shorten"]


def require_matplotlib() -> None:
    """Says at once, before hours of training, that a picture cannot be drawn.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra that brings it.

    Example:
        >>> require_matplotlib()
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("drawing a picture needs matplotlib: pip install 'pgt_hf[plots]'")


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple["Figure", Any]:
    """A figure without pyplot's global state, and its axes as an array (rows, columns)."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def finish(grid: Any, used: int, label: str) -> None:
    """Hides the panels that are left over, and names the x axis under the last one of each column."""
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < used)
        if number < used <= number + grid.shape[1]:
            axes.set_xlabel(label)
            axes.tick_params(labelbottom=True)


def save(figure: "Figure", path: str | os.PathLike[str], title: str | None) -> None:
    """Writes the picture, with ``title`` above it if there is one."""
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=150)


def shorten(name: str) -> str:
    """The end of a long name, at most 30 characters."""
    return name if len(name) <= 30 else "..." + name[-27:]
