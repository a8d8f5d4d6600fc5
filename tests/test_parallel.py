"""PGT under every way to distribute a model, on two CPU processes, against the formula."""

from pathlib import Path

import pytest
from launch import TWO, run
from parallel_program import CASES


@pytest.mark.slow
def test_every_way_to_distribute_a_model_has_the_formulas_gradients(tmp_path):
    done = run(*TWO, str(Path(__file__).parent / "parallel_program.py"), cwd=tmp_path)
    assert [line for line in done.stdout.splitlines() if "passed" in line] == [f"passed {name}" for name in CASES]
