"""Data workers that are forked from a clean server process.

A worker that is forked from a training process can hang forever: it inherits the locks that threads of gloo or CUDA
hold, but not the threads. The server never joins a process group. It imports what workers need once, so that they
start as fast as by a plain fork.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import cache, partial
from multiprocessing import forkserver, resource_tracker
from typing import Any

__all__ = ["guard_workers", "release_remote_files", "start_worker_server", "use_worker_server", "worker_options"]

_HEAVY = ("torch", "torchvision", "accelerate", "timm", "datasets", "transformers.trainer")
_OUTLIVED = {signal.SIGTERM, signal.SIGINT}  # by workers, so that training can finish its step
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def worker_options(workers: int) -> dict[str, Any]:
    """``DataLoader``'s options for this number of workers, as in ``DataLoader(dataset, **worker_options(4))``."""
    if workers == 0:
        return {"num_workers": 0}
    start_worker_server()
    _kill_workers_at_exit()
    return {
        "num_workers": workers,
        "multiprocessing_context": _METHOD,
        "worker_init_fn": partial(_start_worker, None),
    }


def use_worker_server(args: Any) -> None:
    """Lets a Trainer's data workers come from the server, unless its arguments choose another way."""
    if args.dataloader_num_workers and args.dataloader_multiprocessing_context in (None, _METHOD):
        start_worker_server()
        args.dataloader_multiprocessing_context = _METHOD


def start_worker_server() -> None:
    """Starts the server, unless it runs, and returns at once. It ends with this process."""
    if _METHOD != "forkserver":
        return
    ours = [name for name in sys.modules if name.split(".")[0] == "pgt_hf"]
    multiprocessing.set_forkserver_preload([name for name in _HEAVY if name in sys.modules] + ours)
    # The server and its workers inherit the block: the server ignores Ctrl-C only after its imports, and torch sets a
    # SIGTERM handler of its own before it calls `worker_init_fn`. The tracker comes first: its start lifts the block.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OUTLIVED)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def guard_workers(loader: Any) -> Any:
    """Lets a loader's workers survive SIGTERM and Ctrl-C, so that training can finish its step.

    They do not survive the end of their program.
    """
    _kill_workers_at_exit()
    initialize = partial(_start_worker, loader.worker_init_fn)
    for part in (loader, getattr(loader, "base_dataloader", loader)):  # Accelerate's, and the one inside
        part.worker_init_fn = initialize
    return loader


def release_remote_files() -> None:
    """In a forked data worker, remote files may hang without this; ``datasets`` does the same in its own loaders."""
    from torch.utils.data import get_worker_info

    if get_worker_info():
        import fsspec.asyn  # type: ignore[import-untyped]

        fsspec.asyn.reset_lock()


@cache
def _kill_workers_at_exit() -> None:
    """After a failure, multiprocessing would send workers the SIGTERM that they ignore, and wait for them forever."""

    def kill() -> None:
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()

    atexit.register(kill)


def _start_worker(initialize: Callable[[int], None] | None, worker: int) -> None:
    for number in _OUTLIVED:
        signal.signal(number, signal.SIG_IGN)
    # torch only watches the worker's parent, the server, which stays as long as it has workers.
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    if initialize is not None:
        initialize(worker)


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
