"""Starts data workers right after gloo's collectives, over and over: one that inherits a held lock hangs for ever.

python tests/faults/data_workers.py            # 1,000 rounds on each of two processes; prints how many hung
python tests/faults/data_workers.py --fork     # the same with forked workers, as torch starts them on Linux
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch.utils.data import DataLoader, TensorDataset

from pgt_hf.data_workers import worker_options

sys.path[:0] = [str(Path(__file__).parents[1])]
from launch import TWO, environment  # noqa: E402

PATIENCE = 60.0  # seconds; a worker starts in a fraction of one


def rounds(count: int, fork: bool) -> int:
    """How many rounds hung."""
    state, data, hung = PartialState(cpu=True), TensorDataset(torch.arange(4)), 0
    options = {"num_workers": 1, "multiprocessing_context": "fork"} if fork else worker_options(1)
    for _ in range(count):
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
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--fork", action="store_true")
    given = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit(subprocess.run([*TWO, *sys.argv], env=environment()).returncode)
    started = time.monotonic()
    hung = rounds(given.rounds, given.fork)
    seconds = time.monotonic() - started
    print(f"process {PartialState().process_index}: {given.rounds} rounds in {seconds:.0f} s, {hung} hung", flush=True)


if __name__ == "__main__":
    main()
