"""Labelled images from the Hub, a local folder or scikit-learn, always as ``train`` and ``validation``.

Nothing is decided silently: a split that has to be made or used twice is a warning, a data set that may not be read
is an error that says what to do.
"""

import logging
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import get_token

from .image_dataset import ImageDataset, ImageStream

__all__ = [
    "DEFAULT_DATASET",
    "DIGITS",
    "GATED",
    "ImageDataset",
    "ImageStream",
    "check_access",
    "class_names",
    "load_image_dataset",
]

logger = logging.getLogger(__name__)

DEFAULT_DATASET = "ILSVRC/imagenet-1k"
DIGITS = "digits"
GATED = (DEFAULT_DATASET,)

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_SEEN = "the accuracy reported is that of images seen in training"
_EVALUATION_SPLITS = ("validation", "valid", "val", "test")


def load_image_dataset(
    name: str = DEFAULT_DATASET,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
) -> DatasetDict:
    """Loads labelled images.

    The evaluation split is the first labelled one of validation, valid, val and test. Where there is none, a tenth of
    each class is held out of ``train``, drawn by ``seed``; where there is no ``train``, the one split serves as both.
    Either is logged as a warning.

    Args:
        name: "digits" (1,797 handwritten 8x8 digits inside scikit-learn, a stratified fifth of them for validation),
            a folder of Parquet files or of images as ``datasets`` lays them out, or a Hub id.
        image_column: The column with the images; by default image or img, or the only column of images.
        label_column: The column with the classes; by default label, labels or fine_label.
        max_train_samples: Keep so many training images, drawn by ``seed``.
        max_eval_samples: The same for validation.
        seed: For every draw.

    Returns:
        ``train`` and ``validation``, each with the columns ``image`` (Image) and ``label`` (ClassLabel, the same names
        in both).

    Raises:
        PermissionError: The data set is gated and cannot be read with the present token, if any.
        FileNotFoundError: There is no such folder or data set.
        ConnectionError: The Hub could not be reached.
        ValueError: No image or label column, no labelled images, or labels that differ between the splits.

    Example:
        >>> load_image_dataset("digits")["validation"].num_rows
        360
    """
    check_access(name)
    splits = _digits(seed) if name == DIGITS else _load(name)
    splits = DatasetDict({key: _image_and_label(split, image_column, label_column) for key, split in splits.items()})
    splits = _train_and_validation(splits, name, seed)
    limits = {"train": max_train_samples, "validation": max_eval_samples}
    return DatasetDict({key: _draw(split, limits[key], seed) for key, split in splits.items()})


def check_access(name: str) -> None:
    """Looks, without the network, whether a gated data set could be read at all.

    Raises:
        PermissionError: It is gated, not in the local cache, and there is no token; the message says how to get one.

    Example:
        >>> check_access("digits")
    """
    if name in GATED and not Path(name).is_dir() and get_token() is None and not _is_cached(name):
        raise PermissionError(_how_to_get(name, "no Hugging Face token was found on this machine"))


def class_names(dataset: Dataset) -> list[str]:
    """The names of the classes in the order of their numbers.

    Example:
        >>> class_names(load_image_dataset("digits")["train"])[:2]
        ['0', '1']
    """
    return list(dataset.features["label"].names)


def _how_to_get(name: str, reason: str) -> str:
    return (
        f"{name!r} is a gated data set, and {reason}. To get it:\n"
        f"  1. log in and accept its terms at https://huggingface.co/datasets/{name}\n"
        "  2. make a token with read access at https://huggingface.co/settings/tokens\n"
        "  3. run `hf auth login`, or set HF_TOKEN to the token\n"
        "Or use other data: --dataset-name digits, a local folder of Parquet files or images, or another Hub id."
    )


def _is_cached(name: str) -> bool:
    return (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()


def _load(name: str) -> DatasetDict:
    try:
        return datasets.load_dataset(name)
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            reason = "the present token has no access to it" if get_token() else "no token was found"
            raise PermissionError(_how_to_get(name, reason)) from error
        raise FileNotFoundError(
            f"{name!r} is neither a local folder nor a data set on the Hub that can be read"
        ) from error
    except ConnectionError as error:
        raise ConnectionError(
            f"{name!r} is neither a local folder nor in the cache, and the Hub could not be reached: {error}"
        ) from error


def _digits(seed: int) -> DatasetDict:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # 17 grey levels
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    digits = Dataset.from_dict({"image": list(images), "label": labels.tolist()}, features=features)
    halves = digits.train_test_split(test_size=0.2, stratify_by_column="label", seed=seed)
    return DatasetDict({"train": halves["train"], "validation": halves["test"]})


def _image_and_label(split: Dataset, image_column: str | None, label_column: str | None) -> Dataset:
    of_images = [column for column, feature in split.features.items() if isinstance(feature, Image)]
    of_classes = [column for column, feature in split.features.items() if isinstance(feature, ClassLabel)]
    image = _find_column(split, "image", image_column, _IMAGE_COLUMNS, of_images)
    label = _find_column(split, "label", label_column, _LABEL_COLUMNS, of_classes)
    split = split.select_columns([image, label])
    for old, new in ((image, "image"), (label, "label")):
        if old != new:
            split = split.rename_column(old, new)
    return split if isinstance(split.features["image"], Image) else split.cast_column("image", Image())


def _find_column(split: Dataset, what: str, wanted: str | None, usual: tuple[str, ...], typed: list[str]) -> str:
    if wanted is not None and wanted not in split.column_names:
        raise ValueError(f"{what}_column must be one of {split.column_names}, got {wanted!r}")
    found = [wanted] if wanted else [column for column in usual if column in split.column_names]
    if not found and len(typed) != 1:
        raise ValueError(f"no {what} column among {split.column_names}; name it with {what}_column")
    return (found or typed)[0]


def _train_and_validation(splits: DatasetDict, name: str, seed: int) -> DatasetDict:
    labelled = {key: split for key, split in splits.items() if _is_labelled(split)}
    if not labelled:
        raise ValueError(f"{name!r} has no labelled images in its splits {sorted(splits)}")
    train = labelled.get("train")
    held_out = next((labelled[key] for key in _EVALUATION_SPLITS if key in labelled), None)
    if train is None:
        held_out = held_out if held_out is not None else next(iter(labelled.values()))
        train = held_out
        logger.warning("%s has no split `train`: one split serves for training and evaluation; %s", name, _SEEN)
    both = _same_classes(train, train if held_out is None else held_out, name)
    if held_out is not None:
        return both
    logger.warning("%s has no labelled validation or test split: a tenth of `train` is held out (seed %d)", name, seed)
    return _hold_out(both["train"], name, seed)


def _hold_out(train: Dataset, name: str, seed: int) -> DatasetDict:
    size = max(round(0.1 * train.num_rows), len(class_names(train)))
    try:
        halves = train.train_test_split(test_size=size, stratify_by_column="label", seed=seed)
    except ValueError as error:
        raise ValueError(f"{name!r} is too small to hold out a validation split: {error}") from error
    return DatasetDict({"train": halves["train"], "validation": halves["test"]})


def _is_labelled(split: Dataset) -> bool:
    """Public test splits often have -1, or nothing, for every label."""
    if not split.num_rows:
        return False
    first = pc.min(split.data.column("label")).as_py()
    return first is not None and first != -1


def _same_classes(train: Dataset, validation: Dataset, name: str) -> DatasetDict:
    """Gives both splits one ClassLabel, made from the labels that occur where the data set names none."""
    both = DatasetDict({"train": train, "validation": validation})
    feature = train.features["label"]
    if not isinstance(feature, ClassLabel):
        seen = sorted({label for split in both.values() for label in split.unique("label")})
        if isinstance(seen[-1], int):
            seen = list(range(seen[-1] + 1))
        feature = ClassLabel(names=[str(label) for label in seen])
        return DatasetDict({key: split.cast_column("label", feature) for key, split in both.items()})
    if validation.features["label"] != feature:
        raise ValueError(
            f"the splits of {name!r} name different classes: {feature} and {validation.features['label']}"
        )
    return both


def _draw(split: Dataset, size: int | None, seed: int) -> Dataset:
    if size is None or size >= split.num_rows:
        return split
    if size < 1:
        raise ValueError(f"a number of samples must be at least 1, got {size}")
    return split.shuffle(seed=seed).select(range(size))
