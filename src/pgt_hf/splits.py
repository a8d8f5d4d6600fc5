"""Columns, labels and splits, for data sets of images and of text."""

import logging
from collections.abc import Sequence
from typing import Any

import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Value

__all__ = ["EVALUATION_SPLITS", "check_size", "class_names", "draw", "find_column", "train_and_validation"]

logger = logging.getLogger(__name__)

EVALUATION_SPLITS = ("validation", "valid", "val", "test")

_SEEN = "after training on it, the accuracy reported is that of examples seen in training"


def find_column(
    columns: Sequence[str], what: str, wanted: str | None, usual: Sequence[str], typed: Sequence[str] = ()
) -> str:
    """The column that the user named, else the first with a usual name, else the only one of the right type.

    Raises:
        ValueError: It is not there, or cannot be told; the message calls it ``what``.

    Example:
        >>> find_column(["id", "review"], "text", None, ("text", "review"))
        'review'
    """
    if wanted is not None and wanted not in columns:
        raise ValueError(f"{what}_column must be one of {list(columns)}, got {wanted!r}")
    found = [wanted] if wanted else [column for column in usual if column in columns]
    if not found and len(typed) != 1:
        raise ValueError(f"no {what} column among {list(columns)}; name it with {what}_column")
    return (found or list(typed))[0]


def train_and_validation(splits: DatasetDict, name: str, seed: int, *, labelled: bool = True) -> DatasetDict:
    """Chooses, or makes, a split to train on and one to evaluate on; making one is logged as a warning.

    The evaluation split is the first (labelled) one of validation, valid, val and test. If there is none, a tenth is
    held out of ``train``, the same share of each class; if there is no ``train``, the one split serves as both. The
    column ``label``, unless ``labelled`` is False, becomes a ClassLabel with the same names in both.

    Raises:
        ValueError: No split has labels, the splits name different classes, or there is too little to hold out.
    """
    usable = {key: split for key, split in splits.items() if split.num_rows and (not labelled or _is_labelled(split))}
    if not usable:
        raise ValueError(f"{name!r} has nothing labelled in its splits {sorted(splits)}")
    train = usable.get("train")
    held_out = next((usable[key] for key in EVALUATION_SPLITS if key in usable), None)
    if train is None:
        train = held_out = held_out if held_out is not None else next(iter(usable.values()))
        logger.warning("%s has no split `train`: one split serves for training and evaluation; %s", name, _SEEN)
    both = DatasetDict({"train": train, "validation": train if held_out is None else held_out})
    if labelled:
        both = _same_classes(both, name)
    if held_out is not None:
        return both
    logger.warning("%s has no split for evaluation: a tenth of `train` is held out (seed %d)", name, seed)
    return _hold_out(both["train"], name, seed, labelled)


def draw(split: Dataset, size: int | None, seed: int) -> Dataset:
    """At most ``size`` examples, drawn by ``seed``; all if ``size`` is None."""
    if size is None or size >= split.num_rows:
        return split
    check_size(size)
    return split.shuffle(seed=seed).select(range(size))


def check_size(size: int) -> None:
    """Raises ValueError for a number of examples below 1."""
    if size < 1:
        raise ValueError(f"a number of samples must be at least 1, got {size}")


def class_names(dataset: Any) -> list[str]:
    """The names of the classes in the order of their numbers.

    Example:
        >>> class_names(load_image_dataset("digits")["train"])[:2]
        ['0', '1']
    """
    return list(dataset.features["label"].names)


def _is_labelled(split: Dataset) -> bool:
    """Public test splits often have -1, or nothing, for every label."""
    first = pc.min(split.data.column("label")).as_py()
    return first is not None and first != -1


def _same_classes(both: DatasetDict, name: str) -> DatasetDict:
    """Gives both splits one ClassLabel, made from the labels that occur where the data set names none."""
    train, validation = (both[key].features["label"] for key in ("train", "validation"))
    if not isinstance(train, ClassLabel):
        seen = sorted({label for split in both.values() for label in split.unique("label")})
        feature = ClassLabel(names=[str(label) for label in seen])
        return both.cast_column("label", Value("string")).cast_column("label", feature)
    if validation != train:
        raise ValueError(f"the splits of {name!r} name different classes: {train} and {validation}")
    return both


def _hold_out(train: Dataset, name: str, seed: int, labelled: bool) -> DatasetDict:
    size = max(round(0.1 * train.num_rows), len(class_names(train)) if labelled else 1)
    try:
        halves = train.train_test_split(size, seed=seed, stratify_by_column="label" if labelled else None)
    except ValueError as error:
        raise ValueError(f"{name!r} is too small to hold out a validation split: {error}") from error
    return DatasetDict({"train": halves["train"], "validation": halves["test"]})
