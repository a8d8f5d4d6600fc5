"""Where a run comes from: command, code, data, packages, device."""

import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "pgt_hf", "torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "evaluate", "huggingface_hub",
)  # fmt: skip


def command_line() -> str:
    """The command that started this program, without tokens, for messages that say how to resume.

    Example:
        >>> print(f"resume with: accelerate launch {command_line()} --resume auto")
    """
    kept, skip = [], False
    for word in sys.argv:
        option = re.fullmatch(r"--[\w-]*token(=.*)?", word)
        if not (skip or option):
            kept.append(word)
        skip = option is not None and option[1] is None
    return shlex.join(kept)


def describe_code() -> dict[str, Any]:
    """The commit that this package runs from and whether files differ from it; nothing outside a git checkout.

    Example:
        >>> describe_code()["modified"]
        False
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "-s"))}
    except (OSError, subprocess.CalledProcessError):  # installed from a wheel, or no git on this machine
        return {}


def describe_data(name: str, splits: Mapping[str, Any]) -> dict[str, Any]:
    """The name of a data set, its revision if it came from the Hub, and each split's size and fingerprint."""
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
    """Interpreter, packages, device, and how many processes train together."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "python": platform.python_version(),
        "packages": package_versions(),
        "device": device,
        "processes": processes,
    }


def package_versions() -> dict[str, str]:
    """The versions of this package and of those that its results depend on, as far as they are installed.

    Example:
        >>> package_versions()["torch"]
        '2.14.1'
    """
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
