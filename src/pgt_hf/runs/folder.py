"""Writes a run's folder: which code, which data, which seed, which result."""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..atomic import replacing
from .environment import describe_code, describe_environment
from .record import CURVE, EVALUATION, HISTORY, RECORD, RESULTS, read_record

if TYPE_CHECKING:
    from ..analysis.predictions import Evaluation

logger = logging.getLogger(__name__)

_TIMING = ("runtime", "per_second", "preparation_time", "epoch")


class RunFolder(TrainerCallback):
    """Keeps the record of a run in its folder; only the first process writes.

    ``run.json`` is written before the first step, ``history.jsonl`` and ``training_curve.png`` while it trains,
    ``metrics.json`` by ``finish``. A resumed run goes on in the same ``history.jsonl``: what came after the checkpoint
    is dropped from it. Where it is resumed with other arguments, or another number of processes, a warning names them.

    Args:
        path: The folder, ``args.output_dir``.
        description: What ``run.json`` says: JSON values, such as ``{"arguments": {...}, "data": {...}}``. Code and
            environment are added, arguments that hold a token are left out.
        title: Above the curve.

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

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        known = {"code": describe_code(), "environment": describe_environment(args.world_size)}
        if state.global_step > 0 and (changes := self._changes(args.world_size)):
            logger.warning(
                "resumed with other settings, so this is not the run that was stopped: %s", "; ".join(changes)
            )
        started = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
        before = read_record(self.path) if state.global_step > 0 else {}
        _write_json(self.path / RECORD, before | self.description | known | started)
        with replacing(self.path / HISTORY) as draft:
            draft.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history), encoding="utf-8")

    def _changes(self, processes: int) -> list[str]:
        """What differs from the run.json that the stopped run has left."""
        before = read_record(self.path)
        now = json.loads(json.dumps(self.description["arguments"] | {"processes": processes}, default=str))
        old = before.get("arguments", {}) | {"processes": before.get("environment", {}).get("processes")}
        return [f"{key} was {old[key]}, is {now[key]}" for key in now if key in old and old[key] != now[key]]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and state.log_history:
            with open(self.path / HISTORY, "a", encoding="utf-8") as history:
                history.write(json.dumps(state.log_history[-1]) + "\n")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and any("loss" in entry for entry in state.log_history):
            with warn_on_failure(CURVE):
                from ..analysis.run_plots import plot_training_curve

                plot_training_curve(state.log_history, self.path / CURVE, self.title)

    def finish(self, trainer: Any, metrics: Mapping[str, float], **more: Any) -> dict[str, Any]:
        """Writes ``metrics.json``, and returns its content; call it on the first process, at the very end.

        Args:
            trainer: Gives alpha, seed, steps, batch and processes.
            metrics: As ``trainer.evaluate`` gives them; timings are left out.
            **more: JSON values to add.
        """
        args, state = trainer.args, trainer.state
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
            "batch": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "world_size": args.world_size,
            "seconds": round(time.perf_counter() - self._started, 1),
        }
        _write_json(self.path / RESULTS, result | more)
        return result | more


@contextmanager
def warn_on_failure(what: str) -> Iterator[None]:
    """For what is drawn or looked at beside the training: whatever fails there is a warning of one line, no more.

    Example:
        >>> with warn_on_failure("report.html"):
        ...     write_report("runs/digits")
    """
    try:
        yield
    except Exception as error:  # not the training's
        logger.warning("%s was not written: %s: %s", what, type(error).__name__, " ".join(str(error).split()))


def add_to_record(folder: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Adds JSON values to a run's ``run.json``, which is created if there is none; they replace older ones by name.

    Example:
        >>> add_to_record("runs/digits", {"hub_model_id": "alice/digits"})
    """
    _write_json(Path(folder, RECORD), read_record(folder) | dict(content))


def write_evaluation(folder: str | os.PathLike[str], evaluation: "Evaluation") -> None:
    """Writes ``evaluation.json``, from which ``read_evaluation`` reads it.

    Example:
        >>> write_evaluation("runs/digits", examine(model, validation))
    """
    _write_json(Path(folder, EVALUATION), evaluation.to_json(), indent=None)


def _write_json(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, indent=indent, default=str) + "\n", encoding="utf-8")
