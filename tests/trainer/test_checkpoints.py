"""Checkpoints: only sound ones are written and used, whatever happens to the run, its disk and its files."""

import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small import DAMAGE, Images, build
from transformers import TrainerCallback

from pgt_hf import ImageTrainer
from pgt_hf.manifest import MANIFEST, find_damage
from pgt_hf.trainer import CheckpointError, DivergenceCallback, StopOnSigterm, find_checkpoint, latest_checkpoint
from pgt_hf.trainer.checkpoint_folders import SET_ASIDE, list_checkpoints, remove_checkpoint, rotate
from pgt_hf.trainer.checkpoints import STAGING

pytestmark = pytest.mark.slow

STEPS = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("run")
    build(folder, **STEPS, max_steps=4, ema_decay=0.9).train()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def names(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run)]


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_file_is_named_and_auto_takes_the_checkpoint_before(run, damage, caplog):
    newest = run / "checkpoint-4"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert {"model.safetensors", "ema/model.safetensors", "optimizer.pt", "scheduler.pt"} <= set(map(str, files))
    for file in files:
        sound = (newest / file).read_bytes()
        damage(newest / file)
        if file.name != MANIFEST:
            with pytest.raises(ValueError, match=f"checkpoint-4 is damaged: {file}"):
                find_checkpoint(str(newest), run)
        caplog.clear()
        assert find_checkpoint("auto", run) == str(run / "checkpoint-2")
        assert f"passed over checkpoint-4: {file}" in caplog.text
        (newest / file).write_bytes(sound)
    assert find_checkpoint("auto", run) == str(newest)


def test_run_without_a_sound_checkpoint_is_not_started_again_silently(run):
    for name in names(run):
        (run / name / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be resumed from \(checkpoint-4: opt"):
        find_checkpoint("auto", run)


def test_checkpoint_of_another_program_is_used_with_a_warning(run, caplog):
    (run / "checkpoint-4" / MANIFEST).unlink()
    assert find_checkpoint(str(run / "checkpoint-4"), run)
    assert "damage to it cannot be noticed" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"norm_free": False}}, "weights 4"),
        ({"optim": "powergrad_adamw", "optim_args": None}, "optimizer SGD, here AdamW"),
        ({"ema_decay": None}, r"averaged weights \(ema_decay\) True, here False"),
    ],
)
def test_another_network_optimizer_or_average_is_an_error_in_words(run, settings, message):
    with pytest.raises(ValueError, match=f"checkpoint-4 cannot be resumed from, .*{message}"):
        build(run, **STEPS | {"ema_decay": 0.9} | settings).train(resume_from_checkpoint="auto")


@pytest.mark.parametrize(
    "schedule", [{"schedule": "cosine"}, pytest.param({"lr_scheduler_type": "linear"}, marks=pytest.mark.long)]
)
def test_resuming_with_another_rate_and_decay_uses_them(tmp_path, schedule):
    build(tmp_path, **STEPS, **schedule, max_steps=2, weight_decay=0.05).train()
    settings = STEPS | schedule | {"learning_rate": 0.001, "weight_decay": 0.1, "logging_steps": 1}
    trainer = build(tmp_path, **settings, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates and max(rates) <= 0.001
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.1}


def test_loss_of_a_resumed_run_is_that_of_the_whole_run(tmp_path):
    logs = []
    for folder, parts in (("whole", [10]), ("cut", [4, 10])):
        for steps in parts:
            trainer = build(tmp_path / folder, **STEPS, max_steps=steps, lr_scheduler_type="constant")
            output = trainer.train(resume_from_checkpoint=steps == 10 and len(parts) == 2)
        history = trainer.state.log_history
        assert output.training_loss == history[-1]["train_loss"]
        logs.append([(entry["step"], entry.get("loss"), entry.get("train_loss")) for entry in history])
    whole, cut = logs
    losses = [[entry[1] for entry in log if entry[1]] for log in logs]
    assert [entry[0] for entry in cut if entry[1]] == [3, 6, 9]
    assert cut[-1][2] == pytest.approx(whole[-1][2], rel=1e-5)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


class AskAt(TrainerCallback):
    """Sends SIGTERM to this process in a step, or in the evaluation after one."""

    def __init__(self, step: int, evaluating: bool) -> None:
        self.step, self.evaluating, self.batches = step, evaluating, 0

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.evaluating and state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_prediction_step(self, args, state, control, **kwargs):
        self.batches += 1
        if self.evaluating and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "evaluating", [pytest.param(False, marks=pytest.mark.long), True], ids=["in the step", "in the evaluation"]
)
def test_evaluation_that_sigterm_cut_short_is_made_up_for(tmp_path, evaluating):
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "per_device_eval_batch_size": 4, "ema_decay": 0.9}
    stop = StopOnSigterm()
    trainer = build(tmp_path, **settings, callbacks=[AskAt(5, evaluating), stop])
    trainer.train()
    assert stop.stopped and trainer.state.global_step == 5
    assert names(tmp_path) == ["checkpoint-5"]
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)
    resumed, whole = build(tmp_path, **settings), build(tmp_path / "whole", **settings)
    resumed.train(resume_from_checkpoint="auto")
    whole.train()
    evaluations = [
        [
            (entry["step"], entry["eval_loss"], entry["eval_ema_loss"])
            for entry in trainer.state.log_history
            if "eval_loss" in entry
        ]
        for trainer in (resumed, whole)
    ]
    assert evaluations[0] == evaluations[1] and [entry[0] for entry in evaluations[0]] == [5, 10]


class Spoilt(Images):
    """Sound images, and from one on, images that hold NaN."""

    def __getitem__(self, index: int) -> dict:
        example = super().__getitem__(index)
        example["pixel_values"] = example["pixel_values"].float() / 255
        if self.epoch == 1 and index == 3:
            example["pixel_values"][0, 0, 0] = math.nan
        return example


def test_one_spoilt_image_leaves_the_good_checkpoints_and_resuming_starts_from_them(tmp_path):
    guard = DivergenceCallback()
    trainer = build(tmp_path, **STEPS, data=Spoilt(), save_total_limit=1, callbacks=[guard])
    trainer.train()
    assert guard.verdict == "divergence"
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]  # known to be good, and the newest
    for kept in list_checkpoints(tmp_path):
        assert all(value.isfinite().all() for value in load_file(kept / "model.safetensors").values())
    resumed = build(tmp_path, **STEPS, callbacks=[guard])
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 10 and guard.verdict is None


def test_run_that_diverges_is_resumed_before_it_did_so(tmp_path):
    """The rate is far too high from the sixth step on; the weights stay finite for a while."""

    class Raise(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step >= 5:
                for group in optimizer.param_groups:
                    group["lr"] = 30.0

    guard = DivergenceCallback(interval=4)
    settings = STEPS | {"save_steps": 1, "save_total_limit": 2, "lr_scheduler_type": "constant", "max_steps": 40}
    trainer = build(tmp_path, **settings, callbacks=[Raise(), guard])
    trainer.train()
    assert guard.verdict == "divergence"
    auto = latest_checkpoint(tmp_path)
    assert auto is not None and int(auto.rsplit("-", 1)[1]) <= 6
    with pytest.raises(
        SystemExit, match=r"The last good checkpoint is checkpoint-\d.*--learning-rate 0.0025 --resume auto"
    ):
        guard.leave(trainer)
    resumed = build(tmp_path, **settings | {"learning_rate": 0.0025}, callbacks=[guard])
    resumed.train(resume_from_checkpoint="auto")
    assert guard.verdict is None and resumed.state.global_step == 40


def test_resuming_from_an_earlier_checkpoint_leaves_the_later_ones_but_auto_does_not_mix_them(run):
    build(run, **STEPS, ema_decay=0.9, max_steps=3).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert (run / "checkpoint-4" / SET_ASIDE).read_text() == "the run was resumed from step 2\n"
    assert latest_checkpoint(run) == str(run / "checkpoint-3")


def test_rotation_never_leaves_half_a_checkpoint_under_its_name(run, monkeypatch):
    def killed(path, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **kwargs: None if not Path(path).exists() else killed(path))
        with pytest.raises(KeyboardInterrupt):
            remove_checkpoint(run / "checkpoint-2")
    assert names(run) == ["checkpoint-4"] and find_damage(run / "checkpoint-4") is None
    rotate(run, 1, keep=lambda path: False)
    assert sorted(path.name for path in run.iterdir() if "checkpoint" in path.name) == ["checkpoint-4"]


def test_full_disk_is_one_error_that_says_what_is_safe(tmp_path):
    """A limit on the size of files stands for the full disk: writes fail in the middle of a file."""
    program = (
        "import pathlib, resource, sys; sys.path.insert(0, sys.argv[2])\n"
        "import small\n"
        "from pgt_hf.programs import errors_in_one_line\n"
        "from pgt_hf.trainer import CheckpointError\n"
        "from transformers import TrainerCallback\n"
        "class Full(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **kwargs):\n"
        "        if state.global_step == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)\n"
        "settings = dict(save_strategy='steps', save_steps=2)\n"
        "with errors_in_one_line(CheckpointError):\n"
        "    small.build(pathlib.Path(sys.argv[1]), callbacks=[Full()], **settings).train()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent), "1000000"]
    done = subprocess.run(command, timeout=240, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert last.startswith("error: checkpoint-4 could not be written") and "checkpoint-2 in " in last
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / STAGING).exists()


def test_checkpoint_that_was_cut_short_is_never_found_and_the_next_one_replaces_it(tmp_path):
    class DiskFull(ImageTrainer):
        def _save_rng_state(self, output_dir):
            if self.state.global_step == 4:
                raise OSError(28, "No space left on device")
            super()._save_rng_state(output_dir)

    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    trainer = build(tmp_path, **settings)
    trainer.__class__ = DiskFull
    with pytest.raises(CheckpointError, match="No space left on device. checkpoint-2 in .* is safe"):
        trainer.train()
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    build(tmp_path, **settings, max_steps=4).train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (tmp_path / STAGING).exists()


def test_best_checkpoint_is_kept_and_known_by_its_own_name(tmp_path):
    trainer = build(
        tmp_path,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        learning_rate=0.5,  # diverges: the first checkpoint is the best
        max_steps=6,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    assert Path(best).is_dir()


def test_process_that_is_killed_while_it_saves_leaves_only_complete_checkpoints(tmp_path):
    program = (
        "import os, signal, sys, pathlib; sys.path.insert(0, sys.argv[2])\n"
        "import small as t\n"
        "class Killed(t.ImageTrainer):\n"
        "    def _save_optimizer_and_scheduler(self, folder):\n"
        "        if self.state.global_step == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        super()._save_optimizer_and_scheduler(folder)\n"
        "trainer = t.build(pathlib.Path(sys.argv[1]), save_strategy='steps', save_steps=2, save_total_limit=1)\n"
        "trainer.__class__ = Killed\n"
        "trainer.train()\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent)], timeout=240)
    assert run.returncode == -signal.SIGKILL
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "optimizer.pt" in os.listdir(tmp_path / "checkpoint-2")
