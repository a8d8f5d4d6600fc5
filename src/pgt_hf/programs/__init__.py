"""What the recipes share: parsing arguments, errors in one line, and a summary at the end."""

import json
import logging
import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import TrainingArguments, set_seed

from ..data.workers import use_worker_server
from ..limits import ExistingPath
from ..runs import environment
from ..runs.folder import claim_folder
from ..runs.record import CONTENTS, METRICS, read_record
from ..trainer.checkpoint_folders import find_checkpoint
from .command_line import errors_in_one_line, parse, quiet_libraries, read_config

__all__ = [
    "IMAGE_DEFAULTS",
    "TRAINING_DEFAULTS",
    "RunArguments",
    "begin",
    "errors_in_one_line",
    "fit_global_batch",
    "next_commands",
    "parse",
    "quiet_libraries",
    "quiet_other_processes",
    "read_config",
    "refuse_large_batch",
    "refuse_other_run",
    "tell",
    "workers_per_process",
]


TRAINING_DEFAULTS: dict[str, Any] = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 0.02,  # as a share of the run, so that a short one also has a curve
    "logging_first_step": True,
    "report_to": "none",
    "ddp_find_unused_parameters": False,
}


@dataclass
class RunArguments:
    """Arguments of every program that trains."""

    resume: Annotated[str | None, ExistingPath("folder", names=("auto",))] = field(
        default=None, metadata={"help": "A checkpoint to resume from, or 'auto' for the newest one, if any."}
    )
    allow_changed_data: bool = field(default=False, metadata={"help": "Resume although the data has changed."})
    smoke: bool = field(default=False, metadata={"help": "Run a few steps on embedded data, as a quick check."})


def fit_global_batch(settings: Namespace, given: set[str]) -> None:
    """Sets the batch per process, accumulation and learning rate for a global batch that any machine can train."""
    if {"base_lr", "learning_rate"} <= given:
        raise ValueError(f"base_lr must be left out with learning_rate, which it sets, got {settings.base_lr}")
    processes, asked = int(os.environ.get("WORLD_SIZE", "1")), settings.gradient_accumulation_steps
    each, rest = divmod(settings.global_batch, processes)
    if rest or each < 1:
        raise ValueError(f"global_batch must be a multiple of the {processes} processes, got {settings.global_batch}")
    largest = settings.per_device_train_batch_size
    allowed = [n for n in range(1, each + 1) if each % n == 0 and each // n <= largest]
    steps = asked if "gradient_accumulation_steps" in given else allowed[0]
    if steps not in allowed:
        raise ValueError(
            f"gradient_accumulation_steps must be one of {', '.join(map(str, allowed))}, which divide the {each} "
            f"images of a process and update into batches of at most {largest}, got {steps}"
        )
    settings.per_device_train_batch_size, settings.gradient_accumulation_steps = each // steps, steps
    if settings.learning_rate is None:
        settings.learning_rate = settings.base_lr * settings.global_batch / 1024


def begin(args: TrainingArguments, resume: str | None) -> str | None:
    """Before data is read: sets the seed, claims the run's folder, returns the checkpoint to resume from, if any."""
    set_seed(args.seed)
    quiet_other_processes(args.process_index)
    use_worker_server(args)
    folder = Path(str(args.output_dir))
    with errors_in_one_line():
        if args.process_index == 0 and folder.is_dir():
            claim_folder(folder)
        return find_checkpoint(resume, folder)


def refuse_large_batch(name: str, batch: int, images: int, processes: int = 1, whose: str = "") -> None:
    """Raises ValueError if a batch takes more images than there are for each process."""
    if batch > images // processes:
        raise ValueError(
            f"{name} must be at most {images // processes}, the training images{whose} for each process, got {batch}"
        )


def refuse_other_run(folder: str | os.PathLike[str], argument: str | None = None) -> None:
    """Raises ValueError if the folder holds the run of another program: one whose record lacks ``argument``."""
    record = read_record(folder)
    if record and argument not in record.get("arguments", {}):
        raise ValueError(f"output_dir must not be the folder of another program's run, got {os.fspath(folder)!r}")


def refuse_other_settings(
    folder: str | os.PathLike[str], before: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Raises ValueError if what is in the folder was made with other values of ``settings``, as JSON has them."""
    asked = json.loads(json.dumps(dict(settings)))
    other = [f"{key}={before.get(key)!r}, now {now!r}" for key, now in asked.items() if before.get(key) != now]
    if other:
        raise ValueError(
            f"{os.fspath(folder)} was begun with other settings ({'; '.join(other)}): use these, delete it, or choose "
            "another output_dir"
        )


def quiet_other_processes(process_index: int) -> None:
    """Lets only the first process log warnings."""
    if process_index > 0:
        logging.getLogger("pgt_hf").setLevel(logging.ERROR)


def workers_per_process() -> int:
    """Data workers per process: its share of the machine's cores, at most 8."""
    return min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


IMAGE_DEFAULTS: dict[str, Any] = TRAINING_DEFAULTS | {
    "max_grad_norm": 0.0,
    "dataloader_num_workers": workers_per_process(),
    "dataloader_pin_memory": torch.cuda.is_available(),
    "dataloader_drop_last": True,
    "remove_unused_columns": False,
}


def next_commands(args: TrainingArguments) -> dict[str, str | None]:
    """The commands that come after a training: train as long again, train without PGT to compare, publish.

    The second one writes to a folder of its own and pushes nothing.
    """
    folder = Path(str(args.output_dir))
    longer = {"num_train_epochs": f"{2 * args.num_train_epochs:g}"}
    if args.max_steps > 0:
        longer = {"max_steps": f"{2 * args.max_steps}"}
    own = dict.fromkeys((name for name in vars(args) if name.startswith(("hub_", "push_to_hub"))), None)
    plain = environment.command_line(**own, resume=None, alpha=1, output_dir=f"{folder}-plain")
    return {
        "go on": environment.command_line(resume="auto", **longer) if any(folder.glob("checkpoint-*")) else None,
        "compare": plain if getattr(args, "alpha", 1) != 1 else None,
        "publish": environment.command("pgt-hf", "push", str(folder), "--repo-id", "YOU/NAME"),
    }


def tell(
    heading: str,
    results: Mapping[str, Any],
    folder: str | os.PathLike[str],
    then: Mapping[str, str | None],
    files: Mapping[str, str] | None = None,
    table: str | None = None,
) -> None:
    """Prints a program's results, the files that it wrote, and commands to run next.

    Args:
        heading: What was done on which data.
        results: Numbers by name; None is left out.
        folder: The run's folder.
        then: Commands by purpose; None is left out.
        files: Descriptions of files other than the usual ones of a run.
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
    for what, line in then.items():
        if line is not None:
            print(f"  {what:10} {line}")
