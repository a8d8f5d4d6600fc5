"""Creating and saving figures; matplotlib is imported only when one is drawn."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._lazy import no_collection
from ..extras import require

Target = str | os.PathLike[str] | BytesIO  # where a picture is written; one for a page, in memory, is an SVG

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib() -> None:
    """Raises ImportError before hours of training, rather than when the first picture is drawn."""
    require("matplotlib", "drawing a picture")


def check_target(path: Target, name: str = "path") -> None:
    """Raises ValueError unless the file's ending is that of a picture that can be written."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    if not isinstance(path, BytesIO) and Path(path).suffix.lower().removeprefix(".") not in known:
        raise ValueError(
            f"{name} must end in one of {', '.join(f'.{each}' for each in sorted(known))}, got {str(path)!r}"
        )


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple["Figure", Any]:
    """A figure without pyplot's global state, and its axes as an array (rows, columns)."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


@contextmanager
def freed() -> Iterator[None]:
    """Frees the figures that are drawn within: each is a cycle of some 4 MB, which a large program may keep for long.

    Example:
        >>> with freed():
        ...     plot_training_curve(trainer.state.log_history, "training_curve.png")
    """
    with no_collection():  # what is drawn stays in the youngest generation, which is collected in milliseconds
        try:
            yield
        finally:
            gc.collect(0)
            gc.collect(1)  # numpy's array of axes, which the collector cannot look into, kept the figure until now


def finish(grid: Any, used: int, label: str) -> None:
    """Hides the panels that are left over, and names the x axis under the last one of each column."""
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < used)
        if number < used <= number + grid.shape[1]:
            axes.set_xlabel(label)
            axes.tick_params(labelbottom=True)


def save(figure: "Figure", path: Target, title: str | None) -> None:
    """Writes the picture, with ``title`` above it if there is one."""
    check_target(path)
    if title:
        figure.suptitle(title)
    if isinstance(path, BytesIO):
        from matplotlib import rc_context

        with rc_context({"svg.hashsalt": "pgt_hf"}):  # the same bytes for the same figure
            figure.savefig(path, format="svg", metadata={"Date": None})
    else:
        figure.savefig(path, dpi=150)


def shorten(name: str, most: int = 30) -> str:
    """The end of a long name, at most ``most`` characters."""
    return name if len(name) <= most else "..." + name[3 - most :]
