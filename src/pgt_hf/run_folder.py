"""What a run leaves behind: which code, which data, which seed, which result.

``run.json`` is written before the first step, ``history.jsonl`` and ``training_curve.png`` while it trains,
``metrics.json`` at its end.
"""

import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .plots import plot_training_curve

__all__ = ["RunFolder", "command_line", "describe_code", "describe_data", "describe_environment"]

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "evaluate")


class RunFolder(TrainerCallback):
    """Keeps the record of a run in its folder; only the first process writes.

    A resumed run goes on in the same ``history.jsonl``: what came after the checkpoint is dropped from it. Where it is
    resumed with other arguments, or another number of processes, a warning names them.

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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        known = {"code": describe_code(), "environment": describe_environment(args.world_size)}
        if state.global_step > 0 and (changes := self._changes(args.world_size)):
            logger.warning(
                "resumed with other settings, so this is not the run that was stopped: %s", "; ".join(changes)
            )
        started = {"started": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        self._write("run.json", self.description | known | started)
        self._replace("history.jsonl", "".join(json.dumps(entry) + "\n" for entry in state.log_history))

    def _changes(self, processes: int) -> list[str]:
        """What differs from the run.json that the stopped run has left."""
        try:
            before = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
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
            with open(self.path / "history.jsonl", "a", encoding="utf-8") as history:
                history.write(json.dumps(state.log_history[-1]) + "\n")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and any("loss" in entry for entry in state.log_history):
            plot_training_curve(state.log_history, self.path / "training_curve.png", self.title)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes ``metrics.json``; call it on the first process, when everything has been evaluated."""
        self._write("metrics.json", result)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        self._replace(name, json.dumps(content, indent=2, default=str) + "\n")

    def _replace(self, name: str, text: str) -> None:
        """In one move: a run that is killed here leaves the old file or the new one."""
        beside = self.path / f".{name}"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.path / name)


def command_line() -> str:
    """How this program was started, for a message that says how to start it again; a token is left out.

    Example:
        >>> print(f"go on with: accelerate launch {command_line()} --resume auto")
    """
    kept, skip = [], False
    for word in sys.argv:
        option = re.fullmatch(r"--[\w-]*token(=.*)?", word)
        if not (skip or option):
            kept.append(word)
        skip = option is not None and option[1] is None
    return shlex.join(kept)


def describe_code() -> dict[str, Any]:
    """The package's version and, where it runs from a git checkout, the commit and whether files differ from it.

    Example:
        >>> describe_code()["version"]
        '0.1.0.dev0'
    """
    from . import __version__

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"version": __version__, "commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "-s"))}
    except (OSError, subprocess.CalledProcessError):  # installed from a wheel, or no git on this machine
        return {"version": __version__}


def describe_data(name: str, splits: Mapping[str, Any]) -> dict[str, Any]:
    """The name of a data set, the revision on the Hub where it came from there, and each split's size and fingerprint.

    Args:
        name: As it was asked for.
        splits: From split names to ``datasets.Dataset`` or ``IterableDataset``.
    """
    described: dict[str, Any] = {"name": name}
    for split, dataset in splits.items():
        rows = getattr(dataset, "num_rows", None)
        described[split] = {"images": rows, "fingerprint": getattr(dataset, "_fingerprint", None)}
        sources = getattr(dataset.info, "download_checksums", None) or {}
        revisions = {found[1] for source in sources if (found := re.search(r"@([0-9a-f]{40})/", str(source)))}
        if revisions:
            described["revision"] = " ".join(sorted(revisions))
    return described


def describe_environment(processes: int) -> dict[str, Any]:
    """Interpreter, packages and device.

    Args:
        processes: How many train together.
    """
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"python": platform.python_version(), "packages": versions, "device": device, "processes": processes}
