"""Folders of Arrow files, which are mapped into memory: where raw pixels are kept."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict, concatenate_datasets

_FILE = re.compile(
    r"(?!cache-)(.*-)??(?P<split>(?!of-)[a-z]\w*)(-(?P<number>\d+)(-of-(?P<count>\d+))?)?\.arrow", re.IGNORECASE
)
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream that was closed


def write_arrow(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    """Writes tables of that schema, each a record batch, as a file that ``datasets.Dataset.from_file`` maps."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for table in tables:
            writer.write_table(table)


def arrow_files(folder: Path) -> dict[str, list[Path]]:
    """The files <split>-<number>-of-<count>.arrow (or <split>-<number>.arrow) of a folder, by split.

    Those that ``datasets`` keeps beside them, cache-<hash>.arrow, are none of them.

    Raises:
        ValueError: A split lacks some of its files.
    """
    found: dict[str, list[re.Match[str]]] = {}
    for file in sorted(file.name for file in folder.glob("*.arrow")):
        if name := _FILE.fullmatch(file):
            found.setdefault(name["split"].lower(), []).append(name)
    for split, names in found.items():
        counts = {int(name["count"] or 0) for name in names}  # 0 where the names do not say it
        numbers = {int(name["number"] or 0) for name in names}
        if counts != {0} and (counts != {len(names)} or numbers != set(range(len(names)))):
            raise ValueError(f"{folder} must have {max(counts)} files of its split {split!r}, it has {len(names)}")
    return {split: [folder / name[0] for name in names] for split, names in found.items()}


def map_arrow(files: Mapping[str, Sequence[Path]]) -> DatasetDict:
    """What ``arrow_files`` found, mapped into memory; ``load_dataset`` would copy it first.

    Raises:
        ValueError: A file is truncated or damaged in its structure. Its pixels are not read.
    """
    return DatasetDict(
        {split: concatenate_datasets([_mapped(file) for file in parts]) for split, parts in files.items()}
    )


def _mapped(file: Path) -> Dataset:
    with open(file, "rb") as stream:
        stream.seek(max(0, file.stat().st_size - len(_END)))
        if stream.read() != _END:  # pyarrow would take what is there, if it ends with a batch
            raise ValueError(f"{file} is truncated, or no file of Arrow's streaming format")
    try:
        dataset = Dataset.from_file(str(file))
        dataset.data.validate(full=True)  # a wrong offset would end the process when it is read
    except Exception as error:  # a damaged schema raises exceptions of any kind
        raise ValueError(f"{file} is damaged: {error}") from error
    return dataset
