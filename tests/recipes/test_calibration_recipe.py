"""``recipes/calibration.py``: its table, its picture, and what it does not do twice."""

import csv
import io
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from filelock import FileLock
from launch import ROOT, run_here
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.slow

RECIPE = str(ROOT / "recipes" / "calibration.py")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A short run of the recipe, and a second one with more alphas in the same folder."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("calibration")
    small = ["--image-size", "16", "--epochs", "1", "--max-train-samples", "128", "--max-eval-samples", "100"]
    printed = []
    for alphas in (["0.25"], ["1", "0.25"]):
        with redirect_stdout(io.StringIO()) as out:
            run_here(RECIPE, "--output-dir", "out", "--seeds", "0", *small, "--alphas", *alphas, cwd=folder)
        printed.append(out.getvalue())
    return folder / "out", printed


def test_calibration_recipe_writes_table_and_diagrams(recipe):
    folder, printed = recipe
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    kinds = [(float(row["alpha"]), row["probabilities"]) for row in rows]
    assert kinds == [(1, "raw"), (1, "fitted"), (0.25, "raw"), (0.25, "folded"), (0.25, "fitted")]
    assert (folder / "table.md").read_text() in printed[1]
    assert (folder / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_calibration_recipe_scores_what_the_saved_logits_say(recipe):
    with np.load(recipe[0] / "alpha-0.25-seed-0" / "logits.npz") as saved:
        logits, labels = torch.from_numpy(saved["logits"]), torch.from_numpy(saved["labels"])
    with (recipe[0] / "table.csv").open() as file:
        found = {row["probabilities"]: float(row["nll"]) for row in csv.DictReader(file) if row["alpha"] == "0.25"}
    assert found["raw"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["folded"] == pytest.approx(cross_entropy(0.25 * logits, labels).item(), rel=1e-5)


def test_calibration_recipe_trains_nothing_twice(recipe):
    first, second = recipe[1]
    assert first.count("trained 2 steps") == 1
    assert second.count("trained 2 steps") == 1  # alpha = 1 alone


def test_calibration_recipe_does_not_overwrite_the_logits_of_other_settings(recipe):
    file = recipe[0] / "alpha-0.25-seed-0" / "logits.npz"
    before = file.read_bytes()
    with pytest.raises(SystemExit, match="learning_rate=0.05, now 0.1; "):
        run_here(RECIPE, "--output-dir", "out", "--learning-rate", "0.1", cwd=recipe[0].parent)
    assert file.read_bytes() == before


def test_second_calibration_in_the_folder_of_a_running_one_is_refused(here, tmp_path):
    with FileLock(tmp_path / ".run.lock"), pytest.raises(SystemExit, match="another run is active in "):
        here("--smoke", "--output-dir", ".")


def test_alpha_that_is_not_allowed_stops_the_recipe_before_anything_is_written(here, tmp_path):
    with pytest.raises(SystemExit, match=r"error: --alphas must be a number in \[0, 1\], got -1.0"):
        here("--alphas", "1", "-1")
    assert not list(tmp_path.iterdir())
