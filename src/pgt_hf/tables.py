"""Local tables as people have them: CSV, TSV, JSON and Parquet files, one or a folder of them, by split."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
from datasets import Dataset, DatasetDict, NamedSplit, concatenate_datasets
from datasets.table import InMemoryTable

from .splits import logger, split_of

__all__ = ["TABLES", "by_split", "in_words", "read_table", "read_tables", "visible_files"]

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_BLOCK = 1 << 26  # bytes; a text must fit into one


def visible_files(folder: Path) -> list[Path]:
    """All files below ``folder`` in order, without what systems leave there: .DS_Store, __MACOSX, Thumbs.db."""
    return sorted(
        path
        for path in folder.rglob("*")
        if not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        and path.name not in ("Thumbs.db", "desktop.ini")
        and path.is_file()
    )


def by_split(files: Iterable[Path], root: Path) -> dict[str, list[Path]]:
    """Files by the split that their names say. A single file that names none is ``train``, where no other is.

    Raises:
        ValueError: Several name no split, and there is no ``train``.
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
                f"{str(root)!r}: which of {names} is for training? Name them after splits, as train.csv, or give one"
            )
        found["train"] = others
    elif others:
        logger.warning("%s: %s not used, no split has such a name", root, ", ".join(file.name for file in others))
    return found


def read_tables(files: dict[str, list[Path]]) -> DatasetDict:
    """A split of the files' rows, in order.

    Raises:
        ValueError: A file cannot be read, or two of one split have other columns; it is named.
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
    return splits


def read_table(path: Path) -> Dataset:
    """The rows of one file; the cells of CSV and TSV are strings, as they were written.

    Raises:
        ValueError: It is empty, damaged, not UTF-8, or names a column twice; the message names the file.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            return Dataset.from_parquet(str(path))
        table = pa.Table.from_pydict(_read_json(path)) if kind in (".json", ".jsonl") else _read_csv(path)
    except (
        pa.ArrowInvalid,
        pa.ArrowTypeError,
        UnicodeDecodeError,
        ValueError,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {in_words(error)}") from error
    if not table.num_rows:
        raise ValueError(f"{str(path)!r} has no rows")
    return Dataset(InMemoryTable(table))


def in_words(error: BaseException) -> str:
    """What lies under an exception of `datasets`, on one line."""
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
        header = text.readline().rstrip("\r\n")
        for _ in iter(lambda: text.read(_BLOCK), ""):  # Arrow does not say where bytes are not UTF-8
            pass
    if not header.strip():
        raise ValueError("it is empty" if not start else "its first line, which names the columns, is blank")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=header.count)
    names = [name.strip().strip('"').strip() for name in header.split(delimiter)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"its header names {sorted(twice)[0]!r} twice")
    return pyarrow.csv.read_csv(
        path,
        pyarrow.csv.ReadOptions(
            block_size=_BLOCK, encoding=encoding.removesuffix("-sig"), column_names=names, skip_rows=1
        ),
        pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
    )


def _read_json(path: Path) -> dict[str, list[Any]]:
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
                    raise ValueError(f"line {number} is no JSON object, {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("it must hold a list of objects, or an object on each line")
    columns = dict.fromkeys(key for row in rows for key in row)
    return {column: [row.get(column) for row in rows] for column in columns}
