"""Classifies image files with a run's model."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from ..images.classifiers import load_classifier, preprocessing
from ..images.decoding import SUFFIXES, BadImageError
from ..limits import Count, checked
from .record import model_folder, read_run


@checked
def predict_images(
    folder: str | os.PathLike[str], paths: Iterable[str | os.PathLike[str]], *, top: Count = 3
) -> dict[Path, list[tuple[str, float]]]:
    """The ``top`` most probable classes of each image, with their probabilities, in descending order.

    ``folder`` is a run or another folder with a model; ``paths`` are image files or folders of them. The probabilities
    are those that the run's evaluation found to be calibrated best: ``softmax(z)``, ``softmax(alpha z)`` or fitted.

    Raises:
        FileNotFoundError: There is no model, no such file, or no image at all.
        BadImageError: A file cannot be decoded; the message names it.

    Example:
        >>> predict_images("runs/digits", ["three.png"], top=1)
        {PosixPath('three.png'): [('3', 0.998)]}
    """
    files = [file for path in map(Path, paths) for file in (_images_in(path) if os.path.isdir(path) else [path])]
    if not files:
        raise FileNotFoundError(f"there is no image; folders are searched for {', '.join(SUFFIXES)}")
    run, where = read_run(folder), model_folder(folder)
    model = load_classifier(where)
    transform = preprocessing(model, where)
    found = {}
    for file in files:
        try:
            pixels = transform(file.read_bytes())
        except BadImageError as error:
            raise BadImageError(f"{file}: {error}") from error
        with torch.inference_mode():
            logits = model(pixel_values=pixels[None]).logits[0].float()
        probabilities, classes = torch.softmax(run.scale * logits, dim=-1).topk(min(top, len(logits)))
        names = [model.config.id2label[number] for number in classes.tolist()]
        found[file] = list(zip(names, probabilities.tolist(), strict=True))
    return found


def _images_in(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in files if not path.name.startswith("."))
