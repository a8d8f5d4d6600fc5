"""Registers ``optim="powergrad_*"`` with transformers once a program imports it; ``import pgt_hf`` stays fast."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register_with_trainer"]

# Where transformers keeps the names of optimizers, and their handlers; the second imports the first.
_NAMES, _HANDLERS = "transformers.training_args", "transformers.trainer_optimizer"


def register_with_trainer() -> None:
    """Registers now if transformers' handlers are imported, else as soon as they are."""
    if _HANDLERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
        if _NAMES in sys.modules:
            import_module(_HANDLERS)


class _Watch(MetaPathFinder):
    """Finds the two modules as usual, and registers once they have been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in (_NAMES, _HANDLERS):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if name == _HANDLERS:
                    _register()
                else:
                    import_module(_HANDLERS)

            loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    from .trainer.registration import register

    register()
