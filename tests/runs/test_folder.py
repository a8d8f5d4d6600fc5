"""What a run leaves behind, apart from what the recipes' own tests look at."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from launch import TWO, run
from tiny import Data, arguments, wrapper
from transformers import PrinterCallback

from pgt_hf import PowerGradTrainer
from pgt_hf.atomic import WriteError
from pgt_hf.runs import (
    RunFolder,
    command,
    command_line,
    describe_code,
    describe_data,
    describe_environment,
    package_versions,
)
from pgt_hf.trainer import Progress


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
    assert command_line().endswith("python imagenet.py --alpha 0.3 --bf16")


def test_record_that_cannot_be_written_is_one_line_and_what_is_there_stays(tmp_path):
    record = RunFolder(tmp_path, {"arguments": {}, "seed": 1})
    state = SimpleNamespace(is_world_process_zero=True, log_history=[], global_step=0)
    record.on_train_begin(SimpleNamespace(world_size=1), state, None)
    (tmp_path / ".run.json.partial").mkdir()  # in the way of what is written first
    with pytest.raises(WriteError, match=r"run.json could not be written to .*: .*Is a directory.* --resume auto"):
        record.on_train_begin(SimpleNamespace(world_size=1), state, None)
    assert len(list(tmp_path.glob("previous/*/run.json"))) == 1


def test_flags_of_the_command_that_is_shown_can_be_replaced(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", shlex.split("x.py --resume auto --decay_epochs 3 -1 --alpha=0.3 --output_dir a --bf16")
    )
    shown = command_line(alpha=1, output_dir="a b", resume=None, decay_epochs=None)
    assert shown.endswith("python x.py --bf16 --alpha 1 --output-dir 'a b'")


@pytest.mark.slow
def test_command_that_is_shown_starts_as_many_processes_the_same_way(tmp_path):
    program = "import accelerate; from pgt_hf.runs import command_line\n"
    program += "accelerate.Accelerator().print(command_line(seed=1))"
    (tmp_path / "my program.py").write_text(program)
    shown = run(*TWO, "my program.py", "--seed", "0", cwd=tmp_path).stdout
    settings, _, command = shown.strip().partition(" ")
    words = shlex.split(command)
    assert settings == "ACCELERATE_USE_CPU=true" and words[0].endswith("accelerate")
    assert words[1:] == ["launch", *TWO[3:], "my program.py", "--seed", "1"]


def test_programs_that_the_shell_would_not_find_get_their_path(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert command("pgt-hf", "plot", "a b") == f"{Path(sys.executable).with_name('pgt-hf')} plot 'a b'"
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert command("python", "a b") == "python 'a b'"


def test_run_without_a_step_is_no_result(tmp_path):
    with pytest.raises(ValueError, match="per_device_train_batch_size must be at most 4, .* got 8"):
        PowerGradTrainer(wrapper(), arguments(tmp_path, ours=True, dataloader_drop_last=True), train_dataset=Data(4))
    trainer = PowerGradTrainer(wrapper(), arguments(tmp_path, ours=True), train_dataset=Data(4))
    record = RunFolder(tmp_path / "run", {})
    with pytest.raises(RuntimeError, match="no step was taken"):
        record.finish(trainer, {"eval_top1": 0.5})
    assert not (tmp_path / "run").exists()
    trainer.add_callback(record)
    trainer.train()
    assert record.finish(trainer, {"eval_top1": 0.5})["batch"] == 4  # not 8: there are no more images


def test_run_that_is_resumed_with_other_settings_says_which(tmp_path, caplog):
    def begin(step: int, processes: int = 1, **arguments) -> str:
        caplog.clear()
        state = SimpleNamespace(is_world_process_zero=True, log_history=[], global_step=step)
        record = RunFolder(tmp_path, {"arguments": {"workers": 2, "betas": (0.9, 0.99)} | arguments})
        record.on_train_begin(SimpleNamespace(world_size=processes), state, None)
        return caplog.text

    assert not begin(0) and not begin(4)
    assert "workers was 2, is 3; processes was 1, is 2" in begin(4, processes=2, workers=3)
    assert "other settings" not in begin(0, workers=5)  # a new run in an old folder


def test_progress_is_a_line_for_each_evaluation_and_says_how_long_it_takes(tmp_path, capsys):
    trainer = PowerGradTrainer(
        wrapper(), arguments(tmp_path, ours=True, eval_strategy="epoch"), train_dataset=Data(), eval_dataset=Data(8),
        compute_metrics=lambda predicted: {"top1": 0.25, "nll": 1.0, "ece_folded": 0.1},
        callbacks=[Progress],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"epoch 2 +loss 1\.\d+  top-1 25\.00%", lines[-2]), lines
    assert re.fullmatch(r"step 1/8  loss 1\.\d+  \d\d:\d\d passed, \d\d:\d\d left", lines[0]), lines
    assert lines[-1].startswith("trained 8 steps in 00:") and len(lines) == 8 + 2 + 1


def test_data_set_from_the_hub_is_known_by_its_revision():
    sha = "0123456789abcdef0123456789abcdef01234567"
    info = SimpleNamespace(download_checksums={f"hf://datasets/a/b@{sha}/data/train-00000.parquet": {}})
    split = SimpleNamespace(num_rows=3, info=info)
    assert describe_data("a/b", {"train": split}) == {
        "name": "a/b",
        "train": {"images": 3, "fingerprint": None},
        "revision": sha,
    }


def test_environment_is_that_of_this_interpreter():
    found = describe_environment(2)
    packages = package_versions()
    assert (found["processes"], found["packages"]) == (2, packages)
    assert (packages["torch"], packages["timm"]) == (torch.__version__.partition("+")[0], timm.__version__)


def test_code_is_known_by_its_commit_and_whether_it_was_changed(tmp_path):
    file = Path(shutil.copy(describe_code.__globals__["__file__"], tmp_path / "here.py"))
    spec = importlib.util.spec_from_file_location("here", file)
    here = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(here)

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    assert here.describe_code() == {}  # no checkout
    git("init", "-q")
    git("add", "here.py")
    git("commit", "-qm", "all")
    (tmp_path / ".git" / "info" / "exclude").write_text("__pycache__\n")
    assert here.describe_code() == {"commit": git("rev-parse", "HEAD"), "modified": False}
    file.write_text("")
    assert here.describe_code()["modified"] is True
