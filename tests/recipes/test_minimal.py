import re
from pathlib import Path

import pytest
from launch import ROOT, TWO, run

pytestmark = pytest.mark.slow

MINIMAL = str(ROOT / "recipes" / "minimal.py")


def test_minimal_loop_learns_digits_in_two_processes(tmp_path):
    printed = run(*TWO, MINIMAL, cwd=tmp_path).stdout
    accuracy = re.findall(r"test accuracy ([\d.]+)% of 360 images", printed)
    assert len(accuracy) == 1
    assert float(accuracy[0]) > 90


def test_three_marked_lines_are_all_that_sets_minimal_apart_from_a_plain_loop():
    lines = Path(MINIMAL).read_text().splitlines()
    marked = [line for line in lines if re.search(r"# PGT \d", line)]
    using = [line for line in lines if "powergrad" in line.lower() and not line.lstrip().startswith(("#", '"'))]
    assert len(marked) == len(using) == 3
