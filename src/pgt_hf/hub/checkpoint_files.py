"""Checkpoints without pickles: optimizer, scheduler and random state as safetensors, and back.

Trainer's checkpoints hold pickles (``optimizer.pt``, ``rng_state.pth``, ``training_args.bin``), which can run code
when they are opened. Packed, tensors are safetensors and the rest is JSON in the file's header; unpacked, training
resumes on the same bits.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer_pt_utils import safe_globals

from ..limits import Whole, checked
from ..manifest import MANIFEST, read_manifest, write_manifest
from ..runs.record import STATE

_PICKLES = (".pt", ".pth")
_PACKED = ".packed.safetensors"
_PLAIN = (".safetensors", ".json", ".jsonl", ".txt", ".model")


@checked
def pack_checkpoint(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Copies ``checkpoint-N`` into ``target``, without pickles and paths of this machine, and returns ``target``.

    ``training_args.bin``, which resuming does not need, and files of unknown kinds are left out.

    Raises:
        FileNotFoundError: It is no checkpoint.
        TypeError: A state holds an object other than tensors, arrays, numbers, strings and containers of them.
    """
    folder, target = Path(folder), Path(target)
    state = _state(folder)
    for source in sorted(path for path in folder.rglob("*") if path.is_file()):
        copy = target / source.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.name == STATE:
            if state.get("best_model_checkpoint"):
                state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
            copy.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        elif source.suffix in _PICKLES:
            with safe_globals():  # the random state of numpy, and nothing else that is not torch's
                value = torch.load(source, map_location="cpu", weights_only=True)
            tensors: dict[str, Tensor] = {}
            outline = _pack(value, tensors)
            save_file(tensors, f"{copy}{_PACKED}", metadata={"outline": json.dumps(outline)})
        elif source.suffix in _PLAIN:
            shutil.copyfile(source, copy)
    return target


@checked
def unpack_checkpoint(folder: str | os.PathLike[str], run: str | os.PathLike[str]) -> Path:
    """Unpacks a checkpoint to resume from, as ``checkpoint-N`` in the run's folder, and returns its path.

    Raises:
        FileNotFoundError: It is no checkpoint.
        FileExistsError: The run has that checkpoint already.
    """
    folder, run = Path(folder), Path(run)
    state = _state(folder)
    target = run / f"checkpoint-{state['global_step']}"
    if target.exists():
        raise FileExistsError(f"{target} is there already")
    kept = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    kept.pop("files", None)  # the files of the other form
    partial = run / f"_{target.name}"  # a half-written folder is never taken for a checkpoint
    shutil.rmtree(partial, ignore_errors=True)
    for source in sorted(path for path in folder.rglob("*") if path.is_file()):
        copy = partial / source.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.name.endswith(_PACKED):
            with safe_open(source, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
                outline = json.loads(file.metadata()["outline"])
            torch.save(_unpack(outline, tensors), str(copy).removesuffix(_PACKED))
        else:
            shutil.copyfile(source, copy)
    if best := state.get("best_model_checkpoint"):
        name = Path(best).name
        state["best_model_checkpoint"] = str(run / name) if re.fullmatch(r"checkpoint-\d+", name) else None
        (partial / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    write_manifest(partial, **kept)
    partial.rename(target)
    return target


def _state(folder: Path) -> dict[str, Any]:
    if not (folder / STATE).is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no {STATE}")
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    Whole("[0, inf)").check("global_step", state.get("global_step"))  # it names a folder
    return dict(state)


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, in which the names of ``tensors`` stand for tensors and arrays."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[name := str(len(tensors))] = value.detach().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        return {"array": _pack(torch.from_numpy(np.ascontiguousarray(value)), tensors)["tensor"]}
    if isinstance(value, dict):  # as pairs: JSON would turn integer keys into strings
        return {"dict": [[_pack(key, tensors), _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    raise TypeError(f"a checkpoint's state cannot be packed: it holds a {type(value).__name__}")


def _unpack(outline: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(outline, dict):
        return outline
    ((kind, content),) = outline.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "dict":
        return {_unpack(key, tensors): _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
