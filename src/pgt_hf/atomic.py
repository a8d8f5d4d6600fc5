"""Atomic writes: a file is replaced as a whole, even if the program is killed."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing", "warn_if_unwritten"]

logger = logging.getLogger(__name__)


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
def warn_if_unwritten(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError into a warning, for what training can do without, such as a plot on a full disk.

    Example:
        >>> with warn_if_unwritten("training_curve.png"):
        ...     figure.savefig("training_curve.png")
    """
    try:
        yield
    except OSError as error:
        logger.warning("%s could not be written, training goes on: %s", path, error)
