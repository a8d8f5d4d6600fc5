"""What the recipes share: reading arguments, failing with one line, and telling what they did."""

import json
import logging
import os
import sys
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments, set_seed

from .data_workers import use_worker_server
from .runs.folder import claim_folder
from .runs.record import CONTENTS, METRICS
from .trainer.checkpoint_folders import find_checkpoint
from .trainer.stopping import StopOnSigterm

__all__ = [
    "IMAGE_DEFAULTS",
    "TRAINING_DEFAULTS",
    "RunArguments",
    "begin",
    "errors_in_one_line",
    "parse",
    "quiet_other_processes",
    "tell",
    "workers_per_process",
]


TRAINING_DEFAULTS: dict[str, Any] = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 0.02,  # of the run: a short one has a curve, too
    "logging_first_step": True,
    "report_to": "none",
    "ddp_find_unused_parameters": False,
}


@dataclass
class RunArguments:
    """Arguments of every program that trains."""

    resume: str | None = field(
        default=None, metadata={"help": "A checkpoint to resume from, or 'auto' for the newest one, if any."}
    )
    allow_changed_data: bool = field(default=False, metadata={"help": "Resume although the data has changed."})
    smoke: bool = field(default=False, metadata={"help": "Run a few steps on embedded data, as a quick check."})


def parse(
    *kinds: type,
    description: str | None,
    defaults: Mapping[str, Any] | Callable[[Namespace], Mapping[str, Any]],
    smoke: Mapping[str, Any] | None = None,
    early: Sequence[str] = (),
    adjust: Callable[[Namespace], None] | None = None,
    positional: str | None = None,
) -> tuple[Any, ...]:
    """Fills dataclasses from the command line; an error ends the program with one line.

    Args:
        *kinds: Dataclasses, as ``HfArgumentParser`` takes them: each field is a flag.
        description: The program's docstring.
        defaults: In place of the fields' own; or a function that gives them, from the ``early`` arguments.
        smoke: More defaults, with ``--smoke``; every flag still wins.
        early: The arguments that ``defaults`` asks about; None where they were not given.
        adjust: Changes all arguments, or refuses them with a ValueError, before the dataclasses are made.
        positional: The argument that may be given first, without its flag.

    Returns:
        The dataclasses, and all arguments as they were given, in one dict of JSON values for ``run.json``.

    Example:
        >>> run, args, config = parse(RunArguments, ImageTrainingArguments, description=__doc__, defaults={"alpha": 1})
    """
    quiet_libraries()
    words = sys.argv[1:]
    if positional and words and not words[0].startswith("-"):
        words = [f"--{positional}", *words]
    parser = HfArgumentParser(kinds, description=description, formatter_class=_Help, allow_abbrev=False)
    sys.excepthook = partial(_excepthook, skips=any(action.dest == "on_bad_image" for action in parser._actions))
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    for name in early:
        first.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name)
    first.add_argument("--smoke", action="store_true")
    with errors_in_one_line():
        asked = first.parse_known_args(words)[0]
        chosen = defaults(asked) if callable(defaults) else defaults
        parser.set_defaults(**dict(chosen) | (dict(smoke or {}) if asked.smoke else {}))
        if unknown := set(parser._defaults) - {action.dest for action in parser._actions}:
            raise ValueError(f"there are no arguments of these names: {', '.join(sorted(unknown))}")
        namespace = parser.parse_args(words)
        if getattr(namespace, "resume_from_checkpoint", None):
            raise ValueError("--resume-from-checkpoint is --resume here, which takes a checkpoint or 'auto'")
        other_optimizer = "optim" in parser._defaults and namespace.optim != parser._defaults["optim"]
        if other_optimizer and not any(word.startswith(("--optim-args", "--optim_args")) for word in words):
            namespace.optim_args = None  # the default ones belong to the default optimizer
        config = {key: value.value if isinstance(value, Enum) else value for key, value in vars(namespace).items()}
        config = {key: value for key, value in config.items() if key not in ("config", "resume", "allow_changed_data")}
        if adjust is not None:
            adjust(namespace)
        return *parser.parse_dict(vars(namespace)), json.loads(json.dumps(config, default=str))


@contextmanager
def errors_in_one_line(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the program with a one-line message, without a traceback, for errors that the user can fix.

    Args:
        *kinds: The errors; by default those that building a run may raise, which are many.

    Example:
        >>> with errors_in_one_line():
        ...     dataset = load_image_dataset("no/such-set")
        SystemExit: error: 'no/such-set' is neither a local folder nor in the cache, and the Hub could not be reached
    """
    expected = kinds or (ImportError, OSError, RuntimeError, TypeError, ValueError)
    try:
        yield
    except expected as error:
        sys.exit(f"error: {error}")


def begin(args: TrainingArguments, resume: str | None) -> tuple[StopOnSigterm, str | None]:
    """What a training program does before it reads data: seed, SIGTERM, the run's folder, the checkpoint to resume.

    Returns:
        What listens for SIGTERM, for the trainer's callbacks; and the checkpoint, or None.
    """
    set_seed(args.seed)
    quiet_other_processes(args.process_index)
    use_worker_server(args)
    stop, folder = StopOnSigterm().listen(), Path(str(args.output_dir))
    with errors_in_one_line():
        if args.process_index == 0 and folder.is_dir():
            claim_folder(folder)
        return stop, find_checkpoint(resume, folder)


def quiet_libraries() -> None:
    """Progress in lines that people read, and no bars or advice of libraries that nobody asked for."""
    import transformers.trainer

    from .trainer import Progress

    transformers.trainer.DEFAULT_PROGRESS_CALLBACK = Progress
    transformers.utils.logging.disable_progress_bar()  # of loading and saving, which take no time
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator is found")


def quiet_other_processes(process_index: int) -> None:
    """Leaves warnings that all processes would repeat to the first one."""
    if process_index > 0:
        logging.getLogger("pgt_hf").setLevel(logging.ERROR)


def workers_per_process() -> int:
    """Data workers per process: its share of this machine's cores, at most 8."""
    return min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


IMAGE_DEFAULTS: dict[str, Any] = TRAINING_DEFAULTS | {
    "max_grad_norm": 0.0,
    "dataloader_num_workers": workers_per_process(),
    "dataloader_pin_memory": torch.cuda.is_available(),
    "dataloader_drop_last": True,
    "remove_unused_columns": False,
}


def tell(
    heading: str,
    results: Mapping[str, Any],
    folder: str | os.PathLike[str],
    then: Mapping[str, str | None],
    files: Mapping[str, str] | None = None,
    table: str | None = None,
) -> None:
    """Prints what a program found, what it wrote where, and what to do next.

    Args:
        heading: What was done on which data.
        results: Numbers by name; None is left out.
        folder: The run's folder.
        then: Commands by what they do; None is left out.
        files: What is in the folder beside the usual files of a run.
        table: Lines to print below the results.
    """
    print(f"\n{heading}")
    for key, value in results.items():
        if value is not None:
            share = METRICS[key][2] if key in METRICS else "top" in key
            print(f"  {key:20}{f'{value:.2%}' if share else f'{value:,.4g}':>10}")
    if table:
        print(f"\n{table}")
    print(f"\nWritten to {folder}")
    for name, content in (CONTENTS | dict(files or {})).items():
        if any(Path(folder).glob(name)):
            print(f"  {name:20} {content}")
    print("\nWhat next")
    for what, command in then.items():
        if command is not None:
            print(f"  {what:10} {command}")


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any, *, skips: bool) -> None:
    """A bad image that is met on the way is the user's to mend: one line; all else has its traceback."""
    decoding = sys.modules.get("pgt_hf.images.decoding")  # a program for text has none
    if decoding is not None and issubclass(kind, decoding.BadImageError):
        hint = "; --on-bad-image skip leaves such images out" if skips and "--on-bad-image" not in str(error) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


class _Help(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """Shows defaults, and keeps the line breaks of the examples."""
