"""``AlphaScheduleCallback``: alpha on a schedule, inside Trainer."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..limits import checked
from ..schedules import AlphaScheduler, Shape, check_schedule


class AlphaScheduleCallback(TrainerCallback):
    """Moves alpha over the whole training, from the optimizer's own to ``end_alpha``.

    Works in ``PowerGradTrainer`` and in a plain Trainer with ``optim="powergrad_..."``. The alpha of a step depends on
    its number alone and on the first alpha, which is saved with the optimizer: a resumed run has the same alphas.

    Args:
        shape: As for ``AlphaScheduler``.
        end_alpha: As for ``AlphaScheduler``.
        warmup_steps: Length of the warm-up from 1 to the first alpha, in steps; below 1, a share of all steps, as in
            ``TrainingArguments``.

    Raises:
        ValueError: When training begins: the optimizer has no alpha.

    Example:
        >>> args = PowerGradTrainingArguments("out", alpha=0.25, optim="powergrad_sgd")
        >>> schedule = AlphaScheduleCallback("linear", end_alpha=1.0, warmup_steps=0.05)
        >>> trainer = PowerGradTrainer(model, args, train_dataset=dataset, callbacks=[schedule])
    """

    @checked
    def __init__(self, shape: str | Shape = "cosine", end_alpha: float = 1.0, warmup_steps: float = 0) -> None:
        check_schedule(shape, end_alpha, warmup_steps)
        if warmup_steps >= 1 and warmup_steps != int(warmup_steps):
            raise ValueError(f"warmup_steps must be whole, or a share below 1, got {warmup_steps!r}")
        self.shape = shape
        self.end_alpha = end_alpha
        self.warmup_steps = warmup_steps
        self.scheduler: AlphaScheduler | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        warmup = self.warmup_steps if self.warmup_steps >= 1 else math.ceil(self.warmup_steps * state.max_steps)
        last = state.global_step - 1
        self.scheduler = AlphaScheduler(
            kwargs["optimizer"], state.max_steps, self.shape, self.end_alpha, int(warmup), last
        )

    def settings(self) -> dict[str, Any]:
        """The schedule as ``config.json`` records it."""
        scheduler = self.scheduler
        return {
            "shape": self.shape if isinstance(self.shape, str) else getattr(self.shape, "__name__", "function"),
            "first_alpha": None if scheduler is None else scheduler.initial_alpha,
            "end_alpha": self.end_alpha,
            "warmup_steps": self.warmup_steps if scheduler is None else scheduler.warmup_steps,
        }

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        assert self.scheduler is not None
        if self.scheduler.last_epoch < state.global_step:
            self.scheduler.step()
