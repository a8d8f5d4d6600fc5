"""Columns, labels and splits, for data sets of images and of text."""

import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Value

__all__ = [
    "EVALUATION_SPLITS",
    "class_names",
    "draw",
    "find_column",
    "is_labelled",
    "labelled_rows",
    "relabelled",
    "sorted_classes",
    "split_of",
    "train_and_validation",
]

logger = logging.getLogger(__name__)

EVALUATION_SPLITS = ("validation", "valid", "val", "test")

_SEEN = "after training on it, the accuracy reported is that of examples seen in training"
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")
_BLANK = ("", "na", "n/a", "nan", "none", "null", "<na>")  # ways to write a missing value


def split_of(name: str, *, alone: bool = False) -> str | None:
    """The split that a file's or folder's name means: train, validation, test or none.

    With ``alone``, the name must mean nothing else: a folder "test_tube" is a class.

    Example:
        >>> split_of("reviews_test"), split_of("Training"), split_of("test_tube", alone=True)
        ('test', 'train', None)
    """
    words = set(re.findall(r"[a-z]+", name.casefold()))
    for split, known in _WORDS.items():
        if words & set(known) and not (alone and words - {*known, "set", "data", "images", "split"}):
            return split
    return None


def find_column(
    columns: Sequence[str], where: str, what: str, wanted: str | None, usual: Sequence[str], typed: Sequence[str] = ()
) -> str:
    """The column that the user named, else the first with a usual name, else the only one of the right type.

    Raises:
        ValueError: There is none, or several could be meant; the message says ``where`` and calls it ``what``.
    """
    if wanted is not None and wanted not in columns:
        raise ValueError(f"{where}: {what}_column must be one of {list(columns)}, got {wanted!r}")
    known = {column.casefold(): column for column in reversed(columns)}
    found = [wanted] if wanted else [known[name] for name in usual if name in known]
    if not found and len(typed) != 1:
        raise ValueError(f"{where}: no {what} column among {list(columns)}; name it with {what}_column")
    return (found or list(typed))[0]


def train_and_validation(splits: DatasetDict, name: str, seed: int, *, labelled: bool = True) -> DatasetDict:
    """Chooses a split to train on and one to evaluate on; creating one is logged as a warning.

    The evaluation split is the first (labelled) one of validation, valid, val and test. If there is none, a tenth of
    each class in ``train`` is held out; if there is no ``train``, one split serves as both. Unless ``labelled`` is
    False, the column ``label`` becomes a ClassLabel with the classes of ``train`` in both.

    Raises:
        ValueError: Labels are missing, are no classes, or are all the same; the evaluation split has a class that
            ``train`` lacks; or there is too little to hold out.
    """
    usable = {key: split for key, split in splits.items() if split.num_rows}
    if labelled:
        usable = {key: split for key, split in usable.items() if is_labelled(split)}
    if unused := [key for key in EVALUATION_SPLITS if key in splits and splits[key].num_rows and key not in usable]:
        logger.warning("%s: the split %s has no labels and is not used", name, " and ".join(unused))
    if not usable:
        raise ValueError(f"{name!r} has nothing labelled in its splits {sorted(splits)}")
    if "train" in splits and "train" not in usable:
        raise ValueError(f"{name!r} has no {'labels' if splits['train'].num_rows else 'rows'} in its split 'train'")
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
    """At most ``size`` random examples; all if ``size`` is None."""
    if size is None or size >= split.num_rows:
        return split
    shuffled = split.shuffle(seed=seed, keep_in_memory=True)  # or datasets would write the order beside the data
    return shuffled.select(range(size))


def class_names(dataset: Any) -> list[str]:
    """The names of a data set's classes, by number.

    Example:
        >>> class_names(load_image_dataset("digits")["train"])[:2]
        ['0', '1']
    """
    return list(dataset.features["label"].names)


def sorted_classes(names: Iterable[str]) -> list[str]:
    """Each name once, in NFC; whole numbers come first, in their order."""
    return sorted(set(map(_normal, names)), key=_natural)


def is_labelled(split: Dataset) -> bool:
    """Whether any row has a label: public test splits often have no such column, or -1 or nothing in every row."""
    if "label" not in split.column_names:
        return False
    if not isinstance(split.features["label"], (ClassLabel, Value)):
        return True  # lists and the like are an error later, where they are read
    return any(label not in (-1, "-1") and not _is_blank(label) for label in split.unique("label"))


def labelled_rows(split: Dataset, where: str) -> Dataset:
    """The labelled rows of a split with named classes, with a warning: on the Hub, -1 or null means no label."""
    if not isinstance(split.features["label"], ClassLabel) or not {-1, None} & set(split.unique("label")):
        return split
    labels = pc.fill_null(split.select_columns("label").with_format("arrow")[:]["label"], -1).to_numpy()
    unlabelled = np.flatnonzero(labels == -1)
    logger.warning(
        "%s: %d rows without a label are left out, row %d (from 0) first", where, len(unlabelled), unlabelled[0]
    )
    return split.select(np.flatnonzero(labels != -1))


def relabelled(split: Dataset, feature: ClassLabel, codes: Mapping[Any, int]) -> Dataset:
    """The split with other labels, the ``codes`` of the present ones; ``map`` would copy the images.

    Example:
        >>> digits = load_image_dataset("digits")["train"]
        >>> parity = ClassLabel(names=["even", "odd"])
        >>> class_names(relabelled(digits, parity, {digit: digit % 2 for digit in range(10)}))
        ['even', 'odd']
    """
    column = [codes[label] for label in split["label"][:]]
    return split.remove_columns("label").add_column("label", column, feature=feature)


def _is_blank(label: Any) -> bool:
    if isinstance(label, float):
        return not math.isfinite(label)
    return label is None or (isinstance(label, str) and label.strip().casefold() in _BLANK)


def _same_classes(both: DatasetDict, name: str) -> DatasetDict:
    """Gives both splits one ClassLabel: that of ``train``, or one made from its labels."""
    both = DatasetDict({key: labelled_rows(split, f"{name!r}, split {key!r}") for key, split in both.items()})
    found = {key: _classes_by_label(split, f"{name!r}, split {key!r}") for key, split in both.items()}
    feature = both["train"].features["label"]
    names = list(found["train"].values())
    if not isinstance(feature, ClassLabel):
        feature = ClassLabel(names=sorted_classes(names))
    numbers = {_normal(known): number for number, known in enumerate(feature.names)}
    if len(numbers) != len(feature.names):
        twice = next(known for known, count in Counter(map(_normal, feature.names)).items() if count > 1)
        raise ValueError(f"{name!r} gives the name {twice!r} to two classes")
    if len(numbers) < 2:
        raise ValueError(f"{name!r} must have at least 2 classes, got {list(numbers)} alone")
    if unknown := sorted({label for label in found["validation"].values() if label not in numbers}, key=_natural):
        raise ValueError(
            f"{name!r}: the evaluation split has classes that 'train' lacks: {unknown[:5]}; 'train' has "
            f"{list(numbers)[:5]}"
        )
    for key, split in both.items():
        if split.features["label"] != feature:
            both[key] = relabelled(split, feature, {label: numbers[name] for label, name in found[key].items()})
    return both


def _classes_by_label(split: Dataset, where: str) -> dict[Any, str]:
    """The class's name for each value in the column; ValueError if a row has no label, or it is no class."""
    feature = split.features["label"]
    if not isinstance(feature, (ClassLabel, Value)) or not re.match(
        r"u?int|float|bool|(large_)?string", feature.dtype
    ):
        raise ValueError(f"{where}: a label must be one word or whole number, the column holds {feature}")
    labels = split.unique("label")
    names = feature.names if isinstance(feature, ClassLabel) else None
    counted = names is not None or {"0", "0.0"} & {str(label).strip() for label in labels}  # from 0: -1 means none
    for label in labels:
        missing = _is_blank(label) or (counted and label in (-1, "-1"))
        if missing or (names is not None and not 0 <= label < len(names)):
            row = next(row for row, value in enumerate(split["label"]) if value == label or _is_blank(value))
            what = "no label" if missing else "a label that is no class"
            raise ValueError(f"{where}: row {row} (from 0) has {what}, {label!r}; give it one, or leave the row out")
    classes = {label: _normal(str(label if names is None else names[label])) for label in labels}
    if names is None and all(map(_NUMBER.fullmatch, classes.values())):
        if fraction := next((its_class for its_class in classes.values() if not float(its_class).is_integer()), None):
            raise ValueError(f"{where}: a label must be a class, the column holds numbers such as {fraction}")
        classes = {label: its_class.split(".")[0] for label, its_class in classes.items()}
    return classes


def _normal(name: str) -> str:
    """One spelling of a name: Unicode has two for é, and systems differ in which one they use for folders."""
    return unicodedata.normalize("NFC", name).strip()


def _natural(name: str) -> tuple[bool, int, str]:
    number = re.fullmatch(r"[-+]?\d{1,18}", name)
    return (number is None, int(name) if number else 0, name)


def _hold_out(train: Dataset, name: str, seed: int, labelled: bool) -> DatasetDict:
    size = max(round(0.1 * train.num_rows), len(class_names(train)) if labelled else 1)
    if labelled:
        names, counts = class_names(train), Counter(train["label"])
        if rare := [names[number] for number, count in sorted(counts.items()) if count < 2]:
            raise ValueError(
                f"{name!r} is too small to hold out a validation split: each class needs 2 examples, and {rare[:5]} "
                "have one"
            )
    # Of row numbers: of the data set itself, datasets would write its two orders into the folder that it is in.
    rows = Dataset.from_dict({"row": range(train.num_rows)})
    if labelled:
        rows = rows.add_column("label", train["label"][:], feature=train.features["label"])
    try:
        halves = rows.train_test_split(size, seed=seed, stratify_by_column="label" if labelled else None)
    except ValueError as error:
        raise ValueError(f"{name!r} is too small to hold out a validation split: {error}") from error
    return DatasetDict(
        train=train.select(halves["train"]["row"][:]), validation=train.select(halves["test"]["row"][:])
    )
