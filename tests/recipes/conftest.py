"""How the tests start a recipe without the seconds that a process of its own takes to import everything."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from launch import run_here


@pytest.fixture
def here(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., None]:
    """Runs the test module's ``RECIPE``, with the flags that it is given, in this process and in ``tmp_path``."""
    return partial(run_here, request.module.RECIPE, cwd=tmp_path)
