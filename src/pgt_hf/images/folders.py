"""Images on this machine: a table that names them, or a folder for each class; by split where there are splits."""

import logging
from collections.abc import Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, NamedSplit

from ..data.splits import sorted_classes, split_of
from ..data.tables import TABLES, by_split, is_visible, read_tables, visible_files
from .decoding import SUFFIXES

logger = logging.getLogger(__name__)

_ARCHIVES = (".7z", ".gz", ".rar", ".tgz", ".zip")


def read_local(name: str) -> tuple[DatasetDict, dict[str, Path]] | None:
    """A table, a folder of tables, or one of images by class, and where its splits lie; None for all else.

    Raises:
        ValueError: A file cannot be read, or it cannot be told what is a class and what a split; the file is named.
    """
    path = Path(name)
    if path.is_file():
        if path.suffix.lower() not in TABLES:
            raise ValueError(f"a file of images must be one of {', '.join(TABLES)}, got {name!r}; or name a folder")
        splits = read_tables({"train": [path]})
        return splits, dict.fromkeys(splits, path.parent)
    if not path.is_dir():
        return None
    files = visible_files(path)
    kinds = {file.suffix.lower() for file in files}
    if kinds & {".parquet", ".arrow", ".tar"}:
        return None
    if tables := _tables_in(path, files):
        splits = read_tables(tables)
        parents = {split: part[0].parent for split, part in tables.items()}
        return splits, {split: parents.get(split, path) for split in splits}
    archives = [file.name for file in files if file.suffix.lower() in _ARCHIVES]
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not images:
        unpack = f"; unpack {archives[0]!r} first" if archives else ""
        raise ValueError(f"{name!r} holds no images, and no CSV, TSV, JSON-lines or Parquet files{unpack}")
    if archives:
        logger.warning("%s: archives are not read, as %s", name, archives[0])
    known = {*images, *(file for file in files if file.suffix.lower() in _ARCHIVES)}
    if others := [file for file in files if file not in known and file.parent != path]:
        logger.warning("%s: files that are no images are not used, %d of them, as %s", name, len(others), others[0])
    return _images_by_class(path, images), {}


def _tables_in(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Tables that lie in the folder itself, else in folders named after splits."""
    found = [file for file in files if file.suffix.lower() in (".csv", ".tsv", ".jsonl")]
    if here := [file for file in found if file.parent == folder]:
        return by_split(here, folder)
    below = [(split_of(file.parent.name, alone=True), file) for file in found if file.parent.parent == folder]
    return {split: [file] for split, file in below if split is not None}


def _images_by_class(root: Path, images: list[Path]) -> DatasetDict:
    """A folder for each class; below folders that are named after the splits, if there are any."""
    by_folder: dict[str, list[Path]] = {}
    for file in images:
        by_folder.setdefault(file.relative_to(root).parts[0], []).append(file)
    splits = {
        folder: split for folder in by_folder if (split := split_of(folder, alone=True)) and (root / folder).is_dir()
    }
    if len(by_folder) == 1 and not splits and len(images[0].relative_to(root).parts) > 2:
        return _images_by_class(root / next(iter(by_folder)), images)  # as archives often unpack
    others = [folder for folder in by_folder if folder not in splits]
    if others and all(len(file.relative_to(root).parts) == 2 for file in images):
        splits = {}  # a class may be called "train", too
    if splits and others:
        raise ValueError(f"{str(root)!r} has folders named after splits, {sorted(splits)}, and others: {others[:5]}")
    if len(set(splits.values())) < len(splits):
        raise ValueError(f"{str(root)!r} has several folders for one split: {sorted(splits)}")
    parts = {split: (by_folder[folder], root / folder) for folder, split in splits.items()}
    return DatasetDict(
        {
            split: _class_folders(*part, split, optional=split != "train" and "train" in parts)
            for split, part in (parts or {"train": (images, root)}).items()
        }
    )


def _class_folders(images: list[Path], folder: Path, split: str, *, optional: bool) -> Dataset:
    """The images below a folder, with their classes; without, if these are ``optional`` and none has one."""
    name = NamedSplit(split)
    parts = [file.relative_to(folder).parts for file in images]
    stray = [file for file, part in zip(images, parts, strict=True) if len(part) == 1]
    if stray and not (optional and len(stray) == len(images)):
        raise ValueError(
            f"{str(stray[0])!r} must lie in a folder of its class, and it lies directly in {folder.name!r}"
        )
    if stray:
        features = Features({"image": Image()})
        return Dataset.from_dict({"image": [str(file) for file in images]}, features=features, split=name)
    deep = {part[-2] for part in parts if len(part) > 2}
    if len(deep) > 1:
        file = next(file for file, part in zip(images, parts, strict=True) if len(part) > 2)
        raise ValueError(
            f"{str(file)!r}: is its class {file.relative_to(folder).parts[0]!r} or {file.parent.name!r}? Images must "
            f"lie in folders of their class directly below {str(folder)!r}"
        )
    label = ClassLabel(names=sorted_classes(part[0] for part in parts))
    codes = {part[0]: label.str2int(sorted_classes(part[:1]))[0] for part in parts}
    folders = sorted(place.name for place in folder.iterdir() if place.is_dir() and is_visible(place.name))
    if empty := [place for place in folders if place not in codes]:
        logger.warning("%s: there are no images in %s, which are no classes then", folder, empty[:5])
    features = Features({"image": Image(), "label": label})
    rows = {"image": [str(file) for file in images], "label": [codes[part[0]] for part in parts]}
    return Dataset.from_dict(rows, features=features, split=name)
