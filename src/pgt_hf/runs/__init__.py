"""A run's folder: writing it, reading it, reporting on it."""

from .._lazy import exports

__getattr__, __all__ = exports(__name__)
