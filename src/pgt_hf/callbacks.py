"""Trainer callbacks: alpha on a schedule, what the paper plots, and an end to a run that is lost.

``DiagnosticsCallback`` and ``DivergenceCallback`` read the logits where the model makes them: they work with any loss,
Trainer's or ``PowerGradTrainer``'s.
"""

import logging
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .diagnostics import (
    History,
    filter_norms,
    gradient_cosine,
    gradient_norms,
    log_power_sum,
    logit_statistics,
    probability_histograms,
    recover_target,
    zeroed_filters,
)
from .guard import ALPHA_KEY
from .heads import find_heads, last_linear
from .schedules import AlphaScheduler, Shape, check_schedule

__all__ = ["DIAGNOSTICS_FILE", "AlphaScheduleCallback", "DiagnosticsCallback", "DivergenceCallback"]

logger = logging.getLogger(__name__)

DIAGNOSTICS_FILE = "diagnostics.npz"
CURVE_ALPHAS = (0.0, 0.05, 0.1, 0.25, 0.5)  # of the curves of p' against p

_MOST_ROWS = 1024  # a language model has more logits in a batch than are worth looking at


class AlphaScheduleCallback(TrainerCallback):
    """Moves alpha over the whole training, from the optimizer's own to ``end_alpha``.

    Works in ``PowerGradTrainer`` and in a plain Trainer with ``optim="powergrad_..."``. The alpha of a step depends on
    its number alone and on the first alpha, which is saved with the optimizer: a resumed run has the very same alphas.

    Args:
        shape: As in ``AlphaScheduler``.
        end_alpha: The same.
        warmup_steps: Length of the warm-up from 1 to the first alpha, in steps; below 1, a share of all steps, as in
            ``TrainingArguments``.

    Raises:
        TypeError, ValueError: An argument is not allowed; or, when training begins, the optimizer has no alpha.

    Example:
        >>> args = PowerGradTrainingArguments("out", alpha=0.25, optim="powergrad_sgd")
        >>> schedule = AlphaScheduleCallback("linear", end_alpha=1.0, warmup_steps=0.05)
        >>> trainer = PowerGradTrainer(model, args, train_dataset=dataset, callbacks=[schedule])
    """

    def __init__(self, shape: str | Shape = "cosine", end_alpha: float = 1.0, warmup_steps: float = 0) -> None:
        check_schedule(shape, end_alpha, warmup_steps)
        if warmup_steps >= 1 and warmup_steps != int(warmup_steps):
            raise ValueError(f"warmup_steps must be whole, or a share below 1, got {warmup_steps!r}")
        self.shape = shape
        self.end_alpha = end_alpha
        self.warmup_steps = warmup_steps
        self.scheduler: AlphaScheduler | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        warmup = self.warmup_steps if self.warmup_steps >= 1 else math.ceil(self.warmup_steps * state.max_steps)
        self.scheduler = AlphaScheduler(
            kwargs["optimizer"],
            state.max_steps,
            self.shape,
            self.end_alpha,
            int(warmup),
            last_epoch=state.global_step - 1,
        )

    def settings(self) -> dict[str, Any]:
        """What ``config.json`` says of the schedule."""
        scheduler = self.scheduler
        return {
            "shape": self.shape if isinstance(self.shape, str) else getattr(self.shape, "__name__", "function"),
            "first_alpha": None if scheduler is None else scheduler.initial_alpha,
            "end_alpha": self.end_alpha,
            "warmup_steps": self.warmup_steps if scheduler is None else scheduler.warmup_steps,
        }

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.scheduler is not None
        if self.scheduler.last_epoch < state.global_step:
            self.scheduler.step()


class DiagnosticsCallback(TrainerCallback):
    """Records logit statistics, filter norms, gradient norms and probabilities every ``interval`` optimizer steps.

    They go to ``diagnostics.npz`` in the output folder, with every checkpoint and at the end, for
    ``python -m pgt_hf.plots FOLDER``; ``PowerGradTrainer`` also sends the scalars to its logs and trackers. What is
    recorded is the first micro-batch of the main process, and the gradients as they are before the optimizer's step:
    after ``max_grad_norm``, before ``clip_mode``.

    Args:
        interval: Optimizer steps from one snapshot to the next.
        capacity: The most snapshots that the file holds, see ``History``.
        head: The module whose output are the logits, or its name, as for ``attach_powergrad``.

    Raises:
        ValueError: ``interval`` or ``capacity`` is not allowed; at the start of training: the head is not found, or
            the parameters are sharded (FSDP, DeepSpeed), so that no process sees a whole filter.

    Example:
        >>> trainer = PowerGradTrainer(model, args, train_dataset=dataset, callbacks=[DiagnosticsCallback()])
    """

    def __init__(self, interval: int = 100, capacity: int = 256, head: nn.Module | str | None = None) -> None:
        self.interval = _check_interval(interval)
        self.history = History(capacity)
        self._head = head
        self._probe: _LogitProbe | None = None
        self._logs: dict[str, float] = {}
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fsdp or args.deepspeed:
            raise ValueError(
                "DiagnosticsCallback reads whole parameters, which FSDP and DeepSpeed shard; leave it out"
            )
        self.history = History(self.history.capacity)
        path = Path(args.output_dir, DIAGNOSTICS_FILE)
        if state.global_step > 0 and path.is_file():
            self.history.resume(path, state.global_step)
        if state.is_world_process_zero:
            self._probe = _LogitProbe(kwargs["model"], self._head, features=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._probe is not None and state.global_step % self.interval == 0:
            self._probe.listen()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._probe is None or not self._probe.listening:
            return
        values, alpha = self._measure(kwargs["model"], kwargs["optimizer"], args.label_smoothing_factor)
        self._probe.forget()
        # float16 holds a norm to 3 digits, in half the space.
        half = {key: value.astype("float16") if key.startswith("filter/") else value for key, value in values.items()}
        self.history.add(state.global_step, half | {"alpha": alpha})
        self._logs = {key: value.item() for key, value in values.items() if not value.ndim and "/" not in key}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            self.history.save(Path(args.output_dir, DIAGNOSTICS_FILE))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_save(args, state, control)
        if self._probe is not None:
            self._probe.remove()

    def take_logs(self) -> dict[str, float]:
        """The scalars of the last snapshot, once: ``PowerGradTrainer`` logs them beside the loss."""
        logs, self._logs = self._logs, {}
        return logs

    @torch.no_grad()
    def _measure(self, model: nn.Module, optimizer: Any, smoothing: float) -> tuple[dict[str, Any], float]:
        assert self._probe is not None
        alpha = _alpha_of(optimizer)
        norms = filter_norms(model)
        values = {f"filter/{name}": value for name, value in norms.items()}
        gradients = gradient_norms(model)
        nothing = torch.full((), math.nan, device=next(iter(norms.values())).device)  # a frozen layer
        values |= {f"gradient/{name}": gradients.get(name, nothing) for name in norms}
        values["zeroed_filters"] = zeroed_filters(norms.values())
        if self._probe.features is not None:
            values["feature_norm"] = self._probe.features.float().flatten(1).norm(dim=1).mean()
        if (seen := self._probe.seen()) is not None:
            logits, grad = seen
            target, found = recover_target(logits, grad, alpha, smoothing)
            values |= logit_statistics(logits)
            values["logit_gradient_norm"] = grad.float().norm()
            values["gradient_cosine"] = gradient_cosine(logits[found], target, alpha).mean()
            values |= probability_histograms(logits[found], target, alpha)
            values["curve_power_sums"] = torch.stack(
                [log_power_sum(logits, value).mean() for value in (*CURVE_ALPHAS, alpha)]
            )
        elif not self._warned:
            self._warned = True
            logger.warning("no logits were seen, as in a compiled model: only weights and gradients are recorded")
        return _to_numpy(values), alpha


class DivergenceCallback(TrainerCallback):
    """Stops a run that is lost, within ``interval`` steps, and says what to try.

    It looks at the logits every ``interval`` steps, and at what is logged. A run is lost when logits, loss or gradient
    norm are not finite; when the loss that is being minimised, the cross-entropy of ``alpha * logits``, or ``alpha *
    logits`` themselves are beyond anything sensible twice in a row; or when the logged gradient norm is 1,000 times
    its median. (Trainer's log alone may not show it: ``logging_nan_inf_filter`` puts an average in the place of a loss
    that is not finite.)

    In fp16 a gradient that overflows makes the gradient scaler skip the step and halve its scale. That is no
    divergence, and common at the start; only ``max_skipped`` skipped steps in a row stop the run, with other advice.

    When it stops a run, ``verdict`` says why ("divergence" or "overflow"), ``message`` is the advice, which is also
    logged as an error, and ``trainer.state.log_history`` gets an entry with both.

    Args:
        interval: Optimizer steps from one look at the logits to the next.
        factor: The run is lost when the loss exceeds so many times the larger of log(C) and the first one seen.
        max_skipped: Steps that the gradient scaler may skip in a row.
        head: As for ``attach_powergrad``.

    Raises:
        ValueError: An argument is not allowed.

    Example:
        >>> guard = DivergenceCallback()
        >>> PowerGradTrainer(model, args, train_dataset=dataset, callbacks=[guard]).train()
        >>> guard.verdict is None
        True
    """

    def __init__(
        self,
        interval: int = 10,
        factor: float = 5.0,
        max_skipped: int = 12,
        head: nn.Module | str | None = None,
    ) -> None:
        self.interval = _check_interval(interval)
        if not factor > 1:
            raise ValueError(f"factor must be above 1, got {factor}")
        if max_skipped < 1:
            raise ValueError(f"max_skipped must be at least 1, got {max_skipped}")
        self.factor = factor
        self.max_skipped = max_skipped
        self.verdict: str | None = None
        self.message: str | None = None
        self.skipped = 0
        self._head = head

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.verdict, self.message, self.skipped = None, None, 0
        self._in_a_row, self._suspicions = 0, 0
        self._first_loss: float | None = None
        self._gradient_norms: list[float] = []
        self._probe = _LogitProbe(kwargs["model"], self._head)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.interval == 0:
            self._probe.listen()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        skipped = bool(getattr(optimizer, "step_was_skipped", False))
        self.skipped += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row == self.max_skipped:
            self._stop("overflow", f"the last {self.max_skipped} steps overflowed", state, control, kwargs)
        if not self._probe.listening:
            return
        seen = self._probe.seen()
        self._probe.forget()
        trouble = "" if seen is None else self._examine(*seen, _alpha_of(optimizer))
        # A forward pass in fp16 may overflow in a sound network; one whose weights are finite is not lost yet.
        if trouble and skipped and all(parameter.isfinite().all() for parameter in kwargs["model"].parameters()):
            trouble = ""
        trouble = _agree(trouble, args.device)
        if trouble:
            self._stop("divergence", trouble, state, control, kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        scaled = getattr(kwargs.get("optimizer"), "scaler", None) is not None
        for key in ("loss", "grad_norm", "logit_norm"):
            if key in logs and not math.isfinite(logs[key]) and not (scaled and key == "grad_norm"):
                self._stop("divergence", f"{key} is {logs[key]}", state, control, kwargs)
        norm = logs.get("grad_norm", math.inf)
        if not math.isfinite(norm):
            return
        usual = statistics.median(self._gradient_norms) if len(self._gradient_norms) >= 5 else math.inf
        if norm > 1000 * usual > 0:
            what = f"the gradient norm is {norm:.3g}, {norm / usual:.3g} times its median"
            self._stop("divergence", what, state, control, kwargs)
        self._gradient_norms.append(norm)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._probe.remove()

    @torch.no_grad()
    def _examine(self, logits: Tensor, grad: Tensor, alpha: float) -> str:
        """What is wrong with these logits, or nothing."""
        if not logits.isfinite().all():
            return "the logits are not finite"
        target, found = recover_target(logits, grad, alpha)
        # Rows without a gradient have no loss to speak of.
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

    def _stop(
        self, verdict: str, what: str, state: TrainerState, control: TrainerControl, kwargs: dict[str, Any]
    ) -> None:
        if self.verdict is not None:
            return
        alpha, optimizer = _alpha_of(kwargs.get("optimizer")), kwargs.get("optimizer")
        rate = max((group["lr"] for group in getattr(optimizer, "param_groups", [])), default=math.nan)
        self.verdict = verdict
        self.message = _ADVICE[verdict].format(step=state.global_step, what=what, rate=rate, alpha=alpha)
        logger.error(self.message)
        state.log_history.append(
            {"step": state.global_step, "epoch": state.epoch, "verdict": verdict, "message": self.message}
        )
        control.should_training_stop = True


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


class _LogitProbe:
    """Keeps the logits of one forward pass and their gradient; costs a comparison while it is not listening."""

    def __init__(self, model: nn.Module, head: nn.Module | str | None, features: bool = False) -> None:
        self.listening = False
        self.features: Tensor | None = None
        self._logits: Tensor | None = None
        self._grad: Tensor | None = None
        self._hooks = [find_heads(model, head)[0].register_forward_hook(self._see)]
        if features and (layers := last_linear(model)):
            self._hooks.append(layers[0].register_forward_pre_hook(self._see_features))

    def listen(self) -> None:
        self.forget()
        self.listening = True

    def forget(self) -> None:
        self.listening, self.features, self._logits, self._grad = False, None, None, None

    def remove(self) -> None:
        self.forget()
        for hook in self._hooks:
            hook.remove()

    def seen(self) -> tuple[Tensor, Tensor] | None:
        """Logits and gradient, (N, C) each, of at most 1,024 rows; None where the model's graph was compiled."""
        if self._logits is None or self._grad is None:
            return None
        rows = [tensor.flatten(0, -2) for tensor in (self._logits, self._grad)]
        step = -(-len(rows[0]) // _MOST_ROWS)
        return rows[0][::step], rows[1][::step]

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self.listening or self._logits is not None:
            return
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None or not logits.requires_grad or logits.dim() < 2:
            return
        with torch._C.DisableTorchFunctionSubclass():
            self._logits = logits.detach().view_as(logits)
            logits.register_hook(self._see_grad)

    def _see_grad(self, grad: Tensor) -> None:
        if self.listening and self._grad is None:
            self._grad = grad.detach().clone()

    def _see_features(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and self.listening and self.features is None and args:
            self.features = args[0].detach()


def _alpha_of(optimizer: Any) -> float:
    """The exponent in use: without one among the optimizer's groups, training is plain."""
    groups = getattr(optimizer, "param_groups", [])
    return float(groups[0].get(ALPHA_KEY, 1.0)) if groups else 1.0


def _agree(trouble: str, device: torch.device) -> str:
    """All processes stop at the same step, or the others would wait for ever."""
    if PartialState().num_processes == 1:
        return trouble
    others = gather(torch.tensor([bool(trouble)], device=device)).any()
    return trouble or ("another process is in trouble" if others else "")


def _check_interval(interval: int) -> int:
    if interval < 1:
        raise ValueError(f"interval must be at least 1, got {interval}")
    return interval


def _to_numpy(values: dict[str, Tensor]) -> dict[str, Any]:
    """All in one transfer from the device."""
    flat = torch.cat([value.detach().float().flatten() for value in values.values()]).cpu()
    parts = flat.split([value.numel() for value in values.values()])
    return {key: part.view(value.shape).numpy() for (key, value), part in zip(values.items(), parts, strict=True)}
