"""Atomic writes: a file is replaced as a whole or not at all, even if the program is killed."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["WriteError", "replacing", "warn_on_failure", "why_not_written"]

logger = logging.getLogger(__name__)


class WriteError(OSError):
    """A file that a run needs could not be written; programs end with this error's line, which says what is safe."""


def why_not_written(error: BaseException, folder: str | os.PathLike[str]) -> str:
    """The reason for a failed write, in one line; not every library says that the disk is full."""
    words = " ".join(str(error).split())
    with suppress(OSError):
        if not isinstance(error, OSError) and shutil.disk_usage(folder).free < 1 << 20:
            return f"No space left on device ({words})"
    return words


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path``, which replaces it when the block ends without an exception.

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


@contextmanager
def warn_on_failure(what: str) -> Iterator[None]:
    """Turns any error into a warning of one line, for plots and reports, which must not stop training."""
    try:
        yield
    except Exception as error:
        logger.warning("%s was not written: %s: %s", what, type(error).__name__, " ".join(str(error).split()))
