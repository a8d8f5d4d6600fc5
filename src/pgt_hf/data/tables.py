"""Local tables: a CSV, TSV, JSON or Parquet file, or a folder of them, by split."""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
from datasets import Dataset, DatasetDict, NamedSplit, concatenate_datasets
from datasets.table import InMemoryTable

from .splits import logger, split_of

__all__ = ["TABLES", "by_split", "in_words", "is_visible", "read_table", "read_tables", "visible_files"]

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_BLOCK = 1 << 26  # bytes; the longest possible cell
_LEFT_BY_SYSTEMS = (
    *("__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin", "system volume information"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini"),
)
_SPLIT_COLUMNS = ("split", "subset", "partition", "set", "data set", "data_set", "dataset")


def visible_files(folder: Path) -> list[Path]:
    """All files below ``folder``, sorted, without hidden ones and those of systems, such as Thumbs.db.

    Links are followed, except upwards; a broken link counts as a file, which cannot be read.

    Raises:
        OSError: A folder cannot be read.
        ValueError: A name is not UTF-8.
    """
    return list(_files_below(folder, ()))


def is_visible(name: str) -> bool:
    """Whether a file or folder of this name is neither hidden nor a system's."""
    return not name.startswith(".") and name.casefold() not in _LEFT_BY_SYSTEMS


def _files_below(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if not is_visible(entry.name):
            continue
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{os.fsencode(entry.path)!r}: the name is not UTF-8; rename it") from None
        if entry.is_dir():
            yield from _files_below(Path(entry.path), (*above, real))
        elif entry.is_file() or not os.path.exists(entry.path):
            yield Path(entry.path)


def by_split(files: Iterable[Path], root: Path) -> dict[str, list[Path]]:
    """Files by the split in their names; a single file without one is ``train`` if no other is.

    Raises:
        ValueError: Several files name no split, and none is ``train``.
    """
    found: dict[str, list[Path]] = {}
    others: list[Path] = []
    for file in files:
        split = split_of(file.stem)
        (others if split is None else found.setdefault(split, [])).append(file)
    if others and "train" not in found:
        if len(others) > 1:
            names = ", ".join(repr(file.name) for file in others)
            raise ValueError(
                f"{str(root)!r}: which of {names} is for training? Name them after splits (train.csv), or give one"
            )
        found["train"] = others
    elif others:
        logger.warning("%s: %s not used: the name means no split", root, ", ".join(file.name for file in others))
    return found


def read_tables(files: dict[str, list[Path]]) -> DatasetDict:
    """The files' rows by split. If there is only ``train``, a column may name each row's split.

    Raises:
        ValueError: A file cannot be read, or two of one split differ in their columns; the message names it.
    """
    splits = DatasetDict()
    for split, paths in files.items():
        tables = [read_table(path) for path in paths]
        for path, table in zip(paths, tables, strict=True):
            if table.column_names != tables[0].column_names:
                raise ValueError(
                    f"{str(path)!r} has the columns {table.column_names}, {paths[0].name!r} has "
                    f"{tables[0].column_names}, and both are for {split!r}"
                )
        splits[split] = concatenate_datasets(tables, split=NamedSplit(split))
    if list(splits) != ["train"]:
        return splits
    try:
        return _by_column(splits["train"])
    except ValueError as error:
        raise ValueError(f"{str(files['train'][0])!r}: {error}") from error


def _by_column(table: Dataset) -> DatasetDict:
    """Splits a table that has a column with the names of splits."""
    for column in table.column_names:
        if column.casefold() in _SPLIT_COLUMNS:
            known = {value: split_of(str(value), alone=True) for value in table.unique(column)}
            named, others = [[value for value in known if bool(known[value]) is yes] for yes in (True, False)]
            if named and others:
                raise ValueError(
                    f"the column {column!r} names splits, such as {named[0]!r}, and also {others[0]!r}: give each row "
                    "one of train, validation and test, or the column another name"
                )
            if named:
                logger.warning("the rows are split as the column %r says", column)
                rows: dict[str, list[int]] = {}
                for row, value in enumerate(table[column]):
                    rows.setdefault(str(known[value]), []).append(row)
                return DatasetDict({split: table.select(indices) for split, indices in rows.items()})
    return DatasetDict({"train": table})


def read_table(path: Path) -> Dataset:
    """The rows of one file; cells of CSV and TSV stay strings.

    Raises:
        ValueError: It is empty, damaged, not UTF-8, or has two columns of one name; the message names the file.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            return Dataset.from_parquet(str(path))
        table = _read_json(path) if kind in (".json", ".jsonl") else _read_csv(path)
    except (pa.ArrowException, csv.Error, RecursionError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {in_words(error)}") from error
    if not table.num_rows:
        raise ValueError(f"{str(path)!r} has no rows")
    return Dataset(InMemoryTable(table))


def in_words(error: BaseException) -> str:
    """The cause of an exception of ``datasets``, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"it holds byte 0x{byte:02x}, which is not UTF-8; convert it, as with iconv -f latin1 -t utf-8"
    return " ".join(str(error).split())


def _read_csv(path: Path) -> pa.Table:
    with open(path, "rb") as file:
        start = file.read(4)
    encoding = "utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    with open(path, encoding=encoding, newline="") as text:
        header = text.readline()
        if not header.strip():
            raise ValueError("its first line, which names the columns, is blank" if start else "it is empty")
        tabs = path.suffix.lower() == ".tsv" and "\t" in header
        if "\0" in header:
            raise ValueError("it holds zero bytes, which text has not; convert UTF-16 and UTF-32 to UTF-8 with iconv")
        delimiter = "\t" if tabs else max(",;\t|", key=header.count)
        text.seek(0)
        rows = csv.reader(text, delimiter=delimiter, skipinitialspace=True)
        names = [name.strip() for name in next(rows)]
        for _ in iter(lambda: text.read(_BLOCK), ""):  # Arrow does not say where bytes are not UTF-8
            pass
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"its header names {sorted(twice)[0]!r} twice")
    return pyarrow.csv.read_csv(
        path,
        pyarrow.csv.ReadOptions(
            block_size=_BLOCK, encoding=encoding.removesuffix("-sig"), column_names=names, skip_rows=rows.line_num
        ),
        pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
    )


def _read_json(path: Path) -> pa.Table:
    text = path.read_text(encoding="utf-8-sig")
    rows: Any
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is no JSON object: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("it must hold a list of objects, or an object on each line")
    columns: dict[str, Any] = dict.fromkeys(key for row in rows for key in row)
    for column in columns:
        try:
            columns[column] = pa.array([row.get(column) for row in rows])
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"its column {column!r} mixes types: {error}") from None
    return pa.Table.from_pydict(columns)
