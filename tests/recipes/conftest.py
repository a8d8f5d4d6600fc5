"""How the tests start a recipe without the seconds that a process of its own takes to import everything."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def here(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the test module's ``RECIPE`` in this process, with the flags that it is given, in ``tmp_path``."""
    recipe = request.module.RECIPE
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def start(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [recipe, *arguments])
        runpy.run_path(recipe, run_name="__main__")

    return start
