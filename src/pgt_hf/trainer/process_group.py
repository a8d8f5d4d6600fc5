"""Ends the process group before the interpreter does.

A thread of gloo frees the tensors of the last collective when it comes to it. If the interpreter has begun to leave by
then, the thread aborts the process, after a training that went well. The threads end with the group, and the group
with its last user: the DistributedDataParallel that Trainer and Accelerate hold, which ``Trainer.end()`` leaves alone.
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
    if hasattr(
        sys, "last_value"
    ):  # a crash: other processes may be inside a collective, and waiting for it could hang
        return
    if (trainer := reference()) is not None:
        trainer.model_wrapped = trainer.model
        trainer.accelerator.free_memory()
    gc.collect()
    if PartialState._shared_state:
        PartialState().destroy_process_group()
