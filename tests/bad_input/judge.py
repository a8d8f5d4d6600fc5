"""Judges how the package meets wrong input: with one clear error, an unclear one, silence, or a traceback."""

import contextlib
import io
import os
import re
import runpy
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from launch import ROOT, as_program

RECIPES = ROOT / "recipes"
CLEAR, UNCLEAR, SILENT, TRACEBACK, LEFT, REFUSED = (
    "clear",
    "unclear",
    "silent",
    "traceback",
    "leaves files",
    "good refused",
)
SECONDS = 60
# Words that say what is allowed, or what to do.
_ALLOWED = re.compile(
    r"\b(must|needs?|requires|counts only|one of|near|see|give|choose|neither|no|not|only|missing|for|cannot|"
    r"unrecognized|try)\b",
    re.IGNORECASE,
)


class _TooLongError(BaseException):
    """Not an Exception: a search takes those for failed trials, and tries again."""


@dataclass(frozen=True)
class Verdict:
    """What came of one wrong input."""

    case: str
    kind: str
    message: str = ""


@dataclass(frozen=True)
class Command:
    """A command line, and words of which the message must have at least one of each group."""

    program: str
    words: tuple[str, ...]
    named: tuple[str, ...] = ()
    value: str = ""
    late: bool = False  # found only by doing the work, as that an image cannot be decoded

    def __str__(self) -> str:
        return f"{self.program} {' '.join(word or repr(word) for word in self.words)}"


def run_command(command: Command) -> Verdict:
    """Calls the program's ``main`` here, in an empty folder, so that a start of Python is not paid for each."""
    with tempfile.TemporaryDirectory() as folder:
        with as_program(command.program, *command.words) as patch, _quiet(), _limit():
            patch.chdir(folder)
            message, kind = _message(_program(command.program))
        if kind == CLEAR and not command.late and any(Path(folder).rglob("*")):
            kind = LEFT
    if kind == CLEAR and not _is_clear(message, command.named, command.value):
        kind = UNCLEAR
    return Verdict(str(command), kind, message)


def _message(main: Callable[[], Any]) -> tuple[str, str]:
    try:
        with contextlib.redirect_stderr(io.StringIO()) as told:
            main()
    except _TooLongError:
        return "", SILENT
    except SystemExit as end:
        if end.code in (None, 0):
            return "", SILENT
        if isinstance(end.code, int):  # of argparse itself: usage, then the error
            return told.getvalue().splitlines()[-1], CLEAR if "error: " in told.getvalue() else UNCLEAR
        message = str(end.code)
        return message, CLEAR if message.startswith("error: ") and len(message.splitlines()) == 1 else UNCLEAR
    except BaseException as error:
        with contextlib.redirect_stderr(io.StringIO()) as told:  # what Python would print
            sys.excepthook(type(error), error, error.__traceback__)
        lines = told.getvalue().splitlines()
        if len(lines) == 1 and lines[0].startswith("error: "):
            return lines[0], CLEAR
        return f"{type(error).__name__}: {error}", TRACEBACK
    return "", SILENT


def _is_clear(message: str, named: Iterable[str], value: str) -> bool:
    return (
        any(re.search(name.replace("_", "-"), message.replace("_", "-"), re.IGNORECASE) for name in named)
        and (not value or value.strip("-") in message or repr(value) in message)
        and _ALLOWED.search(message) is not None
    )


@cache
def _program(name: str) -> Callable[[], Any]:
    if name.endswith(".py"):
        main = runpy.run_path(str(RECIPES / name), run_name="recipe")["main"]
        return main  # type: ignore[no-any-return]
    from pgt_hf.__main__ import main as command

    return command


@contextlib.contextmanager
def _quiet() -> Any:
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


@contextlib.contextmanager
def _limit() -> Any:
    """An accepted wrong input may train for ever."""

    def stop(*_: Any) -> None:
        raise _TooLongError(f"still running after {SECONDS} s")

    if signal.getitimer(signal.ITIMER_REAL)[0]:  # a test has a limit of its own
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Call:
    """A call of the API with one wrong argument; or with none, to see that what is right is taken."""

    name: str
    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    wrong: str = ""
    value: Any = None
    fine: bool = False

    def __str__(self) -> str:
        shown = " ".join(repr(self.value).split())
        return f"{self.name}({self.wrong}={shown[:60]})"


def run_call(call: Call) -> Verdict:
    """Makes the call, and judges the exception."""
    arguments = call.arguments()
    if call.wrong:
        arguments[call.wrong] = call.value
    positional = arguments.pop("*", ())
    try:
        with _quiet():
            call.function(*positional, **arguments)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        if call.fine:
            return Verdict(str(call), REFUSED, message)
        clear = isinstance(error, (TypeError, ValueError, OSError, RuntimeError, ImportError))
        words = str(error)
        named = re.search(rf"\b{re.escape(call.wrong)}\b", words) is not None
        good = clear and named and _shows(words, call.value) and _ALLOWED.search(words)
        return Verdict(str(call), CLEAR if good else UNCLEAR, message)
    return Verdict(str(call), CLEAR if call.fine else SILENT)


def _shows(message: str, value: Any) -> bool:
    shape = getattr(value, "shape", None)
    if isinstance(value, (list, tuple)) and not value:
        return re.search(r"none|list|\b0\b|\[\]|\(\)", message) is not None
    shown = [
        str(value).lower(),
        repr(value)[:20],
        str(value)[:20],
        type(value).__name__,
        getattr(value, "__name__", "\0"),
    ]
    shown += [str(tuple(shape)), str(getattr(value, "dtype", "\0"))] if shape is not None else []
    if shape is not None and value.dtype not in (torch.bool, torch.complex64):
        shown += [str(value.min().item()), str(value.max().item())]
    if isinstance(value, (list, tuple)) and value:
        shown += [repr(item) for item in value]
        with contextlib.suppress(ValueError):
            shown += [str(np.asarray(value)), f"{np.asarray(value).dtype}"]
    return any(text and text in message for text in shown)


def score(verdicts: Iterable[Verdict]) -> str:
    """Tried, clear, unclear, silent, tracebacks, in one line."""
    counts = Counter(verdict.kind for verdict in verdicts)
    kinds = (CLEAR, UNCLEAR, SILENT, TRACEBACK, LEFT, REFUSED)
    return ", ".join([f"{counts.total()} tried", *(f"{counts[kind]} {kind}" for kind in kinds)])


def judge(cases: Iterable[Any], run: Callable[[Any], Verdict]) -> list[Verdict]:
    """Runs all, and prints what is not clear."""
    verdicts = []
    for case in cases:
        verdicts.append(verdict := run(case))
        if verdict.kind != CLEAR:
            print(f"{verdict.kind:12} {verdict.case} -> {verdict.message[:300]}", flush=True)
    return verdicts
