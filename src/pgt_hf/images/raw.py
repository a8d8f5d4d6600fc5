"""Images as raw pixels: PPM, which any program reads, in Arrow files, which are mapped into memory."""

import re
from pathlib import Path
from typing import Any

import numpy as np

_PPM = re.compile(rb"P6\n(\d+) (\d+)\n255\n")


def ppm(pixels: np.ndarray) -> bytes:
    """The file of uint8 pixels of shape (H, W, 3)."""
    height, width, _ = pixels.shape
    return b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()


def ppm_pixels(file: bytes | memoryview) -> np.ndarray | None:
    """A view of shape (H, W, 3), without a copy; None unless it is a complete file as ``ppm`` writes them."""
    header = _PPM.match(file)
    if header is None:
        return None
    width, height = int(header[1]), int(header[2])
    pixels = np.frombuffer(file, np.uint8, offset=header.end())
    return pixels.reshape(height, width, 3) if pixels.size == 3 * height * width else None


def write_arrow(table: Any, path: Path, rows_at_once: int = 100) -> None:
    """Writes a ``pyarrow.Table`` as a file that ``datasets.Dataset.from_file`` maps into memory."""
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_at_once)


def map_arrow(folder: Path) -> Any:
    """The ``datasets.DatasetDict`` of files named <split>-<number>.arrow; ``load_dataset`` would copy them first."""
    from datasets import Dataset, DatasetDict, concatenate_datasets

    files: dict[str, list[Any]] = {}
    for file in sorted(folder.glob("*.arrow")):
        files.setdefault(file.name.split("-")[0], []).append(Dataset.from_file(str(file)))
    return DatasetDict({split: concatenate_datasets(parts) for split, parts in files.items()})
