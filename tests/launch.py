"""How the tests start a program: as a user would, in a process of its own or two, on the CPU and without a network."""

import importlib.util
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"  # data sets that not every machine has
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0"]
PYTHON = [sys.executable]
ONE = [*LAUNCH, "--num_processes", "1"]
TWO = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--gpu_ids", "all"]


def environment(**settings: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    ours = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return os.environ | ours | settings


def load_recipe(name: str) -> ModuleType:
    """A recipe as a module, loaded anew."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # its processes look it up there
    spec.loader.exec_module(module)
    return module


@contextmanager
def as_program(*argv: str) -> Iterator[pytest.MonkeyPatch]:
    """A program's arguments; afterwards, what programs change for their whole process is as it was before."""
    from transformers import trainer

    loggers = [logging.getLogger(name) for name in ("transformers", "optuna", "pgt_hf", "pgt_hf.search")]
    levels = [logger.level for logger in loggers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*argv])
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.setattr(trainer, "DEFAULT_PROGRESS_CALLBACK", trainer.DEFAULT_PROGRESS_CALLBACK)
        try:
            yield patch
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def run_here(recipe: str, *arguments: str, cwd: Path) -> None:
    """Runs a recipe as a program, in this process."""
    with as_program(recipe, *arguments) as patch:
        patch.chdir(cwd)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        runpy.run_path(recipe, run_name="__main__")


def run(*command: str, cwd: Path, check: bool = True, **settings: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(**settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0 or not check, done.stderr[-4000:]
    return done
