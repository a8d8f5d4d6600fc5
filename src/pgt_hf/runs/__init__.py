"""A run's folder: what is written into it, what is read from it, its report."""

from .._lazy import exports

__getattr__, __all__ = exports(__name__)
