"""From image files to batches, and the networks that they go into."""

from .._lazy import exports

__getattr__, __all__ = exports(__name__)
