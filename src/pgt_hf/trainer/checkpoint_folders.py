"""The checkpoints in a run's folder: which of them can be used, and how old ones are deleted.

A checkpoint is used only if its manifest agrees with its files. One that "auto" must not choose, because the run had
diverged or was resumed from an earlier one, is set aside: it stays, with the reason in a file.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..limits import checked
from ..manifest import MANIFEST, find_damage
from ..runs.record import STATE

logger = logging.getLogger(__name__)

SET_ASIDE = "set-aside.txt"  # in a checkpoint: why "auto" does not take it
_NAME = re.compile(r"checkpoint-(\d+)")
_REMOVING = ".removing-"  # in front of the name of a checkpoint that is being deleted


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    found = _NAME.fullmatch(checkpoint.name)
    if found is None:
        raise ValueError(f"{checkpoint} is not named checkpoint-<step>")
    return int(found[1])


def list_checkpoints(run: str | os.PathLike[str]) -> list[Path]:
    """All checkpoints of a run, the oldest step first."""
    folders = Path(run).glob("checkpoint-*") if Path(run).is_dir() else ()
    return sorted((path for path in folders if path.is_dir() and _NAME.fullmatch(path.name)), key=step_of)


def usable_checkpoints(run: str | os.PathLike[str]) -> list[Path]:
    """Those that were not set aside, the oldest step first; they are not verified."""
    return [checkpoint for checkpoint in list_checkpoints(run) if _set_aside(checkpoint) is None]


@checked
def latest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest sound checkpoint of a run, or None if it has none yet; damaged ones are passed over with a warning.

    Raises:
        ValueError: There are checkpoints, and none can be used.

    Example:
        >>> latest_checkpoint("runs/imagenet")
        'runs/imagenet/checkpoint-5000'
    """
    passed: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        trouble = _set_aside(checkpoint) or _find_trouble(checkpoint)
        if trouble is None:
            if passed:
                logger.warning("resuming from %s; passed over %s", checkpoint.name, "; ".join(passed))
            return str(checkpoint)
        passed.append(f"{checkpoint.name}: {trouble}")
    if passed:
        raise ValueError(
            f"no checkpoint in {folder} can be resumed from ({'; '.join(passed)}). Start again without --resume: "
            "nothing there is deleted"
        )
    return None


def find_checkpoint(resume: str | bool | None, output_dir: str | os.PathLike[str]) -> str | None:
    """The checkpoint to resume from; the first process checks and chooses it for all.

    Args:
        resume: None or False, nothing; "auto" or True, the newest sound checkpoint of the run, if it has any; else the
            folder of a checkpoint.
        output_dir: The run's folder.

    Raises:
        ValueError: The checkpoint is damaged or unfinished, or the run has none that can be used.
        FileNotFoundError: ``resume`` is neither "auto" nor the folder of a checkpoint.

    Example:
        >>> find_checkpoint("auto", "runs/not-yet-started") is None
        True
    """
    if not resume:
        return None
    chosen: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            chosen[0] = latest_checkpoint(output_dir) if resume in (True, "auto") else _check_given(str(resume))
        except (ValueError, OSError) as error:
            chosen[1] = error
    if PartialState().num_processes > 1:
        chosen = broadcast_object_list(chosen)
    if chosen[1] is not None:
        raise chosen[1]
    return chosen[0]


def set_aside(run: str | os.PathLike[str], after: int, reason: str) -> None:
    """Keeps the checkpoints of later steps than ``after`` from being chosen by "auto"."""
    for checkpoint in list_checkpoints(run):
        if step_of(checkpoint) > after:
            (checkpoint / SET_ASIDE).write_text(f"{reason}\n", encoding="utf-8")


def remove_checkpoint(checkpoint: Path) -> None:
    """Deletes a checkpoint, renamed first: what an interruption leaves is not taken for a checkpoint."""
    doomed = checkpoint.with_name(_REMOVING + checkpoint.name)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def rotate(run: Path, limit: int | None, keep: Callable[[Path], bool]) -> None:
    """Deletes all but the newest ``limit`` checkpoints, those set aside first, and never one to ``keep``."""
    for leftover in run.glob(f"{_REMOVING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not limit or limit < 0:
        return
    found = sorted(list_checkpoints(run), key=lambda path: (_set_aside(path) is None, step_of(path)))
    for checkpoint in found[: max(0, len(found) - limit)]:
        if not keep(checkpoint):
            remove_checkpoint(checkpoint)


def _check_given(name: str) -> str:
    checkpoint = Path(name)
    verifiable = (checkpoint / MANIFEST).is_file()
    if not verifiable and not (checkpoint / STATE).is_file():
        raise FileNotFoundError(f"--resume must be 'auto' or the folder of a checkpoint, got {name!r}")
    if not any(path.is_dir() or path.suffix in (".bin", ".safetensors") for path in checkpoint.iterdir()):
        raise ValueError(f"--resume must be 'auto' or a checkpoint with its weights, got {name!r} without")
    if not verifiable:
        logger.warning("%s has no %s, so damage to it cannot be noticed", name, MANIFEST)
    elif trouble := _find_trouble(checkpoint):
        raise ValueError(
            f"{name} is damaged: {trouble}. --resume auto takes the newest checkpoint that is not damaged, if any"
        )
    return name


def _set_aside(checkpoint: Path) -> str | None:
    mark = checkpoint / SET_ASIDE
    return mark.read_text(encoding="utf-8").strip() if mark.is_file() else None


def _find_trouble(checkpoint: Path) -> str | None:
    return find_damage(checkpoint) or (None if (checkpoint / STATE).is_file() else f"{STATE} is missing")
