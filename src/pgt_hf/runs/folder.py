"""Writes a run's folder: which code, which data, which seed, which result."""

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..atomic import WriteError, replacing, warn_on_failure, why_not_written
from ..limits import check_type, checked
from .environment import describe_code, describe_environment
from .record import CONFIG, CONTENTS, CURVE, EVALUATION, HISTORY, RECORD, RESULTS, read_record

if TYPE_CHECKING:
    from ..analysis.predictions import Evaluation

logger = logging.getLogger(__name__)

PREVIOUS = "previous"  # in a run's folder: the runs that were in it before
_LOCK = ".run.lock"
_ENDING = 5.0  # seconds to wait for a process that is about to end, such as one whose launcher was killed
_claimed: dict[Path, FileLock] = {}

_TIMING = ("runtime", "per_second", "preparation_time", "epoch")


class RunFolder(TrainerCallback):
    """Keeps the record of a run in its folder; only the first process writes.

    It writes ``run.json`` before the first step, ``history.jsonl`` and ``training_curve.png`` during training, and
    ``metrics.json`` in ``finish``. A resumed run continues ``history.jsonl`` from the checkpoint; other arguments, or
    another number of processes, are a warning. A new run moves an old one in its folder to ``previous/<its start>``.
    A file that cannot be written during training is a warning.

    Args:
        path: The folder, ``args.output_dir``.
        description: JSON values for ``run.json``, such as ``{"arguments": {...}, "data": {...}}``. Code and
            environment are added; arguments that hold a token are left out.
        title: The title of the curve.

    Raises:
        RuntimeError: When training starts: another program is running in the folder.
        ValueError: When training is resumed: the data has changed.

    Example:
        >>> record = RunFolder("runs/imagenet", {"arguments": {"alpha": 0.25}, "seed": 0}, title="ResNet-50")
        >>> trainer = PowerGradTrainer(model, args, train_dataset=dataset, callbacks=[record])
    """

    def __init__(self, path: str | os.PathLike[str], description: Mapping[str, Any], title: str | None = None) -> None:
        self.path = Path(path)
        arguments = description.get("arguments", {})
        public = {key: value for key, value in arguments.items() if not key.endswith("token")}
        self.description = dict(description) | {"arguments": public}
        self.title = title
        self._started = time.perf_counter()
        self._written = 0  # entries in history.jsonl
        self._checked = False

    def check_resume(self, checkpoint: str | None, allow_changed_data: bool = False) -> None:
        """Raises ValueError if the data differs from that of the run to resume; training does this later.

        Args:
            checkpoint: The checkpoint to resume from; None compares nothing.
            allow_changed_data: Only warn.
        """
        self._checked = True
        changes = self._changed_data() if checkpoint else []
        if changes and not allow_changed_data:
            raise ValueError(
                f"the data is not that of the run in {self.path}: {'; '.join(changes)}. Resume with the data of that "
                "run, or continue with the changed data by --allow-changed-data"
            )
        if changes:
            logger.warning("resumed with other data: %s", "; ".join(changes))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self._writing(RECORD):
                self._begin(args, state)

    def _begin(self, args: TrainingArguments, state: TrainerState) -> None:
        claim_folder(self.path)
        known = {"code": describe_code(), "environment": describe_environment(args.world_size)}
        before = {}
        if state.global_step > 0:
            if not self._checked:
                self.check_resume("from its state")
            before = read_record(self.path)
            if changes := self._changes(args.world_size):
                logger.warning("resumed with other settings than the stopped run: %s", "; ".join(changes))
        else:
            self._move_previous()
        started = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
        _write_json(self.path / RECORD, before | self.description | known | started)
        self._written = 0
        self._write_history(state)

    def _changes(self, processes: int) -> list[str]:
        """Differences from the arguments in the stopped run's run.json."""
        before = read_record(self.path)
        now = json.loads(json.dumps(self.description["arguments"] | {"processes": processes}, default=str))
        old = before.get("arguments", {}) | {"processes": before.get("environment", {}).get("processes")}
        return _differences(old, now)

    def _changed_data(self) -> list[str]:
        """Differences between the splits and what run.json says about them."""
        before, now = read_record(self.path).get("data", {}), self.description.get("data", {})
        splits = [split for split in now if isinstance(now[split], Mapping) and isinstance(before.get(split), Mapping)]
        return [f"{split} {change}" for split in splits for change in _differences(before[split], now[split])]

    def _move_previous(self) -> None:
        """Moves the files of an earlier run to a folder of their own."""
        if not (self.path / RECORD).is_file():
            return
        started = re.sub(r"\D", "", str(read_record(self.path).get("started", ""))[:19]) or "unknown"
        target = next(
            path for n in count() if not (path := self.path / PREVIOUS / f"{started}-{n}".removesuffix("-0")).exists()
        )
        target.mkdir(parents=True)
        # The record goes last: after a kill in between, the rest is moved the next time.
        for name in (*(name for name in CONTENTS if name != RECORD), EVALUATION, CONFIG, RECORD):
            for path in self.path.glob(name):
                path.rename(target / path.name)
        logger.warning("moved the earlier run in %s to %s", self.path, target)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            with warn_on_failure(HISTORY):
                self._write_history(state)

    def _write_history(self, state: TrainerState) -> None:
        """Appends the new log entries; writes all of them if there is no file."""
        path = self.path / HISTORY
        if self._written and path.is_file():
            with open(path, "a", encoding="utf-8") as history:
                history.writelines(json.dumps(entry) + "\n" for entry in state.log_history[self._written :])
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            with replacing(path) as draft:
                draft.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history), encoding="utf-8")
        self._written = len(state.log_history)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and any("loss" in entry for entry in state.log_history):
            with warn_on_failure(CURVE):
                from ..analysis.figures import freed
                from ..analysis.run_plots import plot_training_curve

                with freed():
                    plot_training_curve(state.log_history, self.path / CURVE, self.title)

    def finish(
        self, trainer: Any, metrics: Mapping[str, float], evaluation: "Evaluation | None" = None, **more: Any
    ) -> dict[str, Any]:
        """Writes ``metrics.json`` and returns its content; call it on the first process, at the very end.

        Args:
            trainer: The trainer, for alpha, seed, steps, batch and processes.
            metrics: The result of ``trainer.evaluate``; timings are left out.
            evaluation: The result of ``examine`` for the model to use, the averaged one if there is one. It is also
                written, and adds the fitted temperature.
            **more: JSON values to add.

        Raises:
            RuntimeError: No step was taken, so there is no result.
            WriteError: The files could not be written.
        """
        args, state = trainer.args, trainer.state
        if not state.global_step:
            raise RuntimeError("no step was taken, so nothing was trained; nothing is recorded")
        if evaluation is not None:
            averaged = "ema_" if any(key.startswith("eval_ema_") for key in metrics) else ""
            more |= {key if key == "temperature" else averaged + key: v for key, v in evaluation.fitted().items()}
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if not isinstance(trainer.train_dataset, IterableDataset):
            batch = min(batch, len(trainer.train_dataset))
        losses = [entry["train_loss"] for entry in state.log_history if "train_loss" in entry]
        result = {
            "dataset": self.description.get("data", {}).get("name"),
            **{key.removeprefix("eval_"): value for key, value in metrics.items() if not key.endswith(_TIMING)},
            "train_loss": losses[-1] if losses else None,
            "alpha": getattr(args, "alpha", None),
            "seed": args.seed,
            "epochs": state.epoch,
            "steps": state.global_step,
            "learning_rate": args.learning_rate,
            "batch": batch,
            "world_size": args.world_size,
            "seconds": round(time.perf_counter() - self._started, 1),
        }
        with self._writing(RESULTS):
            if evaluation is not None:
                write_evaluation(self.path, evaluation)
            _write_json(self.path / RESULTS, result | more)
        return result | more

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WriteError(
                f"{name} could not be written to {self.path}: {why_not_written(error, self.path)}. Nothing that is "
                "there is lost: once this is fixed, run the same command with --resume auto"
            ) from error


def claim_folder(path: str | os.PathLike[str]) -> None:
    """Locks a folder until this process ends, in whatever way; it is created where there is none.

    Raises:
        RuntimeError: Another process holds it.
    """
    folder = Path(path).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if folder in _claimed:
        return
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=_ENDING)
    except Timeout:
        raise RuntimeError(
            f"another run is active in {path}: wait until it ends, stop it, or choose another --output-dir"
        ) from None
    _claimed[folder] = lock


@checked
def add_to_record(folder: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Adds JSON values to a run's ``run.json``, which is created if needed, or replaces them."""
    _write_json(Path(folder, RECORD), read_record(folder) | dict(content))


@checked
def write_evaluation(folder: str | os.PathLike[str], evaluation: "Evaluation") -> None:
    """Writes ``evaluation.json``, for ``read_evaluation``.

    Example:
        >>> write_evaluation("runs/digits", examine(model, validation))
    """
    from ..analysis.predictions import Evaluation

    check_type("evaluation", evaluation, Evaluation)
    _write_json(Path(folder, EVALUATION), evaluation.to_json(), indent=None)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [f"{key} was {before[key]}, is {now[key]}" for key in now if key in before and before[key] != now[key]]


def _write_json(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, indent=indent, default=str) + "\n", encoding="utf-8")
