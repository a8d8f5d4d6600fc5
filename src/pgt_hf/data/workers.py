"""Data workers that are forked from a clean server process.

A worker that is forked from a training process can hang for ever: it inherits locks that threads of gloo or CUDA hold
at that moment, without the threads. The server never joins a process group. It imports what workers need once, so a
worker starts as fast as by a plain fork, and it is started while the program still loads its data.
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

__all__ = ["guard_workers", "start_worker_server", "use_worker_server", "worker_options"]

_HEAVY = ("torch", "torchvision", "accelerate", "timm", "datasets", "transformers.trainer")
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def worker_options(workers: int) -> dict[str, Any]:
    """``DataLoader``'s options for so many workers; starts the server if there are to be any.

    Example:
        >>> loader = DataLoader(dataset, batch_size=64, **worker_options(4))
    """
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
    """Lets a Trainer's data workers come from the server, unless its arguments say how they start.

    Example:
        >>> use_worker_server(training_args)
    """
    if args.dataloader_num_workers and args.dataloader_multiprocessing_context in (None, _METHOD):
        start_worker_server()
        args.dataloader_multiprocessing_context = _METHOD


def start_worker_server() -> None:
    """Starts the server, unless it runs, and returns at once. It ends with this process.

    Example:
        >>> start_worker_server()
    """
    if _METHOD != "forkserver":
        return
    ours = [name for name in sys.modules if name.split(".")[0] == "pgt_hf"]
    multiprocessing.set_forkserver_preload([name for name in _HEAVY if name in sys.modules] + ours)
    # The server and its workers inherit the block, so no moment of a worker's start is open to SIGTERM: torch sets a
    # handler of its own before `worker_init_fn` runs. The tracker comes first because its start lifts the block.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def guard_workers(loader: Any) -> Any:
    """Lets a loader's workers outlive SIGTERM, which leaves training the data of its last step, but not their program.

    Example:
        >>> loader = guard_workers(DataLoader(dataset, batch_size=64, num_workers=4, multiprocessing_context="spawn"))
    """
    _kill_workers_at_exit()
    initialize = partial(_start_worker, loader.worker_init_fn)
    for part in (loader, getattr(loader, "base_dataloader", loader)):  # Accelerate's, and the one that it holds
        part.worker_init_fn = initialize
    return loader


@cache
def _kill_workers_at_exit() -> None:
    """Once, however many loaders there are."""
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    """At the end of a program that failed: multiprocessing would terminate its workers, in vain, and wait for ever."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _start_worker(initialize: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # torch watches the process that forked the worker, the server, which stays as long as it has workers.
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    if initialize is not None:
        initialize(worker)


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
