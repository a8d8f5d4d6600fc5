"""Labelled images from the Hub, a local folder or scikit-learn, always as ``train`` and ``validation``.

Nothing is decided silently: a split that has to be made or used twice is a warning, a data set that may not be read
is an error that says what to do.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset
from datasets.splits import SplitDict, SplitInfo
from datasets.utils.file_utils import xopen
from huggingface_hub import get_token

from ..data.loading import how_to_get, load_dataset, refuse_config
from ..data.splits import EVALUATION_SPLITS, draw, find_column, labelled_rows, train_and_validation
from ..data.tables import in_words
from ..extras import require
from ..limits import Count, DataSet, Seed, checked
from .arrow import arrow_files, map_arrow
from .dataset import read_image, undecoded
from .decoding import BadImageError, read_upright
from .folders import read_local
from .indexed_stream import IndexedStream

logger = logging.getLogger(__name__)

DEFAULT_DATASET = "ILSVRC/imagenet-1k"
DIGITS = "digits"

_IMAGE_COLUMNS = ("image", "img", "image_path", "file_name", "filename", "path")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
_DIGIT_SHARDS = 8
_TRIED = 64  # images or labels, before a split is said to have none that can be read


@checked
def load_image_dataset(
    name: Annotated[str, DataSet(("digits",))] = DEFAULT_DATASET,
    config: str | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    max_train_samples: Count | None = None,
    max_eval_samples: Count | None = None,
    seed: Seed = 0,
    streaming: bool = False,
    allow_outside_files: bool = False,
) -> DatasetDict | dict[str, Any]:
    """Loads labelled images.

    The evaluation split is the first labelled one of validation, valid, val and test. If there is none, a tenth of
    each class is held out of ``train``, drawn by ``seed``; if there is no ``train``, the one split serves as both.
    Either is logged as a warning. With ``streaming`` neither is possible, and both splits must exist.

    Args:
        name: "digits" (1,797 handwritten 8x8 digits inside scikit-learn, a stratified fifth of them for validation),
            a folder with a folder of images for each class (below train, validation, test, if it has splits), a CSV,
            TSV, JSON or Parquet file, a folder of them (named after the splits), a folder that ``datasets`` wrote, or
            a Hub id. Paths in a table are relative to its folder.
        config: The configuration, where a Hub data set has several.
        image_column: The column with the images; by default the only column of images, or image, img, image_path,
            file_name, filename or path.
        label_column: The column with the classes; by default label, labels, fine_label or class.
        max_train_samples: Keep at most this many, drawn by ``seed``; of what is streamed, the first ones.
        max_eval_samples: The same for validation.
        seed: For every draw.
        streaming: Leave the images where they are and read them as training and evaluation go. An evaluation split
            that is not in Parquet files is downloaded, alone, so that it can be indexed; local ones are as without.
        allow_outside_files: Let a table name files that lie outside its own folder.

    Returns:
        ``train`` and ``validation``, each with the columns ``image`` (Image) and ``label`` (ClassLabel, the same names
        in both). Where ``streaming``, ``train`` is an ``IterableDataset``, for ``ImageStream``, and ``validation`` an
        ``IndexedStream``, which is for ``ImageDataset`` as any split is.

    Raises:
        PermissionError: The data set is gated and cannot be read with the present token, if any.
        FileNotFoundError: There is no such folder or data set.
        ConnectionError: The Hub could not be reached.
        ValueError: No image or label column, no image that can be read, a row without a label, a class that
            ``train`` lacks, a path that leads out of its table's folder, or a file that is damaged; the message names
            it. With ``streaming`` also: a split is missing, or the classes have no names.

    Example:
        >>> load_image_dataset("digits")["validation"].num_rows
        360
    """
    name = os.fspath(name)
    cache = Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___"))
    if name == DEFAULT_DATASET and get_token() is None and not Path(name).is_dir() and not cache.is_dir():
        raise PermissionError(how_to_get(name, "no Hugging Face token was found on this machine"))
    local = (_digits(seed), {}) if name == DIGITS else read_local(name)
    if local is not None:
        refuse_config(config, name)
    select = partial(
        _image_and_label,
        name=name,
        image_column=image_column,
        label_column=label_column,
        outside=allow_outside_files,
    )
    limits = {"train": max_train_samples, "validation": max_eval_samples}
    if local is None:
        # Arrow files alone, without what save_to_disk adds.
        arrow = {} if Path(name, "state.json").is_file() else arrow_files(Path(name))
        if streaming:
            return _stream(name, config, select, limits, seed)
        local = (map_arrow(arrow) if arrow else load_dataset(name, config)), {}
    splits, folders = local
    optional = {key: key != "train" and "train" in splits for key in splits}  # an evaluation split may have no labels
    splits = DatasetDict(
        {key: select(split, folder=folders.get(key), optional=optional[key]) for key, split in splits.items()}
    )
    splits = train_and_validation(splits, name, seed)
    for split in splits.values():
        _check_readable(split, name)
    drawn = DatasetDict({key: draw(split, limits[key], seed) for key, split in splits.items()})
    if not streaming:
        return drawn
    rows = drawn["train"].num_rows
    train = drawn["train"].to_iterable_dataset(num_shards=min(_DIGIT_SHARDS, rows))
    return {"train": _with_num_images(train, rows), "validation": drawn["validation"]}


def num_images(dataset: Dataset | IterableDataset | IndexedStream) -> int | None:
    """The number of images; None for a stream whose source does not say.

    Example:
        >>> num_images(load_image_dataset("digits", streaming=True)["train"])
        1437
    """
    if isinstance(dataset, (Dataset, IndexedStream)):
        return dataset.num_rows
    splits = dataset.info.splits or {}
    return splits["train"].num_examples if "train" in splits else None


def _stream(
    name: str, config: str | None, select: Callable[..., Any], limits: Mapping[str, int | None], seed: int
) -> dict[str, Any]:
    splits = load_dataset(name, config, streaming=True)
    held_out = next((key for key in EVALUATION_SPLITS if key in splits and _begins_labelled(splits[key])), None)
    if "train" not in splits or held_out is None:
        raise ValueError(
            f"streaming needs a split `train` and a labelled one of {EVALUATION_SPLITS}; {name!r} has {sorted(splits)}"
        )
    train = select(splits["train"])
    if not isinstance(train.features["label"], ClassLabel):
        raise ValueError(f"streaming needs class names, but the labels of {name!r} are {train.features['label']}")

    files = datasets.load_dataset_builder(name, config).config.data_files
    validation: Any
    if (row_groups := _row_groups(files[held_out])) is not None:
        validation = IndexedStream(select(splits[held_out].reshard()), row_groups, limits["validation"])
    else:  # asked for the split alone, load_dataset would still download every file of the data set
        alone = {held_out: list(files[held_out])}
        options = {"features": splits["train"].features, "verification_mode": "no_checks"}
        validation = select(load_dataset(name, config, data_files=alone, split=held_out, **options))
        validation = draw(labelled_rows(validation, f"{name!r}, split {held_out!r}"), limits["validation"], seed)
    _check_readable(validation, name)

    known = splits["train"].info.splits or {}
    rows = known["train"].num_examples if "train" in known else None
    if rows is None and (row_groups := _row_groups(files["train"])) is not None:
        rows = sum(row_groups)
    if (most := limits["train"]) is not None:
        train, rows = train.take(most), most if rows is None else min(rows, most)
    return {"train": _with_num_images(train, rows), "validation": validation}


def _begins_labelled(split: IterableDataset) -> bool:
    label = next((column for column in _LABEL_COLUMNS if column in (split.column_names or ())), None)
    if label is None:
        return True  # named by the user; what is wrong with it is said where it is read
    return any(row[label] not in (None, -1) for row in islice(split.select_columns([label]), _TRIED))


def _row_groups(files: Sequence[str]) -> list[int] | None:
    """The rows of each row group of Parquet files, from their footers; None for other files, which must be read."""
    if not all(file.endswith(".parquet") for file in files):
        return None
    rows = []
    for path in files:
        with xopen(path, "rb") as file:
            found = pq.read_metadata(file)
        rows += [found.row_group(number).num_rows for number in range(found.num_row_groups)]
    return rows


def _with_num_images(train: IterableDataset, rows: int | None) -> IterableDataset:
    train.info.splits = None if rows is None else SplitDict({"train": SplitInfo("train", num_examples=rows)})
    return train


def _digits(seed: int) -> DatasetDict:
    require("sklearn", "the data set 'digits'")
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None
    # What sklearn.datasets.load_digits reads, in 20 milliseconds; to import that takes up to two seconds.
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    pixels, labels = table[:, :-1], table[:, -1].astype(int)
    images = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # 17 grey levels
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    digits = Dataset.from_dict({"image": list(images), "label": labels.tolist()}, features=features)
    halves = digits.train_test_split(test_size=0.2, stratify_by_column="label", seed=seed)
    return DatasetDict({"train": halves["train"], "validation": halves["test"]})


def _image_and_label(
    split: Any,
    name: str,
    image_column: str | None,
    label_column: str | None,
    folder: Path | None = None,
    *,
    optional: bool = False,
    outside: bool = False,
) -> Any:
    """Of a ``Dataset`` as of an ``IterableDataset``; the image alone where the labels are ``optional`` and absent."""
    if split.features is None:
        raise ValueError("the columns of the stream have no types; write it as Parquet with `datasets` first")
    of_images = [column for column, feature in split.features.items() if isinstance(feature, Image)]
    of_classes = [column for column, feature in split.features.items() if isinstance(feature, ClassLabel)]
    among = split.column_names if image_column else of_images or split.column_names
    where = repr(name)
    columns = {find_column(among, where, "image", image_column, _IMAGE_COLUMNS, of_images): "image"}
    try:
        label = find_column(split.column_names, where, "label", label_column, _LABEL_COLUMNS, of_classes)
        if label in columns:
            raise ValueError(f"{where}: image_column and label_column must be two columns, got {label!r} for both")
        columns[label] = "label"
    except ValueError:
        if not optional:
            raise
    split = split.select_columns(list(columns))
    for old, new in columns.items():
        if old != new:
            split = split.rename_column(old, new)
    return _as_images(split, name, folder or (Path(name) if Path(name).is_dir() else None), outside)


def _as_images(split: Any, name: str, folder: Path | None, outside: bool) -> Any:
    """Bytes and paths of files become images; paths in a local table are relative to its ``folder``."""
    feature = split.features["image"]
    if isinstance(feature, Image):
        return split
    kind = "dict" if isinstance(feature, dict) else str(getattr(feature, "dtype", ""))
    if kind not in ("string", "large_string", "binary", "large_binary", "dict"):
        raise ValueError(f"{name!r}: the column of images must hold images or their paths, it holds {feature}")
    if kind.endswith("string") and folder is not None:
        options = {"folder": str(folder.resolve()), "outside": outside, "name": name}
        if isinstance(split, Dataset):
            _warn_of_copies(split, name)
        split = split.map(_locate, input_columns="image", with_indices=True, fn_kwargs=options)
    try:
        return split.cast_column("image", Image())
    except (TypeError, ValueError, pa.ArrowInvalid) as error:
        raise ValueError(f"{name!r}: the column of images holds {feature}, no images: {in_words(error)}") from error


def _warn_of_copies(split: Dataset, name: str) -> None:
    counts = pc.value_counts(split.with_format("arrow")[:]["image"].drop_null())
    if several := counts.field("values").filter(pc.greater(counts.field("counts"), 1)).to_pylist():
        logger.warning(
            "%s: %d images are named more than once, as %r: in training and in what is held out, perhaps",
            name,
            len(several),
            several[0],
        )


def _check_readable(split: Dataset | IndexedStream, name: str) -> None:
    """Raises BadImageError if none of some images, drawn from all over the split, can be read."""
    first: BadImageError | None = None
    cells = undecoded(split)
    rows = sorted({place * split.num_rows // _TRIED for place in range(_TRIED)})
    for row in rows:
        cell = cells[row].column("image")[0].as_py()
        try:
            read_upright(read_image(cell), shorter_side=1)
            return
        except BadImageError as error:
            first = first or BadImageError(f"image {row} ({cell and cell['path']}): {error}")
    raise BadImageError(f"{name!r}: no image can be read, {len(rows)} were tried: {first}") from first


def _locate(image: str | None, row: int, folder: str, outside: bool, name: str) -> dict[str, str | None]:
    if not image or ("://" in image and "::" not in image and not image.startswith(("file:", "local:"))):
        return {"image": image or None}
    path = os.path.join(folder, image.removeprefix("file://"))  # an absolute path stays as it is
    if ("\\" in image or image != image.strip()) and not os.path.exists(path):
        path = os.path.join(folder, image.strip().replace("\\", "/"))  # written on Windows, or with blanks
    if not (outside or Path(os.path.normpath(path)).is_relative_to(folder) or _is_in(path, folder)):
        raise ValueError(
            f"{name!r}: row {row} (from 0) must name a file in the folder of its table, {folder!r}, got {image!r}; "
            "allow_outside_files lets it name others"
        )
    return {"image": path}


def _is_in(path: str, folder: str) -> bool:
    """Whether it is, by whatever links; asked only where the name alone does not say so."""
    return Path(path).resolve().is_relative_to(folder)
