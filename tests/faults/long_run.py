"""Trains, evaluates and saves on two processes for hours; prints whether memory, open files and speed stay flat.

    python tests/faults/long_run.py                            # two hours
    python tests/faults/long_run.py --minutes 10 --keep run    # leaves the run's folder, with its log, for a look

Memory is what a process alone holds (its unique set size): what is only mapped, and shared with others, does not grow.
CPU time shows the speed on a machine that does other work as well.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from launch import ROOT, TWO, environment  # noqa: E402
from runs import members  # noqa: E402

OPTIONS = """
    --dataset-name digits --model-name test_resnet --max-steps 10000000 --warmup-epochs 1 --ema-decay 0.99 --mixup 0.2
    --dataloader-num-workers 1 --max-train-samples 640 --eval-strategy steps --eval-steps 20 --save-strategy steps
    --save-steps 40 --save-total-limit 2 --logging-steps 5 --log-level error --output-dir run
"""


def sample(ranks: list[psutil.Process], folder: Path) -> dict[str, float]:
    """What each process holds, and how far the run is."""
    history = (folder / "run" / "history.jsonl").read_text().splitlines()
    found: dict[str, float] = {"step": max(json.loads(line).get("step", 0) for line in history)}
    for number, rank in enumerate(ranks):
        found[f"MB of process {number}"] = rank.memory_full_info().uss / 2**20
        found[f"open files of process {number}"] = rank.num_fds()
        found[f"CPU s of process {number}"] = sum(rank.cpu_times()[:2])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--every", type=float, default=60, help="seconds between samples")
    parser.add_argument("--keep", type=Path, help="the folder to run in; by default one that is deleted at the end")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        command = [*TWO, str(ROOT / "recipes" / "imagenet.py"), *OPTIONS.split()]
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)
        try:
            samples = watch(process, folder, given.minutes * 60, given.every)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
    report(samples, given.every)


def watch(process: subprocess.Popen[bytes], folder: Path, seconds: float, every: float) -> list[dict[str, float]]:
    while not (folder / "run" / "history.jsonl").exists():
        if process.poll() is not None:
            sys.exit((folder / "log").read_text())
        time.sleep(1)
    samples, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(every)
        samples.append(sample(members(process)["rank"], folder))
        shown = (f"{name} {value:,.0f}" for name, value in samples[-1].items())
        print(f"{len(samples) * every / 60:.0f} min: {', '.join(shown)}", flush=True)
    return samples


def report(samples: list[dict[str, float]], every: float) -> None:
    """The second tenth of the run, when all is warm, and the last one: medians of what is held, means of the speed."""
    tenth = max(1, len(samples) // 10)
    parts = samples[tenth : 2 * tenth + 1], samples[-tenth - 1 :]
    print(f"{samples[-1]['step']:,.0f} steps in {len(samples) * every / 60:.0f} minutes")
    print("| | at first | at the end |\n|---|---|---|")
    steps = [part[-1]["step"] - part[0]["step"] for part in parts]
    print("| steps a minute |", *(f"{taken * 60 / (tenth * every):,.0f} |" for taken in steps))
    for name in [name for name in samples[0] if name != "step"]:
        if name.startswith("CPU"):
            spent = [part[-1][name] - part[0][name] for part in parts]
            values = [100 * seconds / taken for seconds, taken in zip(spent, steps, strict=True)]
            print(f"| {name}, for 100 steps |", *(f"{value:,.1f} |" for value in values))
        else:
            values = [statistics.median(entry[name] for entry in part) for part in parts]
            print(f"| {name} |", *(f"{value:,.0f} |" for value in values))


if __name__ == "__main__":
    main()
