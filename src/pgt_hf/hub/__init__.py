"""From a run to the Hub, and back."""

from .._lazy import exports

__getattr__, __all__ = exports(__name__)
