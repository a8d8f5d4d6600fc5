"""Trainer with PGT: its arguments, two trainers, and callbacks for any Trainer."""

import transformers.trainer_optimizer  # noqa: F401  its import registers our optimizers with it

from .._lazy import exports

__getattr__, __all__ = exports(__name__)
