"""``StopOnSigterm``: on SIGTERM, Ctrl-C or its launcher's end, a run saves a checkpoint and says how to resume."""

import os
import select
import signal
import socket
import sys
import threading
from typing import Any

import psutil  # comes with accelerate
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..runs.environment import command_line
from .checkpoint_folders import list_checkpoints

_INTERRUPT, _SIGTERM, _ORPHANED = "Ctrl-C", "SIGTERM", "the end of its launcher"
_REASONS = (None, _INTERRUPT, _SIGTERM, _ORPHANED)  # numbered, for the processes to agree on one
_PATIENCE = 60.0  # seconds that a process may go on without its launcher: it may wait for peers that are gone


class EvaluationStopped(SystemExit):
    """Ends an evaluation that was going on when the run was asked to stop."""


class StopOnSigterm(TrainerCallback):
    """On SIGTERM (a pre-empted machine, ``scancel``), or if its launcher dies, a run saves a checkpoint and stops.

    All processes stop at the same step, whichever got the signal; an evaluation is cut short. ``stopped`` says
    afterwards that it happened. Call ``listen`` when the program starts, before the processes meet, and the signal is
    handled before training too (the program exits, nothing is lost) and after it (the last checkpoint stays). Ctrl-C
    then counts as well; without a launcher, the second one ends the program at once. The exit status is 143, or 130.

    Example:
        >>> stop = StopOnSigterm().listen()
        >>> trainer = PowerGradTrainer(model, args, train_dataset=dataset, callbacks=[stop])
        >>> trainer.train()
        >>> stop.leave(trainer)
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked: str | None = None
        self._interruptible = False  # Ctrl-C counts
        self._training = False
        self._run: str | None = None  # the run's folder, once training has ended
        self._group: Any = None
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._commands = "", ""
        self._before: Any = None  # the handler to put back after training, unless listen() was called

    def listen(self) -> "StopOnSigterm":
        """Handles the signals from now on, to the end of the program. Only the main thread can start this."""
        self._start()
        self._before = None
        if self._sockets is not None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            # torch's launcher passes Ctrl-C on to processes that the terminal has told already.
            signal.signal(signal.SIGINT, _heard if "TORCHELASTIC_RUN_ID" in os.environ else _heard_once)
            self._interruptible = True
        return self

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._start()
        self._training = True
        if args.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")  # on the CPU: asking must not wait for a GPU

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._anyone_asked():
            self.stopped = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._training and self._anyone_asked():
            self.stopped = True
            raise EvaluationStopped(self._status)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stopped:  # the epoch was cut short: there is nothing to evaluate, and the checkpoint stands
            control.should_evaluate = control.should_save = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.stopped = self.stopped or self._anyone_asked()
        self._run = str(args.output_dir)
        self._training = self.stopped  # if it was stopped, leave() has the last word
        if self._before is not None:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, self._before)
            self._sockets = self._before = None

    def leave(self, trainer: Trainer) -> None:
        """If the run was stopped, says how to resume it and exits as the signal does, with 143 or 130."""
        if not self.stopped:
            return
        if trainer.is_world_process_zero():
            self._say(f" at step {trainer.state.global_step}")
        trainer.end()
        sys.exit(self._status)

    @property
    def _status(self) -> int:
        """A scheduler sees that the run was stopped and is not finished."""
        return 128 + (signal.SIGINT if self._asked == _INTERRUPT else signal.SIGTERM)

    def _start(self) -> None:
        if self._sockets is not None or threading.current_thread() is not threading.main_thread():
            return
        self._commands = command_line(), command_line(resume="auto")  # while the launcher can be asked
        receiver, sender = self._sockets = socket.socketpair()
        sender.setblocking(False)
        # The interpreter writes to the socket at once, even while the main thread waits for another process.
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        self._before = signal.signal(signal.SIGTERM, _heard) or signal.SIG_DFL
        threading.Thread(target=self._watch, args=(receiver,), name="sigterm", daemon=True).start()

    def _watch(self, receiver: socket.socket) -> None:
        """Waits for the signal, and for the end of the launcher, in a thread of its own."""
        launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
        parent = 0 if "TORCHELASTIC_RUN_ID" in launched and _is_adopted() else os.getppid()
        while True:
            heard, _, _ = select.select([receiver], [], [], 1.0 if launched else None)
            if heard:
                signals = receiver.recv(64)
                if not signals:  # the sender is closed: training is over, and nobody listens any more
                    return
                if signal.SIGTERM in signals:
                    self._stop(_SIGTERM)
                elif signal.SIGINT in signals and self._interruptible:
                    self._stop(_INTERRUPT)
            elif os.getppid() != parent:
                self._stop(_ORPHANED)
                threading.Event().wait(_PATIENCE)
                os._exit(self._status)

    def _stop(self, reason: str) -> None:
        self._asked = self._asked or reason
        if not self._training:
            if int(os.environ.get("RANK", "0")) == 0:
                self._say(" after the last step" if self._run else "")
            os._exit(self._status)

    def _say(self, when: str) -> None:
        saved = self._run is not None and bool(list_checkpoints(self._run))
        advice = f"resume with: {self._commands[1]}" if saved else f"run it again with: {self._commands[0]}"
        print(f"\nStopped by {self._asked}{when}; {advice}")
        sys.stdout.flush()

    def _anyone_asked(self) -> bool:
        if self._group is None:
            return self._asked is not None
        asked = torch.tensor(_REASONS.index(self._asked))
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        agreed = _REASONS[int(asked)]
        if agreed is not None:  # else a signal that came meanwhile would be forgotten
            self._asked = agreed
        return agreed is not None


def _is_adopted() -> bool:
    """Whether torch's launcher, a Python program, ended before this process could listen: init is its parent then."""
    try:
        parent = psutil.Process().parent()
        if parent is None or not (parent.pid == 1 or parent.name() == "systemd"):
            return False
        return "python" not in "".join(parent.cmdline()[:1])
    except psutil.Error:  # another user's process
        return False


def _heard(signum: int, frame: Any) -> None:
    """In place of the default, which would end the process at once; ``_watch`` learns of the signal by its socket."""


def _heard_once(signum: int, frame: Any) -> None:
    """As ``_heard``; the next Ctrl-C is an exception again."""
    signal.signal(signum, signal.default_int_handler)


def _forget() -> None:
    """In a forked child, such as a data worker, the signals have their default effects."""
    if signal.getsignal(signal.SIGTERM) is _heard:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) in (_heard, _heard_once):
        signal.signal(signal.SIGINT, signal.default_int_handler)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
