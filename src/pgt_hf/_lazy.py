"""Imports a package's names on first use. The names are in its ``__init__.pyi``, for type checkers as well."""

import ast
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from .extras import missing

__all__ = ["exports", "no_collection"]


def exports(package: str) -> tuple[Callable[[str], Any], list[str]]:
    """``__getattr__`` and ``__all__`` of a package, from its stub."""
    module = sys.modules[package]
    stub = ast.parse(Path(str(module.__file__)).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    homes = {name.name: "." * node.level + str(node.module) for node in imports for name in node.names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            with no_collection():  # it finds nothing in an import, and takes a sixth of the time
                value = getattr(import_module(homes[name], package), name)
        except ModuleNotFoundError as error:
            raise missing(error.name, f"{package}.{name}") from error
        setattr(module, name, value)
        return value

    return get, sorted(homes)


@contextmanager
def no_collection() -> Iterator[None]:
    """Pauses garbage collection, unless it is off already."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
