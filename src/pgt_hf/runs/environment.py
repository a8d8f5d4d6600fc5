"""Where a run comes from: command, code, packages, device."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "pgt_hf", "torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "evaluate", "huggingface_hub",
)  # fmt: skip
_SETTINGS = ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES")  # of the environment: they choose the devices


def command_line(**changes: object) -> str:
    """The command that started this program, for the same number of processes and without tokens, for a shell.

    ``changes`` are flags to replace or add; None leaves a flag out.

    Example:
        >>> print("resume with:", command_line(resume="auto"))
        resume with: accelerate launch recipes/imagenet.py --dataset-name digits --resume auto
    """
    kept, skip = [], False
    for word in sys.argv[1:]:
        if word.startswith("--"):
            flag = word[2:].partition("=")[0].replace("-", "_")
            skip = flag in changes or flag.endswith("token")
        kept += [] if skip else [word]
    for flag, value in changes.items():
        kept += [] if value is None else [f"--{flag.replace('_', '-')}", str(value)]
    settings, launcher = _launcher()
    return " ".join([*settings, command(*launcher, sys.argv[0], *kept)])


def command(*words: str) -> str:
    """A command for a shell; a program of this environment that the shell would not find gets its path."""
    found = shutil.which(words[0])
    here = Path(sys.executable).with_name(words[0])
    program = words[0] if found and Path(found).parent == here.parent else str(here)
    return shlex.join([program, *words[1:]])


def recipe(name: str) -> str:
    """The path of another recipe, next to the running one."""
    return str(Path(sys.argv[0]).with_name(name))


def _launcher() -> tuple[list[str], list[str]]:
    """The environment's settings, and ``accelerate launch`` with its options, another launcher, or python."""
    import psutil  # comes with accelerate

    before: list[str] = []
    environment = dict(os.environ)
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
        if sys.argv[0] in words and "python" in Path(words[0]).name:
            before, environment = words[1 : words.index(sys.argv[0])], parent.environ()
    except psutil.Error:  # another user's process
        pass
    settings = [f"{key}={environment[key]}" for key in _SETTINGS if key in environment]
    if before[:2] == ["-m", "accelerate.commands.launch"]:
        before = ["accelerate", "launch", *before[2:]]
    elif before:
        before = [Path(before[0]).name, *before[1:]]
    return settings, before or ["python"]


def describe_code() -> dict[str, Any]:
    """The commit of this package's checkout, and whether files were modified; empty outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "-s"))}
    except (OSError, subprocess.CalledProcessError):  # installed from a wheel, or no git on this machine
        return {}


def describe_environment(processes: int) -> dict[str, Any]:
    """Interpreter, packages, device, and how many processes train together."""
    return {
        "python": platform.python_version(),
        "packages": package_versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "processes": processes,
    }


def package_versions() -> dict[str, str]:
    """The versions of this package and of those that its results depend on, if they are installed."""
    versions = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
