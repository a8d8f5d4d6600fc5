"""``DiagnosticsCallback``: records the quantities of the paper's plots, with any loss and any Trainer."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..analysis.diagnostics import (
    CURVE_ALPHAS,
    History,
    filter_norms,
    gradient_cosine,
    gradient_norms,
    log_power_sum,
    logit_statistics,
    normalization_statistics,
    normalized_layers,
    probability_histograms,
    recover_target,
    turned_angle,
    zeroed_filters,
)
from ..atomic import warn_on_failure
from ..limits import Count, checked
from ..runs.record import DIAGNOSTICS
from .logit_probe import LogitProbe, alpha_of

logger = logging.getLogger(__name__)


class DiagnosticsCallback(TrainerCallback):
    """Records logit statistics, filter norms, gradient norms and probabilities every ``interval`` optimizer steps.

    They go to ``diagnostics.npz`` in the output folder, with every checkpoint and at the end, for
    ``pgt-hf plot FOLDER``; ``PowerGradTrainer`` also logs the scalars. What is recorded is the first micro-batch of
    the main process, and the gradients before the optimizer's step: after ``max_grad_norm``, before ``clip_mode``.

    Args:
        interval: Optimizer steps from one snapshot to the next; by default 100, or fewer in a short run.
        head: The module whose output are the logits, or its name, as for ``attach_powergrad``.

    Raises:
        ValueError: At the start of training: the head is not found, or the parameters are sharded (FSDP, DeepSpeed),
            so that no process sees a whole filter.

    Example:
        >>> trainer = PowerGradTrainer(model, args, train_dataset=dataset, callbacks=[DiagnosticsCallback()])
    """

    @checked
    def __init__(self, interval: Count | None = None, head: nn.Module | str | None = None) -> None:
        self.interval = interval
        self.history = History()
        self._head = head
        self._probe: LogitProbe | None = None
        self._logs: dict[str, float] = {}
        self._before: dict[str, Tensor] = {}  # the weights of normalised layers before the step that is recorded
        self._values: dict[str, Any] = {}
        self._warned = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if args.fsdp or args.deepspeed:
            raise ValueError(
                "DiagnosticsCallback needs whole parameters, which FSDP and DeepSpeed shard: leave it out"
            )
        if self.interval is None:
            self.interval = max(1, min(100, state.max_steps // 40))
        self.history = History()
        path = Path(args.output_dir, DIAGNOSTICS)
        if state.global_step > 0 and path.is_file():
            self.history.resume(path, state.global_step)
        if state.is_world_process_zero:
            self._probe = LogitProbe(kwargs["model"], self._head, features=True)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._probe is not None and state.global_step % (self.interval or 1) == 0:
            self._probe.listen()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._probe is None or not self._probe.listening:
            return
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._values = self._measure(model, optimizer, args.label_smoothing_factor)
        self._before = {name: layer.weight.detach().clone() for name, (layer, _) in normalized_layers(model).items()}
        self._probe.forget()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not self._values:
            return
        layers = normalized_layers(kwargs["model"])
        turned = {f"angle/{name}": turned_angle(old, layers[name][0].weight) for name, old in self._before.items()}
        values, self._values, self._before = _to_numpy(self._values | turned), {}, {}
        # float16 holds a norm to 3 digits, in half the space.
        half = {key: value.astype("float16") if key.startswith("filter/") else value for key, value in values.items()}
        self.history.add(state.global_step, half | {"alpha": alpha_of(kwargs["optimizer"])})
        self._logs = {key: value.item() for key, value in values.items() if not value.ndim and "/" not in key}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir, DIAGNOSTICS)
            with warn_on_failure(DIAGNOSTICS):
                path.parent.mkdir(parents=True, exist_ok=True)
                self.history.save(path)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.on_save(args, state, control)
        if self._probe is not None:
            self._probe.remove()

    def take_logs(self) -> dict[str, float]:
        """The scalars of the last snapshot, once: ``PowerGradTrainer`` logs them beside the loss."""
        logs, self._logs = self._logs, {}
        return logs

    @torch.no_grad()
    def _measure(self, model: nn.Module, optimizer: Any, smoothing: float) -> dict[str, Tensor]:
        assert self._probe is not None
        alpha = alpha_of(optimizer)
        norms = filter_norms(model)
        values = {f"filter/{name}": value for name, value in norms.items()}
        gradients = gradient_norms(model)
        nothing = torch.full((), math.nan, device=next(iter(norms.values())).device)  # a frozen layer
        values |= {f"gradient/{name}": gradients.get(name, nothing) for name in norms}
        values["zeroed_filters"] = zeroed_filters(norms.values())
        values |= normalization_statistics(model, optimizer)
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
        return values


def _to_numpy(values: dict[str, Tensor]) -> dict[str, Any]:
    """All in one transfer from the device."""
    flat = torch.cat([value.detach().float().flatten() for value in values.values()]).cpu()
    parts = flat.split([value.numel() for value in values.values()])
    return {key: part.view(value.shape).numpy() for (key, value), part in zip(values.items(), parts, strict=True)}
