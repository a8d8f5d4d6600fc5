"""Seconds from a command to what it is for: the help on the screen, the first training step on digits.

    python -m benchmarks.startup                               # 5 rounds
    python -m benchmarks.startup --checkout ../other --rounds 3     # this and another checkout, alternated

The commands run in turns; a figure is the median over the rounds. The first step is over when ``history.jsonl`` has
its loss.
"""

import argparse
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


def seconds(command: list[str], root: Path, history: Path | None = None) -> float:
    """Until the command ends; or until there is something in the history, whereupon it is killed."""
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        if history is None:
            failed = process.wait() != 0
        else:
            while not (done := history.is_file() and history.stat().st_size > 0) and process.poll() is None:
                time.sleep(0.005)
            failed = not done
        taken = time.perf_counter() - started
        if history is not None:
            family = [*psutil.Process(process.pid).children(recursive=True), process] if done else []
            for member in family:
                member.kill()
            process.wait()
            psutil.wait_procs(family[:-1])
        if failed:
            log.seek(0)
            sys.exit(f"error: {' '.join(command)} failed: {log.read().decode()[-2000:]}")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkout", type=Path, help="another checkout to compare with")
    args = parser.parse_args()
    roots = {"here": ROOT} | ({"other": args.checkout.resolve()} if args.checkout else {})
    taken: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(args.rounds):
        for name, program in IMPORTS.items():
            taken[name]["here"].append(seconds([*PYTHON, "-c", program], ROOT))
        for place, root in roots.items():
            taken[HELP][place].append(seconds([*PYTHON, "recipes/imagenet.py", "--help"], root))
            for name, launcher in STEPS.items():
                with tempfile.TemporaryDirectory() as folder:
                    command = [*launcher, *DIGITS, folder]
                    taken[name][place].append(seconds(command, root, Path(folder, "history.jsonl")))
    print(f"| | {' | '.join('seconds' if place == 'here' else place for place in roots)} |")
    print(f"|---|{'---|' * len(roots)}")
    for name, places in taken.items():
        print(f"| {name} | " + " | ".join(f"{statistics.median(times):.1f}" for times in places.values()) + " |")


if __name__ == "__main__":
    main()
