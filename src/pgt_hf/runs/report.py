"""One HTML page about a run, to be opened in any browser: curves, calibration, confusion, worst mistakes.

The page holds its pictures and its style, and no script.
"""

import base64
import io
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Annotated, Any

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
from .record import METRICS, REPORT, Run, architecture, model_folder, read_evaluation, read_run, shown_settings

_MATRIX = 25  # up to so many classes, the confusion matrix is a table of numbers
_PIXELS = 720  # side of the picture that it is otherwise


@checked
def report_run(
    folder: str | os.PathLike[str],
    dataset_name: str | None = None,
    *,
    mistakes: Annotated[int, Whole("[0, inf)")] = 24,
    max_images: Count | None = None,
) -> Path:
    """Looks at the predictions of a run's model, writes its report, and returns the report's path.

    The images are those that the run held out, see ``load_validation``.

    Args:
        folder: The run.
        dataset_name: As ``load_image_dataset`` takes it; by default the run's own.
        mistakes: How many of the worst to show.
        max_images: Look at the first so many evaluation images only.

    Raises:
        FileNotFoundError: There is no model in ``folder``, or no such data set.
        ValueError: The run does not say what it was trained on; or the data set has other classes than the model.

    Example:
        >>> report_run("runs/digits")
    """
    run = read_run(folder)
    where = model_folder(folder)
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
    """Writes ``report.html`` from a run's folder, without what was not recorded, and returns its path.

    Args:
        folder: The run, with ``evaluation.json`` if ``examine`` was used.
        target: The file to write; by default ``report.html`` in ``folder``.
        run: What ``read_run`` read, if it is at hand.
        evaluation: The same of ``read_evaluation``.
        pictures: Show the images of the worst mistakes. Leave them out of a page to publish if the data set's licence
            does not let you pass them on.

    Raises:
        FileNotFoundError: There is no model in ``folder``.
        ImportError: matplotlib is not installed.

    Example:
        >>> write_report("runs/digits")
    """
    run = read_run(folder) if run is None else run
    evaluation = read_evaluation(folder) if evaluation is None else evaluation
    name = architecture(run.config)
    sections = [_headline(run, evaluation)]
    if curve := _curve(run):
        sections.append(_section("Training", curve))
    if evaluation is not None:
        sections += [
            _section("Calibration", _calibration(evaluation)),
            _section("Confusion", _confusion(evaluation)),
            _section("Worst mistakes", _mistakes(evaluation, pictures)),
        ]
    if rows := shown_settings(run):
        sections.append(_section("Settings", _table(("setting", "value"), rows)))
    template = Template(Path(__file__).with_name("report_page.html").read_text(encoding="utf-8"))
    title = escape(f"{name} on {dataset_terms(run.dataset).name}")
    page = template.substitute(title=title, body="\n".join(sections))
    path = Path(target or Path(folder, REPORT))
    with replacing(path) as draft:
        draft.write_text(page, encoding="utf-8")
    return path


def _headline(run: Run, evaluation: Evaluation | None) -> str:
    terms = dataset_terms(run.dataset)
    shown = dict(run.metrics)
    if evaluation is not None:  # the section on calibration has the rest
        shown = {key: value for key, value in shown.items() if key in ("top1", "top5", "accuracy", "loss", "nll")}
    how = "" if run.alpha is None else f", PowerGrad Transform with alpha = {run.alpha:g}"
    tiles = [(f"{value:.2%}" if METRICS[key][2] else f"{value:.4g}", METRICS[key][1]) for key, value in shown.items()]
    if evaluation is not None:
        tiles.append((f"{evaluation.confusion.sum():,}", "images evaluated here"))
    inner = "".join(
        f"<div class=tile><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in tiles
    )
    return (
        f"<header><h1>{escape(architecture(run.config))}</h1><p>{escape(terms.name + how)}</p></header>"
        f"<div class=tiles>{inner}</div>"
    )


def _curve(run: Run) -> str | None:
    file = io.BytesIO()
    try:
        plot_training_curve(run.history, file)
    except ValueError:  # nothing in the history can be drawn
        return None
    return _picture(file, "Loss, accuracy and learning rate over the epochs")


def _calibration(evaluation: Evaluation) -> str:
    found, pictures, rows = evaluation.calibration, [], []
    for name, scores in found.items():
        file = io.BytesIO()
        formula = f"softmax({scaled_logits(scores.temperature)})"
        plot_reliability({f"{name}: {formula}": scores.reliability}, file)
        pictures.append(_picture(file, f"Accuracy against confidence, {formula}"))
        numbers = (scores.nll, scores.ece, scores.brier)
        rows.append((name, formula, *(f"{number:.4f}" for number in numbers)))
    advice = f"For probabilities, use <b>{evaluation.probabilities}</b>: its negative log-likelihood (NLL) is lowest."
    legend = (
        "Accuracy against confidence: on the diagonal the probabilities are right, below it the model is "
        "over-confident. The best class, and so the accuracy, is the same for all. Folded are the probabilities that "
        "PGT trained, with alpha multiplied into the logits; fitted are those at a temperature fitted to one half of "
        "the images and scored on the other."
    )
    table = _table(("probabilities", "formula", "NLL", "ECE", "Brier"), rows)
    return f"<p>{advice}</p>{table}<p class=legend>{legend}</p><div class=diagrams>{''.join(pictures)}</div>"


def _confusion(evaluation: Evaluation) -> str:
    names, counts = evaluation.names, evaluation.confusion
    matrix = _matrix(names, counts) if len(names) <= _MATRIX else _matrix_picture(counts)
    off = counts.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:12]
    pairs = [(*divmod(int(flat), len(names)), int(off.flat[flat])) for flat in order if off.flat[flat]]
    confused = [(names[row], names[column], count) for row, column, count in pairs]
    totals = counts.sum(axis=1)
    seen = np.flatnonzero(totals)
    shares = counts.diagonal()[seen] / totals[seen]
    hardest = [i for i in np.argsort(shares, kind="stable")[:12] if shares[i] < 1]
    low = [(names[seen[i]], f"{shares[i]:.1%}", int(totals[seen[i]])) for i in hardest]
    matrix = f"<p>A row for each true class, a column for each predicted one.</p>{matrix}"
    if not confused:
        return f"{matrix}<p>No image was classified wrong.</p>"
    return (
        f"{matrix}<div class=pair>"
        f"<div><h3>Most confused</h3>{_table(('true class', 'predicted', 'images'), confused)}</div>"
        f"<div><h3>Hardest classes</h3>{_table(('true class', 'right', 'images'), low)}</div></div>"
    )


def _matrix(names: Sequence[str], counts: NDArray[np.int64]) -> str:
    totals = counts.sum(axis=1, keepdims=True).clip(min=1)
    shares = counts / totals
    turned = " class=turned" if max(map(len, names)) > 4 else ""
    head = "".join(f"<th scope=col><span{turned}>{escape(_short(name))}</span></th>" for name in names)
    rows = []
    for i, name in enumerate(names):
        cells = "".join(
            f'<td class="{_kind(i == j, counts[i, j])}" style="--share:{shares[i, j]:.3f}" '
            f'title="true {escape(name)}, predicted {escape(names[j])}: {shares[i, j]:.1%}">{counts[i, j] or ""}</td>'
            for j in range(len(names))
        )
        rows.append(f"<tr><th scope=row>{escape(_short(name))}</th>{cells}</tr>")
    return f"<div class=wide><table class=matrix><tr><th></th>{head}</tr>{''.join(rows)}</table></div>"


def _kind(right: bool, images: int) -> str:
    return ("hit" if right else "miss") if images else "none"


def _matrix_picture(counts: NDArray[np.int64]) -> str:
    """White where nothing is, blue on the diagonal, red beside it; square roots, so that single images are seen."""
    shares = np.sqrt(counts / counts.sum(axis=1, keepdims=True).clip(min=1))
    step = max(1, len(counts) // _PIXELS)
    if step > 1:  # the strongest cell of each block stands for it
        side = -(-len(shares) // step) * step
        padded = np.zeros((side, side))
        padded[: len(shares), : len(shares)] = shares
        shares = padded.reshape(side // step, step, side // step, step).max(axis=(1, 3))
    strength = shares[..., None]
    blue, red = np.array([37, 99, 235]), np.array([220, 38, 38])
    colour = np.where(np.eye(len(shares), dtype=bool)[..., None], blue, red)
    pixels = (255 + (colour - 255) * strength).round().astype(np.uint8)
    scale = max(1, _PIXELS // len(pixels))
    image = Image.fromarray(pixels).resize((len(pixels) * scale,) * 2, Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG")
    return (
        f"<div class=framed>{_picture(file, 'Confusion matrix: right predictions blue, wrong ones red', 'png')}</div>"
    )


def _mistakes(evaluation: Evaluation, pictures: bool) -> str:
    names = evaluation.names
    if not evaluation.mistakes:
        return "<p>No image was classified wrong.</p>"
    intro = (
        "<p>The wrong predictions that the model was surest of. The percentage is the probability of the wrong class, "
        f"{evaluation.probabilities}; the number is the image's index in the evaluation split.</p>"
    )
    if not pictures:
        rows = [(m.index, names[m.label], names[m.predicted], f"{m.confidence:.1%}") for m in evaluation.mistakes]
        note = "<p>The images are not shown, since the data set's licence may not allow it.</p>"
        return intro + note + _table(("image", "true class", "predicted", "probability"), rows)
    cards = []
    for mistake in evaluation.mistakes:
        picture = f'<img src="{mistake.picture}" alt="image {mistake.index}">' if mistake.picture else ""
        cards.append(
            f"<figure>{picture}<figcaption>true: <b>{escape(names[mistake.label])}</b><br>"
            f"predicted: <b>{escape(names[mistake.predicted])}</b>, {mistake.confidence:.1%}<br>#{mistake.index}"
            "</figcaption></figure>"
        )
    return f"{intro}<div class=mistakes>{''.join(cards)}</div>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{top}</tr>{body}</table></div>"


def _picture(file: io.BytesIO, alt: str, kind: str = "svg+xml") -> str:
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class=plot src="data:image/{kind};base64,{data}" alt="{escape(alt)}">'


def _short(name: str, length: int = 14) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
