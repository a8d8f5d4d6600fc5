"""Atomic checkpoints for any Trainer, and a clean stop on SIGTERM."""

import logging
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from ..runs.environment import command_line

logger = logging.getLogger(__name__)

_SIGTERM_STATUS = 143  # 128 + SIGTERM: a scheduler sees that the run was stopped and is not finished
STAGING = ".unfinished-checkpoint"  # not "checkpoint-<step>": nothing that looks for checkpoints finds it


def latest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint of a run, or None.

    Example:
        >>> latest_checkpoint("runs/imagenet")
        'runs/imagenet/checkpoint-5000'
    """
    return get_last_checkpoint(folder) if Path(folder).is_dir() else None


def find_checkpoint(resume: str | None, output_dir: str | os.PathLike[str]) -> str | None:
    """What a recipe's ``--resume`` means: nothing, a checkpoint, or "auto", the newest one of the run, if any.

    Raises:
        FileNotFoundError: ``resume`` is neither "auto" nor the folder of a checkpoint.

    Example:
        >>> find_checkpoint("auto", "runs/not-yet-started") is None
        True
    """
    if resume in (None, "auto"):
        return latest_checkpoint(output_dir) if resume else None
    if not Path(str(resume), TRAINER_STATE_NAME).is_file():
        raise FileNotFoundError(f"--resume must be 'auto' or the folder of a checkpoint, got {resume!r}")
    return resume


class AtomicCheckpoints(Trainer):
    """Mixin for any Trainer: a ``checkpoint-<step>`` folder appears only when every file in it is on disk.

    A checkpoint is written beside the others under another name, flushed to disk, and renamed when it is complete. A
    process that is killed while it saves leaves ``.unfinished-checkpoint``, which the next save replaces. Older
    checkpoints are deleted (``save_total_limit``) only after the new one is complete.
    """

    _staging = False

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return os.path.join(run, STAGING) if self._staging else run

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.local_process_index == 0:
            shutil.rmtree(run / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self._name_best(run, name)
        self.accelerator.wait_for_everyone()
        # Where nodes share the folder the first of them moves it; each of the others moves what it has of its own.
        if self.args.should_save:
            _publish(run, name)
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0 and (run / STAGING / name).is_dir():
            _publish(run, name)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run), self.args.save_total_limit, best_model_checkpoint=best)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:  # an upload in the background must not read a folder that is about to be renamed
            super()._push_from_checkpoint(checkpoint_folder)

    def _name_best(self, run: Path, name: str) -> None:
        """If this checkpoint is the best, it is recorded under its final name."""
        if self.state.best_model_checkpoint == str(run / STAGING / name):
            self.state.best_model_checkpoint = str(run / name)
            if self.args.should_save:
                self.state.save_to_json(str(run / STAGING / name / TRAINER_STATE_NAME))


class StopOnSigterm(TrainerCallback):
    """On SIGTERM (a pre-empted machine, ``scancel``): finish the step, save a checkpoint, stop.

    All processes stop at the same step, whichever got the signal. ``stopped`` says afterwards that it happened.

    Example:
        >>> stop = StopOnSigterm()
        >>> trainer = PowerGradTrainer(model, args, train_dataset=dataset, callbacks=[stop])
        >>> trainer.train()
        >>> stop.leave(trainer)
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = False
        self._before: Any = None
        self._group: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._before = signal.signal(signal.SIGTERM, self._ask)
        if args.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")  # on the CPU: asking must not wait for a GPU

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._anyone_asked():
            self.stopped = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stopped:  # the epoch was cut short: there is nothing to evaluate, and the checkpoint stands
            control.should_evaluate = control.should_save = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def leave(self, trainer: Trainer) -> None:
        """If the run was stopped, says how to resume it and exits with 143, as SIGTERM does."""
        if not self.stopped:
            return
        if trainer.is_world_process_zero():
            again = command_line(resume="auto")
            print(f"\nStopped by SIGTERM at step {trainer.state.global_step}; resume with: {again}")
        trainer.end()
        sys.exit(_SIGTERM_STATUS)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True

    def _anyone_asked(self) -> bool:
        if self._group is None:
            return self._asked
        asked = torch.tensor(int(self._asked))
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        return bool(asked.item())


def _publish(run: Path, name: str) -> None:
    """Flushes the staged checkpoint and gives it its name, in place of an older one of that name."""
    staged, final = run / STAGING / name, run / name
    for path in [*staged.rglob("*"), staged]:
        _flush(path)
    if final.exists():
        os.rename(final, run / STAGING / "replaced")
    os.rename(staged, final)
    _flush(run)
    shutil.rmtree(run / STAGING, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
