"""Data workers end with their program, whatever ends it, and ignore the SIGTERM that it answers."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import os, signal, sys, time
import psutil
import torch
from torch.utils.data import DataLoader, TensorDataset
from pgt_hf.data_workers import guard_workers, worker_options

def main():
    loader = DataLoader(TensorDataset(torch.arange(1000)), **worker_options(2))
    batches = iter(guard_workers(loader))
    next(batches)
    below = psutil.Process().children(recursive=True)
    print(*[process.pid for process in below], flush=True)
    {end}

if __name__ == "__main__":
    main()
"""
ENDS = {
    "kill -9": "os.kill(os.getpid(), signal.SIGKILL)",
    "an exception": "raise RuntimeError",
    "SIGTERM to the workers": "[process.terminate() for process in below]; print(len(list(batches)))",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_workers_are_gone_when_their_program_is(tmp_path, end):
    (tmp_path / "program.py").write_text(PROGRAM.format(end=end))
    process = subprocess.Popen([sys.executable, "program.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    printed = process.communicate(timeout=200)[0].split("\n")
    assert process.returncode == {"os": -signal.SIGKILL, "ra": 1, "[p": 0}[end[:2]]
    assert printed[1] == ("999" if end.startswith("[") else "")
    left = [int(pid) for pid in printed[0].split()]
    assert len(left) >= 3  # the server and two workers
    for _ in range(300):
        left = [pid for pid in left if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        if not left:
            return
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    raise AssertionError("workers are left")
