"""Build the project's virtual environment, unless a complete one is there; with `--where`, only print its path.

Standard library only. There is one environment for each interpreter and set of dependencies, outside the checkout and
shared by all checkouts. A file named `complete` is written into it last, so one whose build was interrupted is built
anew; a second process that asks for the same environment waits for the first.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def where() -> Path:
    text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    try:  # a changed lint rule need not cost a new environment
        import tomllib

        settings = tomllib.loads(text)
        project = settings["project"]
        text = repr([settings["build-system"], project["dependencies"], project["optional-dependencies"]])
    except ModuleNotFoundError:  # Python 3.10
        pass
    key = hashlib.sha256("\n".join([sys.version, sys.base_prefix, text]).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pgt_hf" / f"venv-{key}"


def build(target: Path) -> None:
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
        # pip inherits the lock: should this process be killed, nobody starts beside a pip that is still at work.
        subprocess.run(
            [target / "bin" / "python", "-m", "pip", "install", "--quiet", "--prefer-binary", "-e", f"{PROJECT}[dev]"],
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
    if sys.version_info < (3, 10):  # noqa: UP036  this file is what finds out
        sys.exit(f"Python 3.10 or later is needed, not {sys.version.split()[0]}: choose another with PYTHON=")
    if sys.argv[1:] == ["--where"]:
        print(where())
    else:
        try:
            build(where())
        except subprocess.CalledProcessError as error:
            sys.exit(f"pip failed with exit status {error.returncode}; its message stands above")
