"""Seconds from a command to what it is for: the help on the screen, the first training step on digits.

    python -m benchmarks.startup                               # 5 rounds
    python -m benchmarks.startup --checkout ../other --rounds 3     # this and another checkout, alternated

The commands run in turns; a figure is the median over the rounds. The first step is over when ``history.jsonl`` has
its loss. CPU seconds are those of all processes of a command together.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
PYTHON = [sys.executable]
LAUNCH = [*PYTHON, "-m", "accelerate.commands.launch"]
ONE = [*LAUNCH, "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
TWO = [*LAUNCH, "--config_file", "recipes/configs/cpu.yaml"]
DIGITS = ["recipes/imagenet.py", "--dataset-name", "digits", "--logging-steps", "1", "--output-dir"]
IMPORTS = {
    "import torch": "import torch",
    "import of Trainer and timm": "import timm, transformers.trainer",
    "import of TrainingArguments": "import transformers.training_args",
}
STEPS = {
    "first step, `python recipes/imagenet.py`": PYTHON,
    "first step, `accelerate launch`, 1 process": ONE,
    "first step, `accelerate launch`, 2 processes": TWO,
}
HELP = "`recipes/imagenet.py --help`"


def seconds(command: list[str], root: Path, history: Path | None = None) -> tuple[float, float]:
    """Of the clock, and of the processors, until the command ends; or until there is something in the history."""
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        started, used = time.perf_counter(), sum(os.times()[2:4])
        process = psutil.Popen(command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        while not (stepped := bool(history and history.is_file() and history.stat().st_size)):
            if process.poll() is not None:
                break
            time.sleep(0.01)
        taken = time.perf_counter() - started
        members = family(process)
        used = sum(sum(member.cpu_times()) for member in members) if stepped else sum(os.times()[2:4]) - used
        for member in members:
            member.kill()
        psutil.wait_procs(members, timeout=10)  # they may still write into the folder
        if not stepped and (history or process.returncode):
            log.seek(0)
            sys.exit(f"error: {' '.join(command)} failed: {log.read().decode()[-2000:]}")
    return taken, used


def family(process: psutil.Popen) -> list[psutil.Process]:
    """A program that runs, and all that it has started: a launcher puts each process into a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [*process.children(recursive=True), process]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="the commands whose names contain this")
    parser.add_argument("--checkout", type=Path, help="another checkout to compare with")
    args = parser.parse_args()
    roots = {"here": ROOT} | ({"other": args.checkout.resolve()} if args.checkout else {})
    taken: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    chosen = [name for name in (*IMPORTS, HELP, *STEPS) if args.only in name]
    for _, (place, root), name in itertools.product(range(args.rounds), roots.items(), chosen):
        with tempfile.TemporaryDirectory() as folder:
            history = Path(folder, "history.jsonl")
            if name in STEPS:
                taken[name][place].append(seconds([*STEPS[name], *DIGITS, folder], root, history))
            else:
                command = ["-c", IMPORTS[name]] if name in IMPORTS else ["recipes/imagenet.py", "--help"]
                taken[name][place].append(seconds([*PYTHON, *command], root))
        print(name, place, *(f"{found:.1f}" for found in taken[name][place][-1]), file=sys.stderr, flush=True)
    heads = [f"{what}{' there' * (place != 'here')}" for place in roots for what in ("seconds", "CPU seconds")]
    print(f"| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for name, places in taken.items():
        medians = [statistics.median(column) for times in places.values() for column in zip(*times, strict=True)]
        print(f"| {name} | " + " | ".join(f"{median:.1f}" for median in medians) + " |")


if __name__ == "__main__":
    main()
