"""Starts data workers right after gloo's collectives, over and over: one that inherits a held lock hangs for ever.

python tests/faults/data_workers.py            # 2,000 workers on each of two processes; prints how many rounds hung
python tests/faults/data_workers.py --fork     # the same with forked workers, as torch starts them on Linux
"""

import argparse
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch.utils.data import DataLoader, TensorDataset

from pgt_hf.data.workers import worker_options

sys.path[:0] = [str(Path(__file__).parents[1])]
from launch import TWO, environment  # noqa: E402

PATIENCE = 60.0  # seconds; a worker starts in a fraction of one
WORKERS = 8  # that are started in a round, each for one example


def rounds(count: int, fork: bool) -> int:
    """How many rounds hung."""
    warnings.filterwarnings("ignore", message=".*worker processes in total")
    state, data, hung = PartialState(cpu=True), TensorDataset(torch.arange(WORKERS)), 0
    options = worker_options(WORKERS)
    if fork:
        options = {"num_workers": WORKERS, "multiprocessing_context": "fork"}
    for done in range(count):
        if done % 25 == 0:
            state.print(f"{WORKERS * done:,} workers on each process, {hung} rounds hung", flush=True)
        for _ in range(20):
            broadcast(torch.ones(8))
        try:
            list(DataLoader(data, timeout=PATIENCE, **options))
        except RuntimeError:
            hung += 1
        state.wait_for_everyone()
    return hung


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=250)
    parser.add_argument("--fork", action="store_true")
    given = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit(subprocess.run([*TWO, *sys.argv], env=environment()).returncode)
    started = time.monotonic()
    hung = rounds(given.rounds, given.fork)
    seconds, state = time.monotonic() - started, PartialState()
    print(
        f"process {state.process_index}: {WORKERS * given.rounds:,} workers in {seconds:.0f} s, {hung} of "
        f"{given.rounds} rounds hung",
        flush=True,
    )
    state.destroy_process_group()


if __name__ == "__main__":
    main()
