"""One HTML page about a run: curves, calibration, confusion, worst mistakes.

The page contains its pictures and its style, and no script.
"""

import base64
import io
import os
from pathlib import Path
from typing import Annotated, Any

import jinja2  # comes with torch
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..analysis.calibration import scaled_logits
from ..analysis.predictions import Evaluation, examine
from ..analysis.result_plots import plot_reliability
from ..analysis.run_plots import plot_training_curve
from ..atomic import replacing
from ..data.splits import class_names
from ..images.classifiers import load_classifier, match_labels, preprocessing
from ..images.dataset import ImageDataset
from ..limits import Count, Whole, checked
from .data import load_validation
from .dataset_terms import dataset_terms
from .folder import write_evaluation
from .record import REPORT, Run, architecture, model_folder, read_evaluation, read_run, shown_metrics, shown_settings

_MATRIX = 25  # with more classes, the confusion matrix is a picture
_PIXELS = 720  # side of that picture
_ROWS = 12  # in the tables of confused and hard classes
_PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


@checked
def report_run(
    folder: str | os.PathLike[str],
    dataset_name: str | None = None,
    *,
    mistakes: Annotated[int, Whole("[0, inf)")] = 24,
    max_images: Count | None = None,
) -> Path:
    """Evaluates a run's model on the images that the run held out, writes its report, and returns the report's path.

    Args:
        folder: The run.
        dataset_name: As in ``load_image_dataset``; by default the run's.
        mistakes: How many of the worst to show.
        max_images: Use only the first so many images.

    Raises:
        FileNotFoundError: There is no model in ``folder``, or no such data set.
        ValueError: The run does not say what it was trained on, or the data set and the model have other classes.

    Example:
        >>> report_run("runs/digits")
    """
    run, where = read_run(folder), model_folder(folder)
    model = load_classifier(where)
    split = load_validation(folder, dataset_name)
    if match_labels(class_names(split), list(model.config.id2label.values())) != list(range(model.config.num_labels)):
        raise ValueError(f"the data have other classes than the model in {folder}, or another order of them")
    images = ImageDataset(split, preprocessing(model, where), on_bad_image="skip")
    alpha = None if run.config.get("powergrad_folded") else run.alpha
    write_evaluation(folder, examine(model, images, alpha=alpha, mistakes=mistakes, max_images=max_images))
    return write_report(folder, run=run)


@checked
def write_report(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    run: Run | None = None,
    evaluation: Evaluation | None = None,
    pictures: bool = True,
) -> Path:
    """Writes ``report.html`` from what a run's folder holds, and returns its path.

    Args:
        folder: The run, with ``evaluation.json`` if ``examine`` was used.
        target: The file to write; by default ``report.html`` in ``folder``.
        run: The result of ``read_run``, to save reading it again.
        evaluation: The result of ``read_evaluation``, likewise.
        pictures: Show the images of the worst mistakes. Leave them out of a page to publish if the data set's licence
            does not allow you to pass them on.

    Raises:
        FileNotFoundError: There is no model in ``folder``.
        ImportError: matplotlib is not installed.

    Example:
        >>> write_report("runs/digits")
    """
    run = read_run(folder) if run is None else run
    evaluation = read_evaluation(folder) if evaluation is None else evaluation
    metrics = shown_metrics(run)
    content: dict[str, Any] = {}
    if evaluation is not None:
        metrics = [row for row in metrics if row[0] in ("top1", "top5", "accuracy", "loss", "nll")]
        content = {"evaluation": evaluation, "pictures": pictures} | _calibration(evaluation) | _confusion(evaluation)
    page = _PAGES.get_template("report_page.html").render(
        network=architecture(run.config),
        data=dataset_terms(run.dataset).name,
        alpha=run.alpha,
        metrics=metrics,
        curve=_curve(run),
        settings=shown_settings(run),
        **content,
    )
    path = Path(target or Path(folder, REPORT))
    with replacing(path) as draft:
        draft.write_text(page, encoding="utf-8")
    return path


def _curve(run: Run) -> str | None:
    file = io.BytesIO()
    try:
        plot_training_curve(run.history, file)
    except ValueError:  # nothing in the history can be drawn
        return None
    return _source(file)


def _calibration(evaluation: Evaluation) -> dict[str, Any]:
    scores, diagrams = [], []
    for name, found in evaluation.calibration.items():
        formula, file = f"softmax({scaled_logits(found.temperature)})", io.BytesIO()
        plot_reliability({f"{name}: {formula}": found.reliability}, file)
        diagrams.append((formula, _source(file)))
        scores.append((name, formula, *(f"{number:.4f}" for number in (found.nll, found.ece, found.brier))))
    return {"scores": scores, "diagrams": diagrams}


def _confusion(evaluation: Evaluation) -> dict[str, Any]:
    names, counts = evaluation.names, evaluation.confusion
    off = counts.copy()
    np.fill_diagonal(off, 0)
    most = np.argsort(-off, axis=None, kind="stable")[:_ROWS]
    pairs = [(*np.unravel_index(place, off.shape), off.flat[place]) for place in most if off.flat[place]]
    totals = counts.sum(axis=1)
    seen = np.flatnonzero(totals)
    right = counts.diagonal()[seen] / totals[seen]
    hardest = [i for i in np.argsort(right, kind="stable")[:_ROWS] if right[i] < 1]
    return {
        "counts": counts.tolist() if len(names) <= _MATRIX else None,
        "matrix": _source(_matrix(counts), "png") if len(names) > _MATRIX else None,
        "confused": [(names[row], names[column], count) for row, column, count in pairs],
        "hardest": [(names[seen[i]], f"{right[i]:.1%}", totals[seen[i]]) for i in hardest],
    }


def _matrix(counts: NDArray[np.int64]) -> io.BytesIO:
    """White for 0, blue on the diagonal, red beside it; square roots make single images visible."""
    shares = np.sqrt(counts / counts.sum(axis=1, keepdims=True).clip(min=1))
    step = max(1, len(counts) // _PIXELS)
    side = -(-len(shares) // step)
    padded = np.pad(shares, (0, side * step - len(shares)))
    strength = padded.reshape(side, step, side, step).max(axis=(1, 3))[..., None]  # the strongest cell of each block
    colour = np.where(np.eye(side, dtype=bool)[..., None], (37, 99, 235), (220, 38, 38))
    pixels = (255 + (colour - 255) * strength).round().astype(np.uint8)
    scale, file = max(1, _PIXELS // side), io.BytesIO()
    Image.fromarray(pixels).resize((side * scale,) * 2, Image.Resampling.NEAREST).save(file, "PNG")
    return file


def _source(file: io.BytesIO, kind: str = "svg+xml") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
