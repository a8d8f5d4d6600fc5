"""Kills a program with -9 just before its n-th file event, so that every state that a kill can leave can be tried.

A file event is whatever changes a name or opens a file for writing below the watched folder: ``open``, ``os.rename``
(and ``os.replace``), ``os.remove``, ``os.rmdir``, ``os.mkdir``, ``os.truncate``, ``os.link``, ``os.symlink`` and
``shutil.rmtree``. The program and all the processes that it starts are counted together and killed together, as when
a machine dies. Nothing in the program has to be prepared: Python's audit hooks are set by a ``sitecustomize``.

    whole = kill_at(None, [sys.executable, "train.py"], folder)      # runs to its end; whole.events lists the events
    for number in range(1, len(whole.events) + 1):
        killed = kill_at(number, [sys.executable, "train.py"], folder)
        assert killed.returncode == -9                               # 0 if it had fewer events this time
        ...                                                          # start it again: does it finish, and rightly?

``argv`` may be a function without arguments: it then runs in a fork of this process, which has everything imported.
Files that C++ or Rust opens (Parquet, safetensors) make no event, and no kill here comes in the middle of a write.
``tear`` stands in for both: it cuts the file that was written last, as a full disk or a loss of power does.
"""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The arguments that are paths, and where the descriptors of the folders lie that they are relative to.
EVENTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "open": ((0,), ()),
    "os.rename": ((0, 1), (2, 3)),
    "os.link": ((0, 1), (2, 3)),
    "os.symlink": ((1,), (2,)),
    "os.remove": ((0,), (1,)),
    "os.rmdir": ((0,), (1,)),
    "os.mkdir": ((0,), (2,)),
    "os.truncate": ((0,), ()),
    "shutil.rmtree": ((0,), (1,)),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
HERE = Path(__file__).resolve()


@dataclass(frozen=True)
class Killed:
    """How a program ended (-9 if it was killed), its file events until then, and what it printed."""

    returncode: int
    events: list[str]
    output: str


def kill_at(
    event_number: int | None,
    argv: Sequence[str] | Callable[[], Any],
    folder: str | os.PathLike[str],
    *,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> Killed:
    """Runs ``argv`` and kills it and all its children just before file event ``event_number`` below ``folder``.

    Args:
        event_number: From 1; None lets it run to its end.
        argv: A command, or a function that is called in a fork of this process.
        folder: The folder whose events count; it need not exist yet.
        cwd: Where the command runs.
        env: The command's environment in place of this process's.
        timeout: Seconds for a command; a function has no limit.

    Raises:
        ValueError: ``event_number`` is below 1.
    """
    if event_number is not None and event_number < 1:
        raise ValueError(f"event_number must be at least 1, got {event_number}")
    with tempfile.TemporaryDirectory() as own:
        log, output = Path(own, "events"), Path(own, "output")
        log.touch()
        log.with_name("groups").touch()
        if callable(argv):
            code = _fork(event_number, argv, Path(folder), log, output)
        else:
            code = _start(event_number, argv, Path(folder), log, output, cwd, env or os.environ, timeout)
        return Killed(code, log.read_text().splitlines(), output.read_text(errors="replace"))


def tear(folder: str | os.PathLike[str]) -> Path | None:
    """Cuts the file below ``folder`` that was written last to half its size, and returns its path."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink()]
    if not files:
        return None
    last = max(files, key=lambda path: path.stat().st_mtime_ns)
    os.truncate(last, last.stat().st_size // 2)
    return last


def _start(
    number: int | None,
    argv: Sequence[str],
    folder: Path,
    log: Path,
    output: Path,
    cwd: str | os.PathLike[str] | None,
    env: Mapping[str, str],
    timeout: float,
) -> int:
    hook = f"import runpy; runpy.run_path({str(HERE)!r})['watch']({number!r}, {str(folder)!r}, {str(log)!r})\n"
    (log.parent / "sitecustomize.py").write_text(hook)
    path = os.pathsep.join(filter(None, [str(log.parent), env.get("PYTHONPATH")]))
    with open(output, "wb") as file:
        process = subprocess.Popen(
            argv,
            cwd=cwd,
            env={**env, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            return process.wait(timeout)
        finally:
            _end(log)  # no child outlives its program: it would write on while the next one runs
            process.wait()


def _fork(number: int | None, call: Callable[[], Any], folder: Path, log: Path, output: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        try:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        finally:
            _end(log)
    code = 1
    try:
        os.setpgid(0, 0)
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        watch(number, folder, log)
        call()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end(log: Path) -> None:
    """Kills every process group of the program, its own last: a launcher may start each worker in a new one."""
    own = os.getpgid(0)
    groups = {int(group) for group in log.with_name("groups").read_text().split()}
    for group in sorted(groups, key=lambda group: group == own):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def watch(number: int | None, folder: str | os.PathLike[str], log: str | os.PathLike[str]) -> None:
    """Counts this process's file events below ``folder``, in ``log``, and kills its group before the n-th."""
    root, own = os.path.abspath(folder), os.path.dirname(os.path.abspath(log))
    with open(os.path.join(own, "groups"), "a") as file:
        file.write(f"{os.getpgid(0)}\n")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or (event == "open" and not (arguments[2] or 0) & WRITING):
            return
        names, descriptors = EVENTS[event]
        paths = []
        for place, name in enumerate(names):
            at = arguments[descriptors[place]] if place < len(descriptors) else None
            paths.append(_absolute(arguments[name], at))
        ours = [path for path in paths if path is not None and _below(path, root) and not _below(path, own)]
        if not ours:
            return
        told = " ".join(os.path.relpath(path, root) for path in ours).replace("\n", "?")
        # Opened anew each time, so that the lock keeps out this process's threads as well as other processes.
        with open(log, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            count = len(file.readlines()) + 1
            file.write(f"{event} {told}\n".encode())
            file.flush()
            if count == number:
                _end(Path(log))

    sys.addaudithook(hook)


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)


def _absolute(path: Any, descriptor: Any) -> str | None:
    if not isinstance(path, str | bytes | os.PathLike):
        return None  # a descriptor: its file was opened, and that was the event
    name = os.fsdecode(path)
    if isinstance(descriptor, int) and descriptor >= 0 and not os.path.isabs(name):
        name = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), name)
    return os.path.abspath(name)
