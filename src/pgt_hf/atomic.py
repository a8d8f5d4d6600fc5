"""Files that are replaced in one move: a reader, or a program that was killed, leaves the old one or the new one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden file beside ``path`` to write to, which takes its place when the block ends without an exception.

    Example:
        >>> with replacing("metrics.json") as draft:
        ...     draft.write_text("{}")
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.partial")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
