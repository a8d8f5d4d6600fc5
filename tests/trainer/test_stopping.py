"""SIGTERM before, in and after training, in programs that are stopped as a scheduler would stop them."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from launch import TWO, environment
from small import build

from pgt_hf.trainer import StopOnSigterm

pytestmark = pytest.mark.slow

PROGRAM = """
import pathlib, sys, time
sys.path.insert(0, {tests!r})
from pgt_hf.trainer import StopOnSigterm
stop = StopOnSigterm().listen()
{body}
"""
BEFORE = "print('here', flush=True); time.sleep(60)"
WAITING = """
from accelerate import PartialState
state = PartialState()
if state.is_main_process:
    print('here', flush=True)
    time.sleep(60)
state.wait_for_everyone()
"""
AFTER = """
import small
small.build(pathlib.Path("run"), save_strategy="epoch", num_train_epochs=1, callbacks=[stop]).train()
print('here', flush=True)
time.sleep(60)
"""
TRAINING = """
import small
from transformers import TrainerCallback
class Slow(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        print('here', flush=True)
        time.sleep(0.5)
if __name__ == "__main__":  # and not in a data worker
    trainer = small.build(pathlib.Path("run"), max_steps=500, dataloader_num_workers=1, callbacks=[Slow(), stop])
    trainer.train()
    stop.leave(trainer)
"""


def stopped(folder: Path, body: str, launcher: list[str], send: Callable[[subprocess.Popen[bytes]], None]) -> Any:
    """The status and the words of a program that was sent a signal once it had said "here"."""
    (folder / "program.py").write_text(PROGRAM.format(tests=str(Path(__file__).parent), body=body))
    with open(folder / "log", "w") as log:
        # Whatever started the tests may ignore Ctrl-C, and processes inherit that.
        process = subprocess.Popen(
            [*launcher, "program.py", "--flag"], cwd=folder, env=environment(), stdout=log, stderr=log,
            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        while "here" not in (folder / "log").read_text():
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        time.sleep(1)
        send(process)
        return process.wait(timeout=100), (folder / "log").read_text()


@pytest.mark.parametrize(
    ("body", "launcher", "words"),
    [
        (BEFORE, [sys.executable], "Stopped by SIGTERM; run it again with: "),
        (WAITING, TWO, "Stopped by SIGTERM; run it again with: "),
        pytest.param(
            AFTER, [sys.executable], "Stopped by SIGTERM after the last step; resume with: ", marks=pytest.mark.long
        ),
    ],
    ids=["loading", "waiting for another process", "after training"],
)
def test_sigterm_outside_of_training_ends_the_program_at_once_with_one_line(tmp_path, body, launcher, words):
    status, printed = stopped(tmp_path, body, launcher, lambda process: process.send_signal(signal.SIGTERM))
    assert printed.count(words) == 1, printed
    if launcher != TWO:
        assert status == 143 and "Traceback" not in printed


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """What Ctrl-C does in a terminal: all processes of the session's foreground get it."""
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.parametrize(
    "launcher", [pytest.param([sys.executable], marks=pytest.mark.long), TWO], ids=["alone", "launched"]
)
def test_interrupt_in_training_saves_a_checkpoint(tmp_path, launcher):
    status, printed = stopped(tmp_path, TRAINING, launcher, interrupt)
    assert printed.count("Stopped by Ctrl-C at step ") == 1 and "; resume with: " in printed, printed
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    if launcher != TWO:  # torch's own ends with a traceback
        assert status == 130 and "Traceback" not in printed


def test_interrupt_before_training_ends_the_program_and_a_second_one_ends_the_training(tmp_path):
    status, printed = stopped(tmp_path, BEFORE, [sys.executable], interrupt)
    assert status == 130 and "Stopped by Ctrl-C; run it again with: " in printed and "Traceback" not in printed

    def twice(process: subprocess.Popen[bytes]) -> None:
        interrupt(process)
        time.sleep(0.2)
        interrupt(process)

    endless = TRAINING.replace("time.sleep(0.5)", "time.sleep(60)")  # no step ends between the two
    status, printed = stopped(tmp_path, endless, [sys.executable], twice)
    assert status == -signal.SIGINT and "KeyboardInterrupt" in printed
    assert not list((tmp_path / "run").glob("checkpoint-*"))


ORPHAN = """
import os, time
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.01)
    print(os.getppid(), flush=True)
"""
LATE = """
import time
print('here', flush=True)
time.sleep(2)
from pgt_hf.trainer import StopOnSigterm
StopOnSigterm().listen()
time.sleep(600)
"""


def test_processes_whose_launcher_is_killed_before_they_listen_stop_by_themselves(tmp_path):
    command = [sys.executable, "-c", ORPHAN]
    adopted = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)
    if adopted.stdout.strip() != "1" or "python" in psutil.Process(1).cmdline()[0]:
        pytest.skip("here it is no init process that adopts orphans")
    (tmp_path / "program.py").write_text(LATE)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*TWO, "program.py"], cwd=tmp_path, env=environment(), stdout=log, stderr=log)
        while (tmp_path / "log").read_text().count("here") < 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        ranks = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
    left = psutil.wait_procs(ranks, timeout=100)[1]
    for rank in left:
        rank.kill()
    assert not left, "processes go on without their launcher"
    assert (tmp_path / "log").read_text().count("Stopped by the end of its launcher;") == 1


def test_callback_alone_gives_the_signal_back_after_training(tmp_path):
    before, threads = signal.getsignal(signal.SIGTERM), set(threading.enumerate())
    stop = StopOnSigterm()
    build(tmp_path, max_steps=1, callbacks=[stop]).train()
    assert signal.getsignal(signal.SIGTERM) is before and not stop.stopped
    for thread in set(threading.enumerate()) - threads:  # it must not go round in circles either
        thread.join(10)
        assert not thread.is_alive(), thread.name


def test_child_that_is_forked_dies_of_sigterm_and_its_parent_does_not(tmp_path):
    program = PROGRAM.format(tests=".", body=(
        "import os, signal\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(60)\n"
        "time.sleep(0.5); os.kill(child, signal.SIGTERM)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])); time.sleep(1); print('alive')\n"
    ))  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == [str(-signal.SIGTERM), "alive"], done.stderr
