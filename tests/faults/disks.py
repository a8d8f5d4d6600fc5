"""Trains in a folder whose disk fills up, turns read-only or loses the folder; mends that, and resumes.

    python tests/faults/disks.py             # Linux; the disks are tmpfs in a mount namespace of its own
    python tests/faults/disks.py --sizes 8   # fewer sizes of the disk that fills up

A fault is survived if the run ends well or with one line and no traceback, and if the same command, once there is room
again, ends with the bits and the metrics of the run that was left alone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from kill_at_file_events import Killed, kill_at  # noqa: E402
from launch import load_recipe  # noqa: E402

OPTIONS = """
    --dataset-name digits --max-train-samples 128 --max-eval-samples 40 --max-steps 8 --global-batch 32
    --model-name test_resnet --ema-decay 0.9 --save-strategy steps --save-steps 3 --save-total-limit 2
    --logging-steps 1 --eval-strategy epoch
    --dataloader-num-workers 0 --resume auto --output-dir
"""


def train(run: Path) -> Killed:
    module = load_recipe("imagenet")
    sys.argv = ["imagenet.py", *OPTIONS.split(), str(run)]
    return kill_at(None, module.main, run)


def mount(disk: Path, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(disk)], check=True)


def unmount(disk: Path) -> None:
    subprocess.run(["umount", str(disk)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def results(run: Path) -> dict[str, torch.Tensor]:
    files = ("model.safetensors", "ema/model.safetensors")
    found = {f"{file}:{key}": value for file in files for key, value in load_file(run / file).items()}
    metrics = json.loads((run / "metrics.json").read_text())
    numbers = {key: value for key, value in metrics.items() if isinstance(value, float) and key != "seconds"}
    return found | {key: torch.tensor(value) for key, value in numbers.items()}


def judge(ended: Killed, run: Path, expected: dict[str, torch.Tensor]) -> str:
    """What is wrong with how a run ended under a fault, or with how it goes on after it."""
    lines = [line for line in ended.output.splitlines() if line.startswith("error:")]
    if "Traceback" in ended.output:
        return "a traceback: " + ended.output.strip().splitlines()[-1]
    if ended.returncode and len(lines) != 1:
        return f"ended with {ended.returncode} and {len(lines)} lines that say why"
    again = train(run)
    if again.returncode:
        return "does not resume: " + again.output.strip().splitlines()[-1]
    found = results(run)
    other = [key for key in expected if not torch.equal(expected[key], found[key])]
    return f"{len(other)} other results, as {other[0]}" if other else ""


def full(disk: Path, size: int, expected: dict[str, torch.Tensor]) -> tuple[str, str]:
    mount(disk, f"size={size}")
    ended = train(disk / "run")
    remount(disk, "size=1g")
    return told(ended), judge(ended, disk / "run", expected)


def bind(disk: Path, place: Path) -> None:
    subprocess.run(["mount", "--bind", str(disk), str(place)], check=True)


def read_only(disk: Path) -> None:
    """For all that is opened from now on: a disk with an open file, as the run's lock, cannot be remounted itself."""
    other = disk.with_name("read-only")
    other.mkdir()
    bind(disk, other)
    remount(other, "bind,ro")
    bind(other, disk)


def writable(disk: Path) -> None:
    unmount(disk)
    other = disk.with_name("read-only")
    unmount(other)
    other.rmdir()


def meanwhile(
    disk: Path, trouble: Callable[[], object], mend: Callable[[], object], expected: dict[str, torch.Tensor]
) -> tuple[str, str]:
    """The trouble comes when the second checkpoint is there."""
    mount(disk, "size=1g")
    run, over = disk / "run", threading.Event()

    def wait() -> bool:
        while not (run / "checkpoint-6").exists():
            if over.wait(0.002):
                return False
        trouble()
        return not over.is_set()

    with ThreadPoolExecutor(1) as pool:
        in_time = pool.submit(wait)
        ended = train(run)
        over.set()
        if not in_time.result():
            return told(ended), "the trouble came too late"
    mend()
    return told(ended), judge(ended, run, expected)


def told(ended: Killed) -> str:
    lines = [line for line in ended.output.splitlines() if line.startswith("error:") or "not written" in line]
    return f"exit {ended.returncode}, {lines[-1] if lines else 'nothing said'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=24, help="how many sizes of the disk that fills up to try")
    given = parser.parse_args()
    if "OWN_MOUNTS" not in os.environ:
        command = ["unshare", "--map-root-user", "--mount", sys.executable, *sys.argv]
        sys.exit(
            subprocess.run(command, env=os.environ | {"OWN_MOUNTS": "1", "ACCELERATE_USE_CPU": "true"}).returncode
        )
    score = Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        disk, whole = Path(name, "disk"), Path(name, "whole")
        disk.mkdir()
        ended = train(whole)
        if ended.returncode:
            sys.exit(f"the run without a fault ended with {ended.returncode}: {ended.output}")
        expected, largest = results(whole), sum(path.stat().st_size for path in whole.rglob("*"))
        cases: dict[str, Callable[[], tuple[str, str]]] = {}
        for number in range(1, given.sizes + 1):
            size = 4096 + largest * 3 // 2 * number // given.sizes
            cases[f"{size / largest:.0%} of the room"] = lambda size=size: full(disk, size, expected)
        cases["read-only in between"] = lambda: meanwhile(
            disk, lambda: read_only(disk), lambda: writable(disk), expected
        )
        cases["full in between"] = lambda: meanwhile(
            disk,
            lambda: remount(disk, f"size={shutil.disk_usage(disk).used + 4096}"),
            lambda: remount(disk, "size=1g"),
            expected,
        )
        cases["the folder removed"] = lambda: meanwhile(
            disk, lambda: shutil.rmtree(disk / "run"), lambda: None, expected
        )
        for case, attempt in cases.items():
            said, wrong = attempt()
            unmount(disk)
            score["lost" if wrong else "survived"] += 1
            print(f"  {case}: {said.replace(name, '')}; {wrong or 'survived'}", flush=True)
    print(f"disks: {score.total()} tried, {score['survived']} survived, {score['lost']} lost")


if __name__ == "__main__":
    main()
