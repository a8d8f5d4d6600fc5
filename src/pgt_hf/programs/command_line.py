"""From the command line to dataclasses: every word is checked, and an error is one line.

``limits.py`` has the rules for arguments; this module parses them and writes ``--help``.
"""

import json
import logging
import os
import re
import sys
import time
import warnings
from argparse import (
    SUPPRESS,
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import fields
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from .. import __version__
from ..atomic import WriteError
from ..limits import ExistingPath, OneOf, WrongRunError, check_fields, check_needs, near

__all__ = ["errors_in_one_line", "parse", "quiet_libraries", "read_config"]


def parse(
    *kinds: type,
    description: str | None,
    defaults: Mapping[str, Any] | Callable[[Namespace], Mapping[str, Any]],
    smoke: Mapping[str, Any] | None = None,
    early: Sequence[str] = (),
    adjust: Callable[[Namespace, set[str]], None] | None = None,
    positional: str | None = None,
) -> tuple[Any, ...]:
    """Fills dataclasses from the command line; an error ends the program with one line, before it does anything.

    Args:
        *kinds: Dataclasses for ``HfArgumentParser``: each field is a flag.
        description: The program's docstring.
        defaults: Replace the fields' own; or a function that returns them, from the ``early`` arguments.
        smoke: More defaults, with ``--smoke``; every given flag still wins.
        early: The arguments that ``defaults`` depends on; None if not given.
        adjust: Changes the arguments, or refuses them with a ValueError, before the dataclasses are created. It also
            gets the names of the given ones.
        positional: An argument that may come first, without its flag.

    Returns:
        The dataclasses, and all arguments as one dict of JSON values for ``run.json``.

    Example:
        >>> run, args, config = parse(RunArguments, ImageTrainingArguments, description=__doc__, defaults={"alpha": 1})
    """
    quiet_libraries()
    words = sys.argv[1:]
    if positional and words and not words[0].startswith("-"):
        words = [f"--{positional}", *words]
    parser = _Parser(kinds, description=description, formatter_class=_Help, allow_abbrev=False)
    sys.excepthook = partial(_excepthook, skips="on_bad_image" in _flags)
    with errors_in_one_line(everywhere=True):
        given = parser.begin(words)
        asked = Namespace(**{name: given.get(name) for name in ("smoke", *early)})
        chosen = dict(defaults(asked) if callable(defaults) else defaults)
        chosen |= dict(smoke or {}) if asked.smoke else {}
        if "num_train_epochs" in given and "max_steps" not in given:
            chosen.pop("max_steps", None)  # would win over the given epochs
        if isinstance(epochs := given.get("num_train_epochs"), float) and chosen.get("warmup_epochs", 0) > epochs > 0:
            chosen["warmup_epochs"] = epochs  # the default warm-up is no longer than the run
        if "lr_scheduler_type" in given and "schedule" not in given:
            chosen.pop("schedule", None)  # would win over the given type
        if "optim" in given and given["optim"] != chosen.get("optim"):
            for name in {"optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"} - set(given):
                chosen.pop(name, None)  # the default ones belong to the default optimizer
        namespace = parser.finish(words, chosen)
        values = vars(namespace)
        config = {key: value.value if isinstance(value, Enum) else value for key, value in values.items()}
        config = {key: value for key, value in config.items() if key not in ("config", "resume", "allow_changed_data")}
        parser.check(values, set(given))
        if adjust is not None:
            adjust(namespace, set(given))
        return *parser.parse_dict(values), json.loads(json.dumps(config, default=str))


class _Score(OneOf):
    """A metric that ``ClassificationMetrics`` and Trainer report."""

    def fault(self, value: Any) -> str | None:
        known = re.fullmatch(r"(eval_)?(ema_)?(loss|top\d+|(nll|ece|brier)(_folded)?)", value)
        return None if known else super().fault(value)


_SCORES = _Score(("loss", "top1", "top5", "nll", "ece", "brier", "nll_folded", "ece_folded", "brier_folded"))


class _Parser(HfArgumentParser):
    """Parses every word, or says in one line which one it cannot; ``limits.py`` judges the values."""

    def __init__(self, kinds: Sequence[type], **options: Any) -> None:
        self.words: Sequence[str] = ()
        self.shown: Mapping[str, Any] = {}
        self.rules: dict[str, Any] = {"metric_for_best_model": _SCORES}
        super().__init__(kinds, **options)
        _flags.clear()
        _flags.update({name: self.flag(name) for kind in kinds for name in _fields(kind)})
        for action in self._actions:
            if action.type is not None:
                action.type = _or_word(action.type)
            if action.choices is not None:
                self.rules[action.dest] = OneOf([str(choice) for choice in action.choices])
                action.choices = None
        self.add_argument("--version", action="version", version=f"pgt_hf {__version__}")
        self.add_argument(
            "--help-all", action=_HelpAll, nargs=0, default=SUPPRESS, help="Show every argument of Trainer too."
        )

    def begin(self, words: Sequence[str]) -> dict[str, Any]:
        """The given arguments."""
        self.words = words
        first = ArgumentParser(add_help=False, allow_abbrev=False, argument_default=SUPPRESS)
        first.error = self.error  # type: ignore[method-assign]
        for action in self._actions:
            if action.dest in _flags:
                twin = copy(action)
                twin.default, twin.required = SUPPRESS, False
                first._add_action(twin)
        return vars(first.parse_known_args(words)[0])

    def finish(self, words: Sequence[str], defaults: Mapping[str, Any]) -> Namespace:
        """All arguments, from the command line and the defaults."""
        if unknown := set(defaults) - set(_flags):
            where = f" in {config!r}" if (config := self.begin(words).get("config")) else ""
            raise ValueError(f"the arguments{where} must be those of this program, got {', '.join(sorted(unknown))}")
        self.shown = defaults
        self.set_defaults(**defaults)
        return self.parse_args(words)

    def check(self, values: Mapping[str, Any], given: set[str]) -> None:
        """Raises TypeError or ValueError for the first argument that is not allowed."""
        if "resume_from_checkpoint" in given:
            value = values["resume_from_checkpoint"]
            raise ValueError(
                f"--resume-from-checkpoint must be given as --resume, a checkpoint or 'auto', got {value!r}"
            )
        if idle := sorted(given & {"do_train", "do_eval", "do_predict", "parallelism_config"}):
            value = values[idle[0]]
            raise ValueError(f"{idle[0]} must be left out of a command line, where it has no effect, got {value!r}")
        for name in sorted(given):
            if isinstance(values[name], str) and not values[name].strip():
                raise ValueError(f"{name} must not be empty, got {values[name]!r}")
        known = {
            name: value for name, value in values.items() if value is not None or self.shown.get(name, 0) is not None
        }
        for kind in self.dataclass_types:
            try:
                check_fields(kind, known, self.rules | getattr(kind, "RULES", {}))
            except (TypeError, ValueError) as error:
                name = str(error).split()[0]
                if values.get("config") and name in values and name not in given:
                    raise type(error)(f"{error}, in {values['config']!r}") from error
                raise
            check_needs(kind, values, given)
        actions = (self._option_string_actions.get(word.partition("=")[0]) for word in self.words)
        counts = Counter(action.dest for action in actions if action is not None)
        if twice := next((name for name in sorted(given) if counts[name] > 1), None):
            raise ValueError(f"{self.flag(twice)} must be given once, got it {counts[twice]} times")

    def error(self, message: str) -> NoReturn:
        """Gives argparse's messages the form of all others."""
        unknown = re.match(r"unrecognized arguments: (.*)", message)
        flags = re.match(r"argument ([^:]*): (.*)", message, re.DOTALL)
        if required := re.match(r"the following arguments are required: (.*)", message):
            message = f"{required[1]} must be given, got none"
        elif unknown:
            word = next((word for word in unknown[1].split() if word.startswith("-")), unknown[1].split()[0])
            place = next((i for i, other in enumerate(self.words) if other.split()[:1] == [word]), 0)
            before = next((other for other in reversed(self.words[:place]) if other.startswith("--")), "")
            close = near(word.partition("=")[0].replace("_", "-"), _flags.values())
            message = f"{word.partition('=')[0]} is no argument of this program{close or '; see --help'}"
            if before and not word.startswith("-"):
                message = f"{before} must be followed by one value, got also {word!r}; quote a value that has blanks"
        elif flags:
            flag = flags[1].split("/")[-1]
            after = [self.words[i + 1] for i, word in enumerate(self.words[:-1]) if word in flags[1].split("/")]
            message = f"{flag} {flags[2]}"
            if "expected" in flags[2]:
                message = f"{flag} must be followed by a value, got {repr(after[-1]) if after else 'none'}"
        _end(message, everywhere=True)

    def flag(self, name: str) -> str:
        """The flag of a field."""
        return f"--{name.replace('_', '-')}"

    def format_help(self) -> str:
        """Our arguments first, grouped by dataclass, then those of Trainer's that the program sets."""
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        hidden = 0
        for kind in self.dataclass_types:
            rest = set(_fields(TrainingArguments)) if issubclass(kind, TrainingArguments) else set()
            names = _fields(kind)
            title = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__.removesuffix("Arguments")).lower()
            hidden += len(rest) - len(rest & set(self.shown))
            groups = {title: [name for name in names if name not in rest]}
            groups["Trainer"] = [name for name in names if name in rest and name in self.shown]
            if self.everything:
                groups["all of Trainer's"] = [name for name in names if name in rest and name not in self.shown]
            for heading, group in groups.items():
                formatter.start_section(heading)
                formatter.add_arguments(
                    [action for action in self._actions if action.dest in group and action.const is not False]
                )
                formatter.end_section()
        formatter.start_section("about")
        formatter.add_arguments([action for action in self._actions if action.dest not in _flags])
        formatter.end_section()
        if hidden and not self.everything:
            formatter.add_text(f"{hidden} more arguments of transformers.TrainingArguments are shown by --help-all.")
        return formatter.format_help()

    everything = False


class _HelpAll(Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        parser.everything = True
        parser.print_help()
        parser.exit()


def _fields(kind: Any) -> list[str]:
    return [item.name for item in fields(kind) if item.init]


def _or_word(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Keeps a word that cannot be read, so that the argument's rule can say what is allowed."""

    def reading(word: str) -> Any:
        try:
            return read(word)
        except (ArgumentTypeError, TypeError, ValueError):
            return word

    return reading


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments in a ``run.json``; ValueError if it cannot be read."""
    ExistingPath("file").check("config", path)
    try:
        arguments = json.loads(Path(path).read_text(encoding="utf-8"))["arguments"]
        if not isinstance(arguments, dict):
            raise TypeError(f"its arguments are a {type(arguments).__name__}")
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"config must be the run.json of a run, got {os.fspath(path)!r}: {error}") from error
    return arguments


def quiet_libraries() -> None:
    """Shows progress as short lines, and silences bars and advice of libraries."""
    import transformers.trainer

    from ..trainer import Progress

    transformers.trainer.DEFAULT_PROGRESS_CALLBACK = Progress
    transformers.utils.logging.disable_progress_bar()  # of loading and saving, which are quick
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator is found")
    if "datasets" in sys.modules and not sys.stderr.isatty():
        sys.modules["datasets"].disable_progress_bars()
    processors = logging.getLogger("transformers.models.auto.image_processing_auto")
    processors.addFilter(lambda record: "backend is not available" not in record.getMessage())  # another one is


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any, *, skips: bool) -> None:
    """One line for what the user can fix: a bad image, a full disk, another run's checkpoint; else a traceback."""
    decoding = sys.modules.get("pgt_hf.images.decoding")  # a program for text has none
    if decoding is not None and issubclass(kind, decoding.BadImageError):
        hint = "; --on-bad-image skip leaves such images out" if skips and "--on-bad-image" not in str(error) else ""
        print(_line(f"{error}{hint}"), file=sys.stderr)
    elif issubclass(kind, WriteError | WrongRunError):
        line = _line(str(error))
        if not _leave_to_first(everywhere=True):
            print(line, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


@contextmanager
def errors_in_one_line(*kinds: type[Exception], everywhere: bool = False) -> Iterator[None]:
    """Ends the program with one line, without a traceback, for errors that the user can fix.

    Args:
        *kinds: The errors; by default all that building a run may raise.
        everywhere: All processes raise the same error, so only the first one of a machine prints it.

    Example:
        >>> with errors_in_one_line():
        ...     dataset = load_image_dataset("no/such-set")
        SystemExit: error: 'no/such-set' is neither a local folder nor in the cache, and the Hub could not be reached
    """
    expected = kinds or (ImportError, OSError, RuntimeError, TypeError, ValueError)
    try:
        yield
    except expected as error:
        _end(str(error), everywhere)


_PATIENCE = 10  # seconds
_flags: dict[str, str] = {}  # of this program, by argument


def _end(message: str, everywhere: bool = False) -> NoReturn:
    """Ends the program with one line."""
    line = _line(message)
    sys.exit(1 if _leave_to_first(everywhere) else line)


def _leave_to_first(everywhere: bool) -> bool:
    """Whether the machine's first process prints the same error; waits to let it."""
    if not everywhere or int(os.environ.get("LOCAL_RANK", "0")) == 0:
        return False
    time.sleep(_PATIENCE)  # the launcher ends this process once the first one has failed
    return True


def _line(message: str) -> str:
    """An error's line, in which arguments are named as flags."""
    named = re.compile(r"(?<![\w'\"./-])(\w+)(?![\w'\"=./(-])")

    def rename(found: re.Match[str]) -> str:
        word = found[1]
        return _flags[word] if word in _flags and ("_" in word or found.start() == 0) else word

    if "\n  1. " not in message:  # numbered steps keep their lines
        message = " ".join(message.split())
    line = f"error: {named.sub(rename, message)}"
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # for torchrun's summary
        reason = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": reason}), encoding="utf-8")
    return line


class _Help(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """Shows defaults, keeps the examples' line breaks, and shows one spelling of each flag."""

    def _format_action_invocation(self, action: Action) -> str:
        flag = action.option_strings[-1]
        value = action.metavar or action.dest.rsplit("_", 1)[-1].upper()
        if action.nargs == "?":
            return flag
        return f"{flag} {value} ..." if action.nargs == "+" else flag if action.nargs == 0 else f"{flag} {value}"
