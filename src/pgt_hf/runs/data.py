"""Records which images a run was trained and evaluated on, and finds them again."""

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from ..images.sources import load_image_dataset
from ..limits import checked
from .record import read_record, run_folder

logger = logging.getLogger(__name__)


def describe_data(name: str, splits: Mapping[str, Any]) -> dict[str, Any]:
    """A data set's name, its revision if it came from the Hub, and each split's size and fingerprint.

    With the run's arguments and seed, this is enough to draw the same split again and to recognise it.
    """
    described: dict[str, Any] = {"name": name}
    if Path(name).exists():
        described["local_data"] = True  # data/flowers could also be a Hub id
    for split, dataset in splits.items():
        rows = getattr(dataset, "num_rows", None)
        described[split] = {"images": rows, "fingerprint": _fingerprint(dataset)}
        sources = getattr(dataset.info, "download_checksums", None) or {}
        revisions = {found[1] for source in sources if (found := re.search(r"@([0-9a-f]{40})/", str(source)))}
        if revisions:
            described["revision"] = " ".join(sorted(revisions))
    return described


@checked
def load_validation(
    model: str | os.PathLike[str],
    dataset_name: str | None = None,
    config: str | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    max_eval_samples: int | None = None,
    allow_outside_files: bool | None = None,
    seed: int | None = None,
    streaming: bool | None = None,
) -> Any:
    """The images to evaluate a model on: those that its run was evaluated on, never those of its training.

    A split that was held out of the training images is drawn again as in the run. If that is not possible, because
    the data changed or the run is unknown, a warning says that images may have been trained on.

    Args:
        model: The folder of a run or of one of its checkpoints; any other model has no split of its own.
        dataset_name: As in ``load_image_dataset``; by default the run's.
        config: The same; by default the run's.
        image_column: The same.
        label_column: The same.
        max_eval_samples: The same.
        allow_outside_files: The same.
        seed: For every draw; by default the run's, else 0.
        streaming: As ``load_image_dataset`` takes it; by default as the run was told.

    Raises:
        FileNotFoundError: There is no such data set.
        ValueError: ``dataset_name`` is needed, since the run does not name its data set.

    Example:
        >>> load_validation("runs/digits").num_rows
        360
    """
    record = read_record(run_folder(model) or model)
    arguments = record.get("arguments", {})
    name = dataset_name or arguments.get("dataset_name")
    if name is None:
        raise ValueError(f"dataset_name must be given: {os.fspath(model)} does not say what it was trained on")
    given: dict[str, Any] = {"config": config, "image_column": image_column, "label_column": label_column}
    given |= {"max_eval_samples": max_eval_samples, "streaming": streaming}
    given |= {"allow_outside_files": allow_outside_files or None}
    known = arguments | {"config": arguments.get("dataset_config")}
    own = {key: known[key] for key in given if known.get(key) is not None}
    own = own if name == arguments.get("dataset_name") else {}
    chosen = {key: value for key, value in given.items() if value is not None}
    drawn = record.get("seed", 0) if seed is None else seed
    splits = load_image_dataset(name, seed=drawn, **own | {**chosen, "max_eval_samples": own.get("max_eval_samples")})
    expected = record.get("data", {}).get("validation", {}).get("fingerprint")
    # The library's name for the images' source; that of digits is held out, too.
    held_out = str(splits["validation"].split) in ("train", "None")
    if held_out and _fingerprint(splits["validation"]) != expected and _is_ours(model, record):
        logger.warning(
            "%s has no evaluation split of its own, and the one drawn here is not the one of the training: "
            "the model may have been trained on some of these images",
            name,
        )
    if max_eval_samples not in (None, own.get("max_eval_samples")):
        splits = load_image_dataset(name, seed=drawn, **own | chosen)
    return splits["validation"]


def _is_ours(model: str | os.PathLike[str], record: Mapping[str, Any]) -> bool:
    """Whether a model was trained by this package, rather than published by others."""
    config = Path(model, "config.json")
    return bool(record) or (config.is_file() and "powergrad_alpha" in config.read_text(encoding="utf-8"))


def _fingerprint(split: Any) -> str | None:
    """A hash of the labels in order, and of the sizes or file names of their images; None for a stream."""
    if not isinstance(split, Dataset):
        return None
    indices = split._indices.column(0) if split._indices is not None else None
    digest = hashlib.sha256()
    for name in sorted(split.column_names):
        column = split.data.column(name)
        if str(column.type).startswith("struct<bytes"):  # an image: reading all of them would take too long
            paths = pc.replace_substring_regex(pc.struct_field(column, "path"), ".*[/\\\\]", "")
            parts = [pc.binary_length(pc.struct_field(column, "bytes")), paths]
        else:
            parts = [column if name == "label" else pc.binary_length(pc.cast(column, "string"))]
        for part in parts:
            values = part if indices is None else part.take(indices)
            digest.update(repr(values.to_pylist()).encode())
    return digest.hexdigest()[:16]
