"""Data workers that are forked from a clean server process.

A worker that is forked from a training process can hang for ever: it inherits locks that threads of gloo or CUDA hold
at that moment, without the threads. The server never joins a process group. It imports what workers need once, so a
worker starts as fast as by a plain fork, and it is started while the program still loads its data.
"""

import multiprocessing
import signal
import sys
import threading
from multiprocessing import forkserver
from typing import Any

__all__ = ["start_worker_server", "use_worker_server", "worker_options"]

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def worker_options(workers: int) -> dict[str, Any]:
    """``DataLoader``'s options for so many workers; starts the server if there are to be any.

    Example:
        >>> loader = DataLoader(dataset, batch_size=64, **worker_options(4))
    """
    if workers == 0:
        return {"num_workers": 0}
    start_worker_server()
    return {"num_workers": workers, "multiprocessing_context": _METHOD}


def use_worker_server(args: Any) -> None:
    """Lets a Trainer's data workers come from the server, unless its arguments say how they start.

    Example:
        >>> use_worker_server(training_args)
    """
    if args.dataloader_num_workers and args.dataloader_multiprocessing_context in (None, _METHOD):
        args.dataloader_multiprocessing_context = worker_options(args.dataloader_num_workers)[
            "multiprocessing_context"
        ]


def start_worker_server() -> None:
    """Starts the server, unless it runs, and returns at once.

    It and its workers ignore SIGTERM: a signal to all processes of a run must leave the training process the data for
    its last step. They end with the training process.

    Example:
        >>> start_worker_server()
    """
    if _METHOD != "forkserver":
        return
    multiprocessing.set_forkserver_preload([name for name in sys.modules if name.split(".")[0] in _PRELOADED])
    if threading.current_thread() is not threading.main_thread():  # only the main one can set signals
        forkserver.ensure_running()
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # inherited
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGTERM, before)


_PRELOADED = ("pgt_hf", "datasets")  # with all that they import
