"""Comparing two settings over seeds: confidence intervals and a one-sentence verdict."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from ..limits import Number, checked

_Score = Annotated[float, Number()]


@dataclass(frozen=True)
class Point:
    """A setting and what it scored: one value for each seed, higher is better."""

    alpha: float
    learning_rate: float
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    def cells(self) -> list[str]:
        """Alpha, learning rate, number of scores, mean and half the width of its interval, for a table."""
        mean, half = interval(self.scores)
        width = f"{half:.4f}" if len(self.scores) > 1 else "-"
        return [f"{self.alpha:.4g}", f"{self.learning_rate:.4g}", str(len(self.scores)), f"{mean:.4f}", width]


@checked
def interval(values: Sequence[_Score]) -> tuple[float, float]:
    """Mean and half the width of Student's 95% interval; the half width of a single value is infinite.

    Example:
        >>> mean, half = interval([0.9, 0.92, 0.94])
        >>> f"{mean:.2f} +- {half:.2f}"
        '0.92 +- 0.05'
    """
    from scipy.stats import t

    if not len(values):
        raise ValueError("values must hold at least one number, got none")
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.inf
    return mean, float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


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


@checked
def compare(method: Sequence[_Score], baseline: Sequence[_Score]) -> Comparison:
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
