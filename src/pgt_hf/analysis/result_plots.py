"""Pictures of what trained classifiers got right and wrong; arguments and errors as in ``run_plots``."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ..limits import Count, checked
from .figures import Target, finish, new_figure, require_matplotlib, save, shorten

if TYPE_CHECKING:
    from .comparison import Point
    from .predictions import Evaluation

_THUMBNAIL = 224  # pixels


@checked
def plot_reliability(diagrams: Mapping[str, Any], path: Target, title: str | None = None, columns: Count = 3) -> None:
    """Draws diagrams of ``reliability`` side by side: accuracy against confidence, and each bin's share of the images.

    Example:
        >>> plot_reliability({"raw": reliability([0.9, 0.8, 0.3], [1, 0, 0])}, "reliability.png")
    """
    if not diagrams:
        raise ValueError("diagrams must hold at least one diagram, got none")
    columns = min(columns, len(diagrams))
    rows = math.ceil(len(diagrams) / columns)
    figure, grid = new_figure(rows, columns, (3.1 * columns, 0.6 + 3.0 * rows), sharex=True, sharey=True)
    for axes, (name, diagram) in zip(grid.flat, diagrams.items(), strict=False):
        filled = diagram.count > 0
        middles, width = (diagram.edges[:-1] + diagram.edges[1:]) / 2, diagram.edges[1]
        share = diagram.count / diagram.count.sum()
        axes.bar(middles, share, width, color="C7", alpha=0.35, label="share of images")
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
        curve = diagram.confidence[filled], diagram.accuracy[filled]
        axes.plot(*curve, "C0o-", markersize=4, linewidth=1.2, label="accuracy")
        axes.set_title(f"{name}\nECE {diagram.ece:.3f}", fontsize=9)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=2, loc="outside lower center")
    finish(grid, len(diagrams), "confidence")
    save(figure, path, title)


@checked
def plot_confusion(counts: ArrayLike, names: Sequence[str], path: Target, title: str | None = None) -> None:
    """Draws ``confusion_matrix``: each row is a true class, in shares of its images.

    The names are shown for up to 40 classes, the counts for up to 20.

    Example:
        >>> plot_confusion([[8, 2], [0, 10]], ["cat", "dog"], "confusion_matrix.png")
    """
    matrix = np.asarray(counts)
    if matrix.shape != (len(names), len(names)):
        raise ValueError(f"counts must have shape ({len(names)}, {len(names)}), got {matrix.shape}")
    labels = [shorten(name) for name in names]
    words = 0.07 * max(map(len, labels)) if len(names) <= 40 else 0.0  # inches beside and below the matrix
    side = min(2.5 + 0.32 * len(names), 12)
    figure, grid = new_figure(1, 1, (side + words + 1.2, side + words))
    axes = grid[0, 0]
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the true class's images")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if len(names) <= 40:
        axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), labels, fontsize=8)
    if len(names) <= 20:
        for row, column in zip(*matrix.nonzero(), strict=True):
            color = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, matrix[row, column], ha="center", va="center", fontsize=7, color=color)
    save(figure, path, title)


@checked
def plot_images(images: Sequence[Any], captions: Sequence[str], path: Target, title: str | None = None) -> None:
    """Draws a sheet of images, PIL's or arrays, each with a caption of a line or two.

    Example:
        >>> plot_images([Image.new("RGB", (32, 32))], ["cat, 98%"], "predictions.png")
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"images and captions must be as many, at least 1, got {len(images)} and {len(captions)}")
    if flat := [image for image in images if np.ndim(image) < 2]:
        raise TypeError(f"images must be PIL's images or arrays of pixels, got {flat[0]!r}")
    columns = min(6, len(images))
    rows = math.ceil(len(images) / columns)
    figure, grid = new_figure(rows, columns, (1.9 * columns, 2.4 * rows))
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, caption in zip(grid.flat, images, captions, strict=False):
        axes.imshow(np.asarray(image), cmap="gray")
        axes.set_title("\n".join(shorten(line) for line in caption.splitlines()), fontsize=7)
    save(figure, path, title)


@checked
def plot_mistakes(
    evaluation: "Evaluation", images: Any, path: Target, title: str | None = None, most: int = 36
) -> None:
    """Draws the worst mistakes of an evaluation, from the column ``image`` of its split; nothing if there is none.

    Example:
        >>> plot_mistakes(examine(model, dataset), dataset.split, "mistakes.png")
    """
    if worst := evaluation.mistakes[:most]:
        from ..images.dataset import thumbnail

        name = [shorten(each, 19) for each in evaluation.names]
        captions = [f"true: {name[m.label]}\npredicted: {name[m.predicted]}\n{m.confidence:.1%}" for m in worst]
        formula = f"Percentages: probability of the wrong class, {evaluation.probabilities}"
        pictures = [thumbnail(images, m.index, _THUMBNAIL) for m in worst]
        blank = np.full((1, 1, 3), 255, dtype=np.uint8)  # in place of an image that cannot be read
        shown = [blank if picture is None else picture for picture in pictures]
        plot_images(shown, captions, path, "\n".join(filter(None, [title, formula])))


@checked
def plot_adaptation(rows: Sequence[Sequence[Any]], path: Target, title: str | None = None) -> None:
    """Draws the accuracy on each target domain against alpha, a line for each method, the mean over the seeds.

    A row has alpha, seed, target, method, accuracy on the source, accuracy on the target.

    Example:
        >>> plot_adaptation([[1.0, 0, "contrast:3", "bn", 0.9, 0.8], [0.5, 0, "contrast:3", "bn", 0.9, 0.7]], "bn.png")
    """
    if not rows:
        raise ValueError("rows must hold at least one run, got none")
    targets, methods = (list(dict.fromkeys(row[place] for row in rows)) for place in (2, 3))
    columns = min(3, len(targets))
    lines = math.ceil(len(targets) / columns)
    figure, grid = new_figure(lines, columns, (1 + 3.6 * columns, 3.2 * lines), sharex=True)
    for axes, target in zip(grid.flat, targets, strict=False):
        for method in methods:
            accuracies: dict[float, list[float]] = {}
            for alpha, _, its_target, its_method, _, accuracy in rows:
                if (its_target, its_method) == (target, method):
                    accuracies.setdefault(alpha, []).append(100 * accuracy)
            alphas = sorted(accuracies)
            axes.plot(alphas, [np.mean(accuracies[alpha]) for alpha in alphas], "o-", markersize=4, label=method)
        axes.set_title(shorten(str(target)), fontsize=10)
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("top-1 on the target (%)")
    handles, labels = grid[0, 0].get_legend_handles_labels()  # below the panels: inside, it may lie on a line
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=len(methods), loc="outside lower center")
    finish(grid, len(targets), "alpha")
    save(figure, path, title)


@checked
def plot_heat_map(points: Sequence["Point"], path: Target, title: str | None = None) -> None:
    """Draws the mean score of each point over learning rate and alpha; stars mark the best baseline and the best PGT.

    A cell is a setting of a grid; if there are many settings, as after a random search, it is the mean of a bin. There
    are as many cells of each colour, so that the best ones are told apart however bad the worst are.
    """
    if not points:
        raise ValueError("points must hold at least one setting that was trained")
    require_matplotlib()
    columns = _cells([math.log10(point.learning_rate) for point in points])
    rows = _cells([point.alpha for point in points if point.alpha < 1])
    if any(point.alpha == 1 for point in points):
        rows = [*rows, (1.0, 1.0)]
    cells: dict[tuple[int, int], list[Point]] = {}
    for point in points:
        key = _find(rows, point.alpha), _find(columns, math.log10(point.learning_rate))
        cells.setdefault(key, []).append(point)
    means = np.full((len(rows), len(columns)), np.nan)
    for key, inside in cells.items():
        means[key] = 100 * statistics.fmean(point.mean for point in inside)

    from matplotlib.colors import BoundaryNorm

    figure, grid = new_figure(1, 1, (2.2 + 0.75 * len(columns), 1.9 + 0.5 * len(rows)))
    axes = grid[0, 0]
    levels = np.unique(np.nanquantile(means, np.linspace(0, 1, 9)))
    if len(levels) == 1:
        levels = levels + np.array([-0.5, 0.5])
    norm = BoundaryNorm(levels, 256)
    image = axes.imshow(means, origin="lower", aspect="auto", cmap="viridis", norm=norm)
    for (row, column), mean in np.ndenumerate(means):
        if not np.isnan(mean):
            dark = norm(mean) < 150
            axes.text(column, row, f"{mean:.1f}", ha="center", va="center", size=8, color="white" if dark else "black")
    stars = []
    for side in ([p for p in points if p.alpha == 1], [p for p in points if p.alpha < 1]):
        if side:
            best = max(side, key=lambda point: point.mean)
            place = _find(columns, math.log10(best.learning_rate)), _find(rows, best.alpha)
            stars += axes.plot(place[0], place[1] + 0.32, "*", color="red", markersize=9)
    meaning = "best mean with PGT, and without (alpha = 1)" if len(stars) == 2 else "best mean"
    figure.legend(stars[:1], [meaning], frameon=False, fontsize=8, loc="outside lower center")
    axes.set_xticks(range(len(columns)), [_label(column, lambda value: 10**value) for column in columns], rotation=45)
    axes.set_yticks(range(len(rows)), [_label(row, lambda value: value) for row in rows])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("alpha")
    figure.colorbar(image, label="mean score (%)", ticks=levels, format="%.1f", spacing="uniform")
    if title:
        axes.set_title(title, size=10)
    save(figure, path, None)


_MOST_CELLS = 12
_BINS = 8


def _cells(values: Sequence[float]) -> list[tuple[float, float]]:
    """The values themselves if they are few, as in a grid; else bins of equal width."""
    distinct = sorted({round(value, 9) for value in values})
    if len(distinct) <= _MOST_CELLS:
        return [(value, value) for value in distinct]
    width = (distinct[-1] - distinct[0]) / _BINS
    return [(distinct[0] + i * width, distinct[0] + (i + 1) * width) for i in range(_BINS)]


def _find(cells: Sequence[tuple[float, float]], value: float) -> int:
    return min(range(len(cells)), key=lambda i: max(cells[i][0] - value, value - cells[i][1]))


def _label(cell: tuple[float, float], scale: Callable[[float], float]) -> str:
    low, high = (f"{scale(edge):.3g}" for edge in cell)
    return low if low == high else f"{low} - {high}"
