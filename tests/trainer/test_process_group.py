"""Two processes on the CPU leave no thread of gloo behind, which could abort them when the interpreter leaves."""

import sys

import pytest
from launch import ROOT, TWO, run

PROGRAM = f"""
import atexit, glob, os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})

def threads():
    return sum("gloo" in open(name).read() for name in glob.glob("/proc/self/task/*/comm"))

# Runs last; one write, which two processes cannot interleave.
atexit.register(lambda: os.write(1, f"left behind: {{threads()}}\\n".encode()))

from tiny import Data, arguments, wrapper
from pgt_hf import PowerGradTrainer

trainer = PowerGradTrainer(wrapper(), arguments("out", ours=True, max_steps=2), train_dataset=Data(16))
trainer.train()
if "end" in sys.argv:
    trainer.end()
assert threads() > 0  # DistributedDataParallel holds them, whether the trainer has ended or not
if "crash" in sys.argv:
    raise ValueError("a crash")
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
@pytest.mark.long
@pytest.mark.parametrize("how", ["end", "leave"])
def test_no_thread_of_gloo_outlives_the_trainer(tmp_path, how):
    (tmp_path / "program.py").write_text(
        f"import sys; sys.path.insert(0, {str(__file__)!r}.rsplit('/', 2)[0])" + PROGRAM
    )
    printed = run(*TWO, "program.py", how, cwd=tmp_path).stdout
    assert printed.count("left behind: 0") == 2


@pytest.mark.slow
def test_crash_is_not_held_up(tmp_path):
    (tmp_path / "program.py").write_text(
        f"import sys; sys.path.insert(0, {str(__file__)!r}.rsplit('/', 2)[0])" + PROGRAM
    )
    failed = run(*TWO, "program.py", "crash", cwd=tmp_path, check=False)
    assert failed.returncode != 0 and "ValueError: a crash" in failed.stderr
