"""Stops trainings of two processes at random moments, in every way that a machine knows, and resumes them.

    python tests/faults/runs.py --cases 20    # some 40 seconds a case; prints: tried, survived, lost

A fault is survived if no process is left after it and the same command with ``--resume auto`` ends well, with the bits
of the run that was left alone.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parents[1])]
from launch import ROOT, TWO, environment  # noqa: E402

COMMAND = [*TWO, str(ROOT / "recipes" / "imagenet.py")]
OPTIONS = """
    --dataset-name digits --max-train-samples 320 --max-eval-samples 100 --num-train-epochs 8 --ema-decay 0.9
    --mixup 0.2 --dataloader-num-workers 1 --save-strategy steps --save-steps 7 --logging-steps 1
    --eval-strategy epoch --output-dir run --resume auto
"""
COMMAND += OPTIONS.split()


def members(process: subprocess.Popen[bytes]) -> dict[str, list[psutil.Process]]:
    """The processes of a run by what they do."""
    launcher = psutil.Process(process.pid)
    ranks = [child for child in launcher.children() if "imagenet.py" in " ".join(child.cmdline())]
    below = [grandchild for rank in ranks for grandchild in rank.children(recursive=True)]
    return {"launcher": [launcher], "rank": ranks, "worker": below, "all": [launcher, *ranks, *below]}


FAULTS: dict[str, tuple[str, int, bool]] = {  # who is hit, by which signal, all of them or one
    "kill -9 of everything": ("all", signal.SIGKILL, True),
    "kill -9 of the launcher": ("launcher", signal.SIGKILL, True),
    "kill -9 of a process": ("rank", signal.SIGKILL, False),
    "kill -9 of a data worker": ("worker", signal.SIGKILL, False),
    "SIGTERM to the launcher": ("launcher", signal.SIGTERM, True),
    "SIGTERM to everything": ("all", signal.SIGTERM, True),
}


def attempt(
    folder: Path, fault: tuple[str, int, bool] | None, seconds: float, choose: Callable[..., psutil.Process]
) -> str:
    """Starts the run or resumes it; after so many seconds the fault comes. What is wrong, or nothing."""
    with open(folder / "log", "ab") as log:
        words = [*COMMAND, "--resume", "auto"]
        process = subprocess.Popen(
            words, cwd=folder, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(seconds if fault else 500)
            return "" if code == 0 else f"ended with {code}: {tail(folder)}"
        except subprocess.TimeoutExpired:
            if fault is None:
                return "hangs"
        who, how, everyone = fault
        found = members(process)
        for member in found[who] if everyone or not found[who] else [choose(found[who])]:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(how)
        process.wait(200)
        left = psutil.wait_procs(found["all"], timeout=100)[1]
        for member in left:
            member.kill()
        return f"{len(left)} processes are left" if left else ""


def tail(folder: Path) -> str:
    return (folder / "log").read_text(errors="replace").strip().splitlines()[-1]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = ("model.safetensors", "ema/model.safetensors")
    return {f"{file}:{key}": value for file in files for key, value in load_file(folder / "run" / file).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    dice, score = random.Random(given.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name, "whole")
        whole.mkdir()
        started = time.monotonic()
        if wrong := attempt(whole, None, 0, dice.choice):
            sys.exit(f"the run without a fault {wrong}")
        length, expected = time.monotonic() - started, weights(whole)
        for case in range(given.cases):
            fault = list(FAULTS)[case % len(FAULTS)]
            folder, moment = Path(name, str(case)), dice.uniform(0.1, 1.0) * length
            folder.mkdir()
            wrong = attempt(folder, FAULTS[fault], moment, dice.choice) or attempt(folder, None, 0, dice.choice)
            found = {} if wrong else weights(folder)
            if not wrong and not all(torch.equal(found[key], expected[key]) for key in expected):
                wrong = "other weights"
            score["lost" if wrong else "survived"] += 1
            print(f"  {fault} after {moment:.0f} of {length:.0f} s: {wrong or 'survived'}", flush=True)
    print(f"runs: {score.total()} tried, {score['survived']} survived, {score['lost']} lost")


if __name__ == "__main__":
    main()
