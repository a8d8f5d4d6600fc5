"""What a search over alpha needs: a space to search, an interval over seeds, one honest sentence.

alpha and the learning rate are coupled, since PGT sends about 1/alpha times more gradient into the backbone: they are
searched together, and the baseline's learning rate as long as theirs.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["PAPER_ALPHAS", "Comparison", "Point", "compare", "interval", "powergrad_hp_space"]

PAPER_ALPHAS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # the published ones lie at 0.05, 0.25, 0.3 and 0.92


def powergrad_hp_space(
    learning_rate: tuple[float, float], alpha: tuple[float, float] = (0.05, 1.0)
) -> Callable[[Any], dict[str, float]]:
    """A search space for ``Trainer.hyperparameter_search`` with Optuna: alpha and the learning rate together.

    ``PowerGradTrainer.hyperparameter_search`` uses it by default, around the learning rate of its arguments.

    Args:
        learning_rate: Lowest and highest, searched on a logarithmic scale.
        alpha: Lowest and highest; with (1, 1) the space of the baseline.

    Raises:
        ValueError: A range is empty or lies outside what is allowed.

    Example:
        >>> space = powergrad_hp_space(learning_rate=(0.01, 1.0))
        >>> trainer.hyperparameter_search(space, n_trials=20, direction="maximize", backend="optuna")
    """
    if not 0 < learning_rate[0] <= learning_rate[1]:
        raise ValueError(f"learning_rate must be two rising numbers above 0, got {learning_rate}")
    if not 0 <= alpha[0] <= alpha[1] <= 1:
        raise ValueError(f"alpha must be two rising numbers in [0, 1], got {alpha}")

    def space(trial: Any) -> dict[str, float]:
        return {
            "alpha": trial.suggest_float("alpha", *alpha),
            "learning_rate": trial.suggest_float("learning_rate", *learning_rate, log=True),
        }

    return space


@dataclass(frozen=True)
class Point:
    """A setting and what it scored: one value for each seed, higher is better."""

    alpha: float
    learning_rate: float
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half the width of Student's t interval; the half width of a single value is infinite.

    Example:
        >>> mean, half = interval([0.9, 0.92, 0.94])
        >>> f"{mean:.2f} +- {half:.2f}"
        '0.92 +- 0.05'
    """
    from scipy.stats import t  # type: ignore[import-untyped]

    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.inf
    return mean, float(t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Comparison:
    """The difference of two settings over the same seeds, with its 95% interval."""

    difference: float
    half_width: float
    seeds: int

    @property
    def found(self) -> bool:
        """Whether 0 lies outside the interval."""
        return abs(self.difference) > self.half_width

    def __str__(self) -> str:
        measured = f"{100 * self.difference:+.2f} +- {100 * self.half_width:.2f} points"
        where = f"95% interval of the paired difference over {self.seeds} seeds that the search had not seen"
        if not self.found:
            return f"No difference found: PGT minus baseline is {measured} ({where})."
        verdict = "better" if self.difference > 0 else "worse"
        change = f"{100 * abs(self.difference):.2f} +- {100 * self.half_width:.2f} points"
        return f"PGT is {verdict} by {change} ({where})."


def compare(method: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """The paired difference, method minus baseline, of scores of the same seeds in the same order.

    Raises:
        ValueError: There are not as many of one as of the other, or fewer than 2.

    Example:
        >>> print(compare([0.91, 0.93, 0.92], [0.90, 0.93, 0.92]))
        No difference found: PGT minus baseline is +0.33 +- 1.43 points (95% interval of the paired ...
    """
    if len(method) != len(baseline) or len(method) < 2:
        raise ValueError(f"compare needs the same seeds of both, at least 2; got {len(method)} and {len(baseline)}")
    difference, half_width = interval([a - b for a, b in zip(method, baseline, strict=True)])
    return Comparison(difference, half_width, len(method))
