"""Atomic writes: a file is replaced as a whole or not at all, even if the program is killed."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing", "warn_on_failure"]

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
def warn_on_failure(what: str) -> Iterator[None]:
    """Turns any error into a warning of one line, for plots and reports, which must not stop training."""
    try:
        yield
    except Exception as error:
        logger.warning("%s was not written: %s: %s", what, type(error).__name__, " ".join(str(error).split()))
