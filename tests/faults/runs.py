"""Stops trainings of two processes at random moments and in the midst of what they write, in every way, and resumes.

    python tests/faults/runs.py --cases 24    # some 40 seconds a case; prints: tried, survived, lost

A fault is survived if no process is left after it, if a run that was terminated says how to go on, and if the same
command with ``--resume auto`` then ends well, with the bits of the run that was left alone.
"""

import argparse
import json
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
    --dataset-name digits --max-train-samples 320 --max-eval-samples 100 --num-train-epochs 4 --ema-decay 0.9
    --model-name test_resnet --mixup 0.2 --dataloader-num-workers 1 --save-strategy steps --save-steps 4
    --logging-steps 1 --eval-strategy epoch --output-dir run --resume auto
"""
COMMAND += OPTIONS.split()


def members(process: subprocess.Popen[bytes]) -> dict[str, list[psutil.Process]]:
    """The processes of a run by what they do."""
    launcher = psutil.Process(process.pid)
    ranks = [child for child in launcher.children() if "imagenet.py" in " ".join(child.cmdline())]
    below = [grandchild for rank in ranks for grandchild in rank.children(recursive=True)]
    return {"launcher": [launcher], "rank": ranks, "worker": below, "all": [launcher, *ranks, *below]}


PATIENCE = 900  # seconds, on a busy machine
FAULTS: dict[str, tuple[str, int, bool]] = {  # who is hit, by which signal, all of them or one
    "kill -9 of everything": ("all", signal.SIGKILL, True),
    "SIGTERM to the launcher": ("launcher", signal.SIGTERM, True),
    "kill -9 of the launcher": ("launcher", signal.SIGKILL, True),
    "SIGTERM to everything": ("all", signal.SIGTERM, True),
    "kill -9 of a process": ("rank", signal.SIGKILL, False),
    "kill -9 of a data worker": ("worker", signal.SIGKILL, False),
}
MOMENTS = {  # how far the run is when it has written this; the others come at random
    "as it begins": "run/run.json",
    "while a checkpoint is saved": "run/.unfinished-checkpoint",
    "after an evaluation": "run/training_curve.png",
    "at the final save": "run/.unfinished-model",
    "in the last evaluation": "run/model.safetensors",
    "before the report": "run/metrics.json",
}


def attempt(
    folder: Path,
    fault: tuple[str, int, bool] | None = None,
    due: Callable[[float], bool] = lambda seconds: False,
    choose: Callable[..., psutil.Process] = random.choice,
) -> str:
    """Starts the run or resumes it; the fault comes when it is due. What is wrong, or nothing."""
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(
            COMMAND, cwd=folder, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
        try:
            return watch(process, folder, fault, due, choose)
        except subprocess.TimeoutExpired:
            return "does not end"
        finally:
            if process.poll() is None:
                for member in members(process)["all"]:
                    member.kill()


def watch(
    process: subprocess.Popen[bytes],
    folder: Path,
    fault: tuple[str, int, bool] | None,
    due: Callable[[float], bool],
    choose: Callable[..., psutil.Process],
) -> str:
    started = time.monotonic()
    while process.poll() is None and not due(time.monotonic() - started):
        time.sleep(0.002)
        if time.monotonic() - started > PATIENCE:
            return "does not end"
    if process.poll() is not None or fault is None:
        return "" if process.returncode == 0 else f"ended with {process.returncode}: {tail(folder)}"
    who, how, everyone = fault
    found = members(process)
    for member in found[who] if everyone or not found[who] else [choose(found[who])]:
        with suppress(psutil.NoSuchProcess):
            member.send_signal(how)
    process.wait(PATIENCE)
    left = psutil.wait_procs(found["all"], timeout=100)[1]
    for member in left:
        member.kill()
    if left:
        return f"{len(left)} processes are left"
    told = (folder / "log").read_text(errors="replace").count("\nStopped by ")
    begun = (folder / "run" / "run.json").is_file()
    return f"says {told} times how to go on" if how == signal.SIGTERM and begun and told != 1 else ""


def tail(folder: Path) -> str:
    return (folder / "log").read_text(errors="replace").strip().splitlines()[-1]


def results(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and metrics."""
    files = ("model.safetensors", "ema/model.safetensors")
    found = {f"{file}:{key}": value for file in files for key, value in load_file(folder / "run" / file).items()}
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    numbers = {key: value for key, value in metrics.items() if isinstance(value, float) and key != "seconds"}
    return found | {key: torch.tensor(value) for key, value in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case, to go on with a campaign")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and the run that is going on is killed
    score = Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name, "whole")
        whole.mkdir()
        started = time.monotonic()
        if wrong := attempt(whole):
            sys.exit(f"the run without a fault {wrong}")
        length, expected = time.monotonic() - started, results(whole)
        for case in range(given.first, given.first + given.cases):
            dice = random.Random(1000 * given.seed + case)
            fault, folder = list(FAULTS)[case % len(FAULTS)], Path(name, str(case))
            folder.mkdir()
            seconds = dice.uniform(0.02, 1.0) * length
            moment, sign = f"after {seconds:.0f} of {length:.0f} s", None
            if case % 2 == case // len(FAULTS) % 2:  # every fault gets both kinds of moments
                moment, path = dice.choice(list(MOMENTS.items()))
                sign = folder / path

            def due(passed: float, sign: Path | None = sign, seconds: float = seconds) -> bool:
                return sign.exists() if sign is not None else passed > seconds

            wrong = attempt(folder, FAULTS[fault], due, dice.choice) or attempt(folder)
            found = {} if wrong else results(folder)
            if not wrong and not all(torch.equal(found[key], expected[key]) for key in expected):
                other = [key for key in expected if not torch.equal(found[key], expected[key])]
                wrong = f"{len(other)} other results, as {other[0]}"
            score["lost" if wrong else "survived"] += 1
            print(f"  {case}: {fault}, {moment}: {wrong or 'survived'}", flush=True)
    print(f"runs: {score.total()} tried, {score['survived']} survived, {score['lost']} lost")


if __name__ == "__main__":
    main()
