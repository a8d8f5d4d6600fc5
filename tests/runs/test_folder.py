"""What a run leaves behind, apart from what the recipes' own tests look at."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

import pgt_hf
from pgt_hf.runs import RunFolder, command_line, describe_data, describe_environment, package_versions


def test_no_token_reaches_the_run_folder_or_the_command_that_is_shown(tmp_path, monkeypatch):
    arguments = {"alpha": 0.25, "hub_token": "hf_canary", "push_to_hub": True}
    record = RunFolder(tmp_path, {"arguments": arguments, "seed": 1})
    record.on_train_begin(
        SimpleNamespace(world_size=1), SimpleNamespace(is_world_process_zero=True, log_history=[], global_step=0), None
    )
    written = (tmp_path / "run.json").read_text()
    assert "canary" not in written
    assert json.loads(written)["arguments"] == {"alpha": 0.25, "push_to_hub": True}
    command = ["imagenet.py", "--hub-token", "hf_canary", "--alpha", "0.3", "--hub_token=hf_canary", "--bf16"]
    monkeypatch.setattr(sys, "argv", command)
    assert command_line() == "imagenet.py --alpha 0.3 --bf16"


def test_run_that_is_resumed_with_other_settings_says_which(tmp_path, caplog):
    def begin(step: int, processes: int = 1, **arguments) -> str:
        caplog.clear()
        state = SimpleNamespace(is_world_process_zero=True, log_history=[], global_step=step)
        record = RunFolder(tmp_path, {"arguments": {"workers": 2, "betas": (0.9, 0.99)} | arguments})
        record.on_train_begin(SimpleNamespace(world_size=processes), state, None)
        return caplog.text

    assert not begin(0) and not begin(4)
    assert "workers was 2, is 3; processes was 1, is 2" in begin(4, processes=2, workers=3)
    assert not begin(0, workers=5)  # a new run in an old folder


def test_data_set_from_the_hub_is_known_by_its_revision():
    sha = "0123456789abcdef0123456789abcdef01234567"
    info = SimpleNamespace(download_checksums={f"hf://datasets/a/b@{sha}/data/train-00000.parquet": {}})
    split = SimpleNamespace(num_rows=3, _fingerprint="f", info=info)
    assert describe_data("a/b", {"train": split}) == {
        "name": "a/b",
        "train": {"images": 3, "fingerprint": "f"},
        "revision": sha,
    }


def test_environment_is_that_of_this_interpreter():
    found = describe_environment(2)
    packages = package_versions()
    assert (found["processes"], found["packages"]) == (2, packages)
    assert (packages["torch"], packages["timm"]) == (torch.__version__.partition("+")[0], timm.__version__)


@pytest.mark.slow
def test_code_is_known_by_its_commit_and_whether_it_was_changed(tmp_path):
    package = Path(shutil.copytree(Path(pgt_hf.__file__).parent, tmp_path / "pgt_hf"))
    program = "from pgt_hf.runs import describe_code; import json; print(json.dumps(describe_code()))"

    def described() -> dict:
        told = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(told.stdout)

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    assert described() == {}  # no checkout
    git("init", "-q")
    (tmp_path / ".gitignore").write_text("__pycache__\n")
    git("add", ".")
    git("commit", "-qm", "all")
    assert described() == {"commit": git("rev-parse", "HEAD"), "modified": False}
    (package / "loss.py").write_text("")
    assert described()["modified"] is True
