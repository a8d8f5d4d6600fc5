"""Ends the process group before the interpreter exits.

A gloo thread frees the tensors of the last collective when it gets to them. If the interpreter is already shutting
down, the thread aborts the process, after a training that succeeded. The threads end with the group, and the group
with its last user: the DistributedDataParallel of Trainer and Accelerate, which ``Trainer.end()`` does not release.
"""

import atexit
import gc
import sys
import weakref
from typing import Any

from accelerate import PartialState


def end_group_at_exit(trainer: Any) -> None:
    """Ends the process group when the program ends, unless it ends with an exception."""
    atexit.register(_end_group, weakref.ref(trainer))


def _end_group(reference: "weakref.ref[Any]") -> None:
    if hasattr(sys, "last_value"):  # a crash: the other processes may wait in a collective, and this one would hang
        return
    if (trainer := reference()) is not None:
        trainer.model_wrapped = trainer.model
        trainer.accelerator.free_memory()
    gc.collect()
    if PartialState._shared_state:
        PartialState().destroy_process_group()
