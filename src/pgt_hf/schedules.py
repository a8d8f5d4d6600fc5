"""Schedules for alpha: constant, linear, cosine or in steps, after an optional warm-up from 1.

alpha is in the optimizer's ``param_groups``, like lr, and these work like torch's ``lr_scheduler``.
``AlphaScheduleCallback`` does the same inside Trainer.
"""

import bisect
import math
from collections.abc import Callable
from typing import Annotated, Any

from torch.optim import Optimizer

from .functional import check_alpha
from .guard import ALPHA_KEY, INITIAL_KEY
from .limits import Count, Number, Whole, checked

__all__ = ["SHAPES", "AlphaScheduler", "Shape", "steps"]

Shape = Callable[[float], float]


def steps(*milestones: float) -> Shape:
    """A shape that goes from the first alpha to the last in equal jumps, one at each milestone.

    Milestones are shares of the training after its warm-up: rising numbers between 0 and 1.

    Example:
        >>> shape = steps(0.5, 0.75)
        >>> shape(0.4), shape(0.5), shape(0.9)
        (0.0, 0.5, 1.0)
    """
    for milestone in milestones:
        Number("(0, 1)").check("milestones", milestone)
    if not milestones or list(milestones) != sorted(set(milestones)):
        raise ValueError(f"milestones must rise and lie between 0 and 1, got {milestones}")
    return lambda progress: bisect.bisect_right(milestones, progress) / len(milestones)


# From the progress of training, 0 to 1, to the share of the way from the first alpha to the last.
SHAPES: dict[str, Shape] = {
    "constant": lambda progress: 0.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    "step": steps(0.3, 0.6, 0.9),  # where the paper's step schedule lowers the learning rate
}


class AlphaScheduler:
    """Changes alpha in all groups of an optimizer with PGT; used like torch's learning rate schedulers.

    alpha goes linearly from 1, plain training, to the optimizer's alpha ``a`` over ``warmup_steps``. After that it is
    ``a + (end_alpha - a) * shape(progress)``.

    Args:
        optimizer: From ``create_optimizer`` or ``bind_powergrad``, also as Accelerate wraps it.
        total_steps: How often ``step()`` will be called; after that, alpha stays at its last value.
        shape: "constant", "linear", "cosine", "step", or a function of the progress (0 to 1) that returns the share
            of the way from ``a`` to ``end_alpha``, such as ``steps(0.5, 0.75)``.
        end_alpha: The last alpha, except for "constant".
        warmup_steps: Length of the warm-up.
        last_epoch: The number of steps already taken, minus 1, to continue with a loaded optimizer's state.

    Raises:
        TypeError, ValueError: An argument is not allowed, or the optimizer has no alpha.

    Example:
        >>> optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=0.25)
        >>> scheduler = AlphaScheduler(optimizer, total_steps=1000, shape="cosine", warmup_steps=50)
        >>> scheduler.get_last_alpha()  # the warm-up starts at 1; call scheduler.step() after each optimizer.step()
        1.0
    """

    @checked
    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: Count,
        shape: str | Shape = "cosine",
        end_alpha: float = 1.0,
        warmup_steps: Annotated[int, Whole("[0, inf)")] = 0,
        last_epoch: Annotated[int, Whole("[-1, inf)")] = -1,
    ) -> None:
        check_schedule(shape, end_alpha, warmup_steps)
        if warmup_steps > total_steps:
            raise ValueError(f"warmup_steps must not be above total_steps={total_steps}, got {warmup_steps}")
        if not all(ALPHA_KEY in group for group in optimizer.param_groups):
            raise ValueError(
                f"optimizer must be one that trains with PGT, got a {type(optimizer).__name__} whose groups have no "
                f"{ALPHA_KEY!r}; make it with pgt_hf.create_optimizer, or call pgt_hf.bind_powergrad on it"
            )
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.shape = shape
        self.end_alpha = float(end_alpha)
        self.warmup_steps = warmup_steps
        for group in optimizer.param_groups:
            group.setdefault(INITIAL_KEY, group[ALPHA_KEY])
        self.initial_alpha: float = optimizer.param_groups[0][INITIAL_KEY]
        self.last_epoch = last_epoch
        self.step()

    @checked
    def get_alpha(self, step: int) -> float:
        """The alpha of any step."""
        if step < self.warmup_steps:
            return 1 + (self.initial_alpha - 1) * step / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        shape = SHAPES[self.shape] if isinstance(self.shape, str) else self.shape
        return self.initial_alpha + (self.end_alpha - self.initial_alpha) * shape(progress)

    def get_last_alpha(self) -> float:
        """The current alpha."""
        return self.get_alpha(self.last_epoch)

    def step(self) -> None:
        """Sets the alpha of the next step; call it after each ``optimizer.step()``."""
        self.last_epoch += 1
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """Everything except the optimizer, and a shape that is a function, which must be passed again."""
        left_out = {"optimizer"} if isinstance(self.shape, str) else {"optimizer", "shape"}
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state, and alpha in the param groups."""
        self.__dict__.update(state_dict)
        self._write()

    def _write(self) -> None:
        alpha = self.get_last_alpha()
        check_alpha(alpha)
        for group in self.optimizer.param_groups:
            group[ALPHA_KEY] = alpha


def check_schedule(shape: str | Shape, end_alpha: float, warmup_steps: float) -> None:
    """Raises TypeError or ValueError for arguments that make no schedule."""
    if not callable(shape) and shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)} or a function, got {shape!r}")
    check_alpha(end_alpha, "end_alpha")
    Number("[0, inf)").check("warmup_steps", warmup_steps)
