"""Metrics, calibration, what PGT does to a network, comparisons, and pictures of all that."""

from .._lazy import exports

__getattr__, __all__ = exports(__name__)
