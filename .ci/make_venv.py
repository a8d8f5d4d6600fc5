"""Build the project's virtual environment, unless a complete one is there; with `--where`, only print its path.

Standard library only. There is one environment for each interpreter and set of dependencies, outside the checkout and
shared by all checkouts; with `--lowest`, one that holds the oldest versions that pyproject.toml allows. A file named
`complete` is written into it last, so one whose build was interrupted is built anew; a second process that asks for
the same environment waits for the first.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def where(lowest: bool) -> Path:
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    project = settings["project"]  # a changed lint rule need not cost a new environment
    text = repr([settings["build-system"], project["dependencies"], project["optional-dependencies"], lowest])
    key = hashlib.sha256("\n".join([sys.version, sys.base_prefix, text]).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pgt_hf" / f"venv-{key}"


def lowest_versions() -> list[str]:
    """What pip is to be constrained to: each lower bound in pyproject.toml as the one version allowed."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tools = ("dev", "docs", "test")  # any version of these will do
    extras = project["optional-dependencies"].items()
    needed = [package for extra, some in extras if extra not in tools for package in some]
    found = (
        re.match(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)", requirement)
        for requirement in [*project["dependencies"], *needed]
    )
    return [f"{match[1]}=={match[2]}" for match in found if match]


def build(target: Path, lowest: bool) -> None:
    marker = target / "complete"
    if marker.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Waiting for the process that builds {target}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if marker.exists():
            return
        say(f"Building the environment in {target} (once; several minutes, several GB)")
        if target.exists():
            shutil.rmtree(target)
        venv.create(target, with_pip=True)
        pip = [
            target / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--prefer-binary",
            "-e",
            f"{PROJECT}[dev]",
        ]
        if lowest:
            (target / "constraints.txt").write_text("\n".join(lowest_versions()), encoding="utf-8")
            pip += ["--constraint", target / "constraints.txt"]
        # pip inherits the lock: should this process be killed, nobody starts beside a pip that is still at work.
        subprocess.run(
            pip,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            pass_fds=[lock.fileno()],
        )
        marker.touch()


def say(message: str) -> None:
    """On stderr: stdout is for the path, which scripts read."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    oldest = "--lowest" in sys.argv
    if "--where" in sys.argv:
        print(where(oldest))
    else:
        try:
            build(where(oldest), oldest)
        except subprocess.CalledProcessError as error:
            sys.exit(f"pip failed with exit status {error.returncode}; its message stands above")
