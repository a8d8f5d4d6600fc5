"""``DivergenceCallback``: stops a run that has diverged."""

import logging
import math
import statistics
import sys
from collections import deque
from typing import Annotated, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..analysis.diagnostics import recover_target
from ..limits import Count, Number, checked
from ..runs.environment import command_line
from .checkpoint_folders import set_aside, usable_checkpoints
from .logit_probe import LogitProbe, alpha_of

logger = logging.getLogger(__name__)

_USUAL = 1000  # logged gradient norms, of which the median is taken


class DivergenceCallback(TrainerCallback):
    """Stops a run within ``interval`` steps of diverging, and says what to try.

    It checks the logits every ``interval`` steps and after each checkpoint, and every log entry. A run has diverged
    when logits, loss or gradient norm are not finite; when the loss of ``alpha * logits``, or ``alpha * logits``
    themselves, are beyond anything sensible twice in a row; or when the logged gradient norm is 1,000 times its recent
    median. (Trainer's log may hide it: ``logging_nan_inf_filter`` replaces a loss that is not finite with an average.)

    In fp16 a gradient that overflows makes the gradient scaler skip the step and halve its scale. That is normal, most
    of all at the start; only ``max_skipped`` skipped steps in a row stop the run, with other advice.

    When it stops a run, ``verdict`` says why ("divergence" or "overflow"), and ``message`` holds the advice, which is
    also logged. No checkpoint is saved from the first suspicion on, and those saved after the last check that found
    nothing wrong (``last_sound_step``) are set aside, so that resuming with "auto" takes an earlier one.

    Args:
        interval: Optimizer steps between two checks of the logits.
        factor: The run has diverged when the loss exceeds this many times the larger of log(C) and the first loss.
        max_skipped: Steps that the gradient scaler may skip in a row.
        head: As for ``attach_powergrad``.

    Example:
        >>> guard = DivergenceCallback()
        >>> PowerGradTrainer(model, args, train_dataset=dataset, callbacks=[guard]).train()
        >>> guard.verdict is None
        True
    """

    @checked
    def __init__(
        self,
        interval: Count = 10,
        factor: Annotated[float, Number("(1, inf)")] = 5.0,
        max_skipped: Count = 12,
        head: nn.Module | str | None = None,
    ) -> None:
        self.interval = interval
        self.factor = factor
        self.max_skipped = max_skipped
        self.verdict: str | None = None
        self.message: str | None = None
        self.skipped = 0
        self.last_sound_step: int | None = None
        self._head = head

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.verdict, self.message, self.skipped = None, None, 0
        self._in_a_row, self._suspicions, self._doubtful = 0, 0, False
        self._saved = False
        self.last_sound_step = state.global_step
        self._first_loss: float | None = None
        self._gradient_norms: deque[float] = deque(maxlen=_USUAL)
        self._probe = LogitProbe(kwargs["model"], self._head)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.interval == 0 or self._saved:
            self._saved = False
            self._probe.listen()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        skipped = bool(getattr(optimizer, "step_was_skipped", False))
        self.skipped += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row == self.max_skipped:
            self._stop("overflow", f"the last {self.max_skipped} steps overflowed", state, control, optimizer)
        if not self._probe.listening:
            self._forbid_saving(control)
            return
        seen = self._probe.seen()
        self._probe.forget()
        trouble = "" if seen is None else self._examine(*seen, alpha_of(optimizer))
        # A forward pass in fp16 may overflow in a sound network; one whose weights are finite is not lost yet.
        if trouble and skipped and all(parameter.isfinite().all() for parameter in kwargs["model"].parameters()):
            trouble = ""
        trouble, self._doubtful = _agree(trouble, self._suspicions > 0, args.device)
        if trouble:
            self._stop("divergence", trouble, state, control, optimizer)
        elif not self._doubtful:
            self.last_sound_step = state.global_step - 1  # the logits were those before this step's update
        self._forbid_saving(control)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved = True  # the next step shows whether the model that was saved is sound

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._forbid_saving(control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs, optimizer = kwargs.get("logs") or {}, kwargs.get("optimizer")
        scaled = getattr(optimizer, "scaler", None) is not None
        for key in ("loss", "grad_norm", "logit_norm"):
            if key in logs and not math.isfinite(logs[key]) and not (scaled and key == "grad_norm"):
                self._stop("divergence", f"{key} is {logs[key]}", state, control, optimizer)
        norm = logs.get("grad_norm", math.inf)
        if not math.isfinite(norm):
            return
        usual = statistics.median(self._gradient_norms) if len(self._gradient_norms) >= 5 else math.inf
        if norm > 1000 * usual > 0:
            what = f"the gradient norm is {norm:.3g}, {norm / usual:.3g} times its median"
            self._stop("divergence", what, state, control, optimizer)
        self._gradient_norms.append(norm)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._probe.remove()
        if self.verdict is None and not all(weight.isfinite().all() for weight in kwargs["model"].parameters()):
            self._stop("divergence", "the weights are not finite", state, control, kwargs.get("optimizer"))
        if self.verdict == "divergence" and state.is_world_process_zero:
            set_aside(str(args.output_dir), self.last_sound_step or 0, "the run had diverged")

    def leave(self, trainer: Trainer) -> None:
        """If the run was stopped, says how to go on with ``--resume`` and ``--learning-rate``, and exits with 1."""
        if self.verdict is None:
            return
        good = usable_checkpoints(trainer.args.output_dir)
        rate = f"{trainer.args.learning_rate / 4:.3g}"
        if good:
            again = command_line(learning_rate=rate, resume="auto")
            again = f"The last good checkpoint is {good[-1].name}. Resume from it with: {again}"
        else:
            again = f"There is no good checkpoint. Start again with: {command_line(learning_rate=rate)}"
        trainer.end()
        sys.exit(f"error: {self.message} {again}" if trainer.is_world_process_zero() else 1)

    def _forbid_saving(self, control: TrainerControl) -> None:
        if self.verdict or self._doubtful:
            control.should_save = False

    @torch.no_grad()
    def _examine(self, logits: Tensor, grad: Tensor, alpha: float) -> str:
        """What is wrong with these logits, or nothing."""
        if not logits.isfinite().all():
            return "the logits are not finite"
        target, found = recover_target(logits, grad, alpha)
        # Rows without a gradient, such as those of ignored labels, count as a loss of 0.
        losses = torch.nn.functional.cross_entropy(alpha * logits[found].float(), target, reduction="sum")
        loss = losses.item() / len(logits)
        largest = alpha * logits.abs().amax().item()
        if self._first_loss is None:
            self._first_loss = max(loss, math.log(logits.size(-1)))
        suspicion = ""
        if loss > self.factor * self._first_loss:
            times = loss / self._first_loss
            suspicion = f"the loss of alpha * logits is {loss:.3g}, {times:.3g} times that of the start"
        elif largest > 1000:
            suspicion = f"alpha * logits reach {largest:.3g}"
        self._suspicions = self._suspicions + 1 if suspicion else 0
        return suspicion if self._suspicions == 2 else ""

    def _stop(self, verdict: str, what: str, state: TrainerState, control: TrainerControl, optimizer: Any) -> None:
        if self.verdict is not None:
            return
        rate = max((group["lr"] for group in getattr(optimizer, "param_groups", [])), default=math.nan)
        self.verdict = verdict
        self.message = _ADVICE[verdict].format(step=state.global_step, what=what, rate=rate, alpha=alpha_of(optimizer))
        logger.error(self.message)
        entry = {"step": state.global_step, "epoch": state.epoch, "verdict": verdict, "message": self.message}
        state.log_history.append(entry)
        control.should_training_stop, control.should_save = True, False


_ADVICE = {
    "divergence": (
        "stopped at step {step}, the run has diverged: {what}. Try a lower learning rate (it is {rate:.3g}; a small "
        "alpha sends more gradient into the backbone), clipping (clip_mode='agc' with clip_value=0.01, or "
        "max_grad_norm=1), or a larger alpha (it is {alpha:g})."
    ),
    "overflow": (
        "stopped at step {step}, fp16 cannot hold the gradients: {what} and were skipped. The weights are as they "
        "were before. Use bf16=True, or fp32, or a lower learning rate (it is {rate:.3g})."
    ),
}


def _agree(trouble: str, suspicion: bool, device: torch.device) -> tuple[str, bool]:
    """All processes stop at the same step, and suspect at the same step: else some would wait for ever."""
    if PartialState().num_processes == 1:
        return trouble, suspicion
    lost, doubtful = gather(torch.tensor([[bool(trouble), suspicion]], device=device)).any(dim=0).tolist()
    return trouble or ("another process is in trouble" if lost else ""), doubtful
