"""``AtomicCheckpoints``: for any Trainer, checkpoints that are complete, finite and verified."""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from ..atomic import WriteError, why_not_written
from ..data.workers import guard_workers
from ..guard import ALPHA_KEY
from ..limits import WrongRunError
from ..manifest import MANIFEST, read_manifest, write_manifest
from .checkpoint_folders import find_checkpoint, rotate, set_aside, step_of, usable_checkpoints
from .stopping import EvaluationStopped

logger = logging.getLogger(__name__)

STAGING = ".unfinished-checkpoint"  # not "checkpoint-<step>": nothing that looks for checkpoints finds it
_STAGED_MODEL = ".unfinished-model"
_NOT_SETTINGS = ("params", "initial_lr", ALPHA_KEY)  # alpha has rules of its own, see ``keep_asked_alpha``


class CheckpointError(WriteError):
    """A checkpoint could not be written; the message says which one is safe."""


class AtomicCheckpoints(Trainer):
    """Mixin for any Trainer: only complete checkpoints of finite models are saved, and only undamaged ones resumed.

    - A ``checkpoint-<step>`` folder appears when all of it is on disk, with a manifest of sizes and checksums. A
      process that is killed while it saves leaves ``.unfinished-checkpoint``, which the next save replaces.
    - A model whose weights or optimizer state are not finite is not saved. Older checkpoints are deleted
      (``save_total_limit``) only after the new one is complete, and never the newest one that a
      ``DivergenceCallback`` has found to be good.
    - Resuming verifies the checkpoint against its manifest, and ``resume_from_checkpoint=True`` or "auto" takes the
      newest sound one. It must be of the same network and optimizer. The learning rate and the optimizer's settings
      are those of the arguments; an evaluation that was due is made up for; ``train_loss`` is that of the whole run.

    Raises:
        CheckpointError: In training: a checkpoint could not be written.
        ValueError: When resuming: no checkpoint is sound, or it is of another model or optimizer.

    Example:
        >>> class SafeTrainer(AtomicCheckpoints, Trainer): ...
        >>> SafeTrainer(model, args, train_dataset=dataset).train(resume_from_checkpoint="auto")
    """

    _staging = False
    _failure: str | None = None
    _resumed_from: str | None = None
    _kept: Mapping[str, Any] = {}
    _asked: list[dict[str, Any]] | None = None  # the optimizer's settings before the first step

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        found = find_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        if found is None and resume_from_checkpoint is True:
            raise ValueError(f"there is no checkpoint in {self.args.output_dir} to resume from")
        self._resumed_from = found
        self._kept = read_manifest(found) if found and Path(found, MANIFEST).is_file() else {}
        if not any(isinstance(callback, _Resume) for callback in self.callback_handler.callbacks):
            self.add_callback(_Resume(self))
        output = super().train(found, *args, **kwargs)
        return output._replace(training_loss=self._mean_loss())

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        return guard_workers(super()._get_dataloader(*args, **kwargs))

    # --- saving

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return os.path.join(run, STAGING) if self._staging else run

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if not all(gather_object([self._is_finite()])):
            if self.is_world_process_zero():
                logger.warning("%s was not saved: the weights or the optimizer's state are not finite", name)
            return
        kept = {"made_with": self._made_with(), "asked": self._asked, "progress": self._progress()}
        if self.args.local_process_index == 0:
            shutil.rmtree(run / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._failure = None
        with temporarily(self, _staging=True), self._noting_failure():
            super()._save_checkpoint(model, trial)
        with self._noting_failure():
            self._name_best(run, name)
        self._stop_if_failed(run, name)
        # Where nodes share the folder, the first one moves it; where they do not, each moves its own.
        for mine in (self.args.should_save, self.args.local_process_index == 0):
            if mine and (run / STAGING / name).is_dir():
                with self._noting_failure():
                    write_manifest(run / STAGING / name, **kept)
                    _publish(run, name)
            self._stop_if_failed(run, name)
        if self.args.should_save:
            rotate(run, self.args.save_total_limit, keep=self._protected(run, name))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        target = Path(output_dir or str(self.args.output_dir))
        folder = target if self._staging else target / _STAGED_MODEL
        with self._noting_failure():
            super().save_model(str(folder), _internal_call=True)
            self._save_more(folder)
        if self._staging:
            return
        self._stop_if_failed(target, "the model")
        if self.args.should_save:
            for path in [path for path in folder.rglob("*") if path.is_file()]:
                _flush(path)
                final = target / path.relative_to(folder)
                final.parent.mkdir(exist_ok=True)
                path.replace(final)
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_more(self, folder: Path) -> None:
        """For a subclass: saves what belongs to the model beside its weights."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._noting_failure():
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        with self._noting_failure():
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with self._noting_failure():
            super()._save_rng_state(output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:  # an upload in the background must not read a folder that is about to be renamed
            super()._push_from_checkpoint(checkpoint_folder)

    def _name_best(self, run: Path, name: str) -> None:
        """If this checkpoint is the best, it is recorded under its final name."""
        if self.state.best_model_checkpoint == str(run / STAGING / name):
            self.state.best_model_checkpoint = str(run / name)
            if self.args.should_save:
                self.state.save_to_json(str(run / STAGING / name / TRAINER_STATE_NAME))

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        """Remembers an error of writing: this process must go on, or the others would wait for it for ever."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            self._failure = self._failure or why_not_written(error, str(self.args.output_dir))

    def _stop_if_failed(self, run: Path, what: str) -> None:
        failures = [failure for failure in gather_object([self._failure]) if failure]
        if not failures:
            return
        if self.args.local_process_index == 0:
            for staged in (STAGING, _STAGED_MODEL):
                shutil.rmtree(run / staged, ignore_errors=True)
        safe = usable_checkpoints(run)
        safe_text = (
            f"{safe[-1].name} in {run} is safe: resume from it"
            if safe
            else "No checkpoint was saved before: start again"
        )
        raise CheckpointError(f"{what} could not be written to {run}: {failures[0]}. {safe_text} once this is fixed")

    def _saved_tensors(self) -> list[Tensor]:
        """What a checkpoint saves and must be finite."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for state in getattr(self.optimizer, "state", {}).values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return tensors

    def _is_finite(self) -> bool:
        local = (getattr(tensor, "_local_tensor", tensor).detach() for tensor in self._saved_tensors())
        finite = [tensor.isfinite().all().to(self.args.device) for tensor in local if tensor.is_floating_point()]
        return not finite or bool(torch.stack(finite).all())

    def _protected(self, run: Path, name: str) -> Any:
        """A test for checkpoints that must not be deleted: the one just saved, the best, the last known good."""
        seen = [getattr(callback, "last_sound_step", None) for callback in self.callback_handler.callbacks]
        sound = max((step for step in seen if step is not None), default=None)
        good = [path.name for path in usable_checkpoints(run) if sound is not None and step_of(path) <= sound]
        protected = {name, Path(self.state.best_model_checkpoint or "").name, *good[-1:]}
        return lambda checkpoint: checkpoint.name in protected

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        with temporarily(self.args, save_total_limit=None):  # Trainer's own deleting is not atomic
            return super()._finalize_training(*args, **kwargs)

    # --- resuming

    def _made_with(self) -> dict[str, Any]:
        """What a run must have in common with a checkpoint to resume from it."""
        weights = self.model.state_dict()
        layout = [(name, tuple(tensor.shape)) for name, tensor in weights.items()]
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        return {
            "network": type(self.model).__name__,
            "weights": sum(tensor.numel() for tensor in weights.values()),
            "layout": f"{zlib.crc32(repr(layout).encode()):08x}",
            "optimizer": type(optimizer).__name__,
            "parameter groups": [len(group["params"]) for group in optimizer.param_groups],
        }

    def _check_fits(self, checkpoint: str) -> None:
        if not self._kept or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        before, now = self._kept.get("made_with", {}), self._made_with()
        wrong = [key for key in before if before[key] != now.get(key)]
        if wrong:
            known = [key for key in wrong if key not in ("layout", "parameter groups")] or wrong
            found = ", ".join(f"{key} {before[key]}, here {now.get(key)}" for key in known)
            raise WrongRunError(
                f"{checkpoint} cannot be resumed from, it was made by another run ({found}). Give the options of that "
                "run, or start a new one from its weights"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads the states, but keeps the optimizer's settings, such as the rate, that were changed for this run."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self._check_fits(checkpoint)
        self._asked = _settings(self.optimizer.param_groups)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{checkpoint} does not fit this run: {error}") from error
        before = self._kept.get("asked", [])
        groups = self.optimizer.param_groups
        for group, old, now in zip(groups, before, self._asked, strict=False):
            changed = {key: value for key, value in now.items() if key in old and old[key] != value}
            if (rate := changed.pop("lr", None)) is not None:
                group["lr"] *= rate / old["lr"] if old["lr"] else 1.0
                group["initial_lr"] = rate
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in changed.items()})
        if before and hasattr(self.lr_scheduler, "base_lrs"):
            self.lr_scheduler.base_lrs = [group["initial_lr"] for group in groups]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # a finished run, of which Trainer would take another step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # --- evaluation, and the loss of the whole run

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationStopped:
            self._save_checkpoint(model, trial)
            self.control.should_training_stop = True

    def _evaluation_was_due(self) -> bool:
        state, strategy = self.state, self.args.eval_strategy
        by_steps = strategy == IntervalStrategy.STEPS and state.global_step % max(state.eval_steps, 1) == 0
        by_epoch = strategy == IntervalStrategy.EPOCH and float(state.epoch or 0.5).is_integer()
        done = any(
            entry.get("step") == state.global_step and any(key.startswith("eval_") for key in entry)
            for entry in state.log_history
        )
        return (by_steps or by_epoch) and not done

    def _progress(self) -> dict[str, Any]:
        """Sums of the loss so far; a collective call."""
        pending = gather_object([self._tr_loss.item()])
        return {
            "loss": self._total_loss_scalar,
            "pending": sum(pending) / len(pending),
            "logged": self._globalstep_last_logged,
        }

    def _mean_loss(self) -> float:
        return self._total_loss_scalar / max(self.state.global_step, 1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "train_loss" in logs:
            logs["train_loss"] = self._mean_loss()
        super().log(logs, *args, **kwargs)


class _Resume(TrainerCallback):
    """When a run is resumed: restores the sums of its loss, and makes up for an evaluation that was due."""

    def __init__(self, trainer: AtomicCheckpoints) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer._resumed_from is None:
            trainer._asked = _settings(trainer.optimizer.param_groups)
            return
        if trainer.is_world_process_zero():
            set_aside(args.output_dir, state.global_step, f"the run was resumed from step {state.global_step}")
        if trainer._kept:
            progress = trainer._kept.get("progress", {})
            trainer._total_loss_scalar = progress.get("loss", 0.0)
            trainer._tr_loss += progress.get("pending", 0.0)
            trainer._globalstep_last_logged = progress.get("logged", state.global_step)
        if trainer._evaluation_was_due():
            metrics = trainer._evaluate(None, None, skip_scheduler=True)
            trainer._determine_best_metric(metrics, None)


@contextmanager
def temporarily(target: Any, **attributes: Any) -> Iterator[None]:
    """Gives an object other attributes within a block."""
    before = {name: getattr(target, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def _settings(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings of an optimizer's groups as JSON has them, with the rate that the schedule starts from."""
    asked = [group | {"lr": group.get("initial_lr", group["lr"])} for group in groups]
    plain = (bool, int, float, str, list, tuple, type(None))
    kept = [
        {key: value for key, value in group.items() if key not in _NOT_SETTINGS and isinstance(value, plain)}
        for group in asked
    ]
    return json.loads(json.dumps(kept))


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
