"""What a CPU can rehearse of the GPU's checks in seconds; ``python -m benchmarks.gpu --device cpu --small`` is all."""

import argparse
import json
import subprocess
import sys

import pytest
import torch
from launch import ROOT

from benchmarks import gpu


def test_the_exactness_check_sees_a_wrong_gradient(monkeypatch):
    assert gpu.exact_step("cpu")["largest error"] < 1e-5
    assert gpu.exact_step("cpu", torch.float16)["largest error"] < 2e-2
    monkeypatch.setattr(gpu, "attach_powergrad", lambda model, alpha: None)
    assert gpu.exact_step("cpu")["largest error"] > 0.01


def test_what_fails_is_in_the_results_and_does_not_stop_the_rest(monkeypatch, tmp_path):
    def broken(args: argparse.Namespace):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "PARTS", {"Broken": broken, "Waits": gpu.waits})
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--output", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match="failed"):
        gpu.main()
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["Broken"] == [{"error": "RuntimeError: no such kernel"}] and "skipped" in parts["Waits"][0]
    assert "no such kernel" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_without_a_gpu_it_says_so_in_one_line():
    if not torch.cuda.is_available():
        found = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 1 and found.stderr.startswith("error: torch sees no GPU")
