"""The driver itself: it sees every event, of all processes, and kills before the one that was asked for."""

import os
import sys
import time
from pathlib import Path

import pytest
from kill_at_file_events import kill_at, tear

PROGRAM = """
import os, shutil, subprocess, sys
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir()
(folder / "draft").write_text("new")
os.replace(folder / "draft", folder / "file")
child = [sys.executable, "-c", "import sys; open(sys.argv[1], 'a').close()", str(folder / "child")]
subprocess.run(child, check=True, start_new_session=True)
(folder / "old").mkdir()
(folder / "old" / "a").touch()
shutil.rmtree(folder / "old")
print("the end")
"""
EVENTS = ["os.mkdir .", "open draft", "os.rename draft file", "open child", "os.mkdir old", "open old/a"]
EVENTS += ["shutil.rmtree old", "os.remove old/a", "os.rmdir old"]


def test_every_event_of_all_processes_is_seen_and_the_program_is_killed_before_the_one_asked_for(tmp_path):
    whole = kill_at(None, [sys.executable, "-c", PROGRAM, str(tmp_path / "0")], tmp_path / "0")
    assert (whole.returncode, whole.events, whole.output) == (0, EVENTS, "the end\n")
    for number, left in ((1, None), (2, []), (3, ["draft"]), (4, ["file"]), (8, ["child", "file", "old", "old/a"])):
        folder = tmp_path / str(number)
        killed = kill_at(number, [sys.executable, "-c", PROGRAM, str(folder)], folder)
        assert (killed.returncode, killed.events) == (-9, EVENTS[:number])
        found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else None
        assert found == left


def test_a_function_is_killed_in_a_fork_and_this_process_goes_on(tmp_path):
    def write():
        print("begun")
        if os.fork() == 0:
            time.sleep(60)  # a child that would outlive it
        (tmp_path / "a").write_text("a")
        Path(tmp_path, "a").rename(tmp_path / "b")

    assert kill_at(2, write, tmp_path).returncode == -9
    assert os.listdir(tmp_path) == ["a"]
    done = kill_at(None, write, tmp_path)
    assert (done.returncode, done.events, done.output) == (0, ["open a", "os.rename a b"], "begun\n")
    assert kill_at(None, lambda: sys.exit("error: no"), tmp_path).returncode == 1
    with pytest.raises(ValueError, match="event_number must be at least 1, got 0"):
        kill_at(0, write, tmp_path)


def test_the_file_written_last_is_torn(tmp_path):
    assert tear(tmp_path) is None
    for time_, name in enumerate(("first", "last", "middle")):
        (tmp_path / name).write_bytes(b"12345678")
        os.utime(tmp_path / name, ns=(0, 10 if name == "last" else time_))
    assert tear(tmp_path) == tmp_path / "last"
    assert (tmp_path / "last").read_bytes() == b"1234"


def test_a_worker_in_a_session_of_its_own_dies_with_its_launcher(tmp_path):
    worker = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(100)"
    launcher = (
        "import subprocess, sys; from pathlib import Path\n"
        f"command = [sys.executable, '-c', {worker!r}]\n"
        "worker = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)\n"
        "print(int(worker.stdout.readline()), flush=True)\n"
        f"Path({str(tmp_path)!r}, 'file').touch()"
    )
    killed = kill_at(1, [sys.executable, "-c", launcher], tmp_path)
    assert killed.returncode == -9
    stat = Path("/proc", killed.output.strip(), "stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the worker lives on")
