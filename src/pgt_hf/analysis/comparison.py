"""Comparing two settings over seeds: confidence intervals, and a verdict that claims no more than they show."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from ..limits import Number, checked

_Score = Annotated[float, Number()]

_EQUAL = 1e-9  # scores that differ by less differ by rounding


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
        """For a table: alpha, learning rate, number of scores, their mean and half the width of its interval."""
        mean, half = interval(self.scores)
        width = f"{half:.4f}" if _EQUAL < half < math.inf else "-"
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
        """Whether 0 lies outside the interval; without any spread there is no interval."""
        return self.spread and abs(self.difference) > self.half_width

    @property
    def spread(self) -> bool:
        """Whether the differences differ, by more than rounding."""
        return self.half_width > _EQUAL

    def __str__(self) -> str:
        if not self.spread:
            what = f"PGT minus baseline is {100 * self.difference:+.2f} points"
            if abs(self.difference) < _EQUAL:
                what = "PGT and the baseline scored the same"
            return (
                f"Not decided: {what} on each of the {self.seeds} seeds that the search had not seen. Without any "
                "spread there is no interval: confirm on more seeds, or with more validation images."
            )
        half_width = f"{100 * self.half_width:.2f}" if self.half_width > 5e-5 else f"{100 * self.half_width:.1g}"
        where = f"95% interval of the paired difference over {self.seeds} seeds that the search had not seen"
        if not self.found:
            difference = f"{100 * self.difference:+.2f} +- {half_width} points"
            return f"No difference found: PGT minus baseline is {difference} ({where})."
        verdict = "better" if self.difference > 0 else "worse"
        return f"PGT is {verdict} by {100 * abs(self.difference):.2f} +- {half_width} points ({where})."


@checked
def compare(method: Sequence[_Score], baseline: Sequence[_Score]) -> Comparison:
    """The paired difference, method minus baseline, of scores of the same seeds in the same order.

    Example:
        >>> print(compare([0.91, 0.93, 0.92], [0.90, 0.93, 0.92]))
        No difference found: PGT minus baseline is +0.33 +- 1.43 points (95% interval of the paired ...
    """
    if len(method) != len(baseline) or len(method) < 2:
        counts = f"{len(method)} and {len(baseline)}"
        raise ValueError(f"method and baseline must hold scores of the same seeds, at least 2, got {counts}")
    difference, half_width = interval([a - b for a, b in zip(method, baseline, strict=True)])
    return Comparison(difference, half_width, len(method))


@checked
def verdict(confirmed: Mapping[str, Point], rates: tuple[float, float], labels: Sequence[int]) -> list[str]:
    """What a search has shown, in sentences: warnings, if any, then the comparison.

    Args:
        confirmed: The best ``pgt`` and the best ``baseline``, with top-1 scores of the same seeds.
        rates: The lowest and the highest learning rate of the search.
        labels: Those of the images that the scores were measured on; always guessing the commonest one is chance.

    Example:
        >>> both = {"pgt": Point(0.5, 0.1, (0.91, 0.93, 0.92)), "baseline": Point(1.0, 1.0, (0.90, 0.93, 0.92))}
        >>> print(*verdict(both, (0.01, 1.0), labels=[0, 1] * 50))
        The best learning rate of the baseline, 1, lies at the upper end of its range ...
        No difference found: PGT minus baseline is +0.33 +- 1.43 points (95% interval of the paired ...
    """
    if not 0 < rates[0] < rates[1]:
        raise ValueError(f"rates must be two rising numbers above 0, got {rates}")
    result = compare(confirmed["pgt"].scores, confirmed["baseline"].scores)
    chance = max(Counter(labels).values()) / len(labels)
    noise = 2 * math.sqrt(chance * (1 - chance) / len(labels))
    learned = {side: confirmed[side].mean > chance + noise for side in ("baseline", "pgt")}
    level = f"no better than guessing the commonest label, which is right on {chance:.1%} of the images"
    if not any(learned.values()):
        return [f"Nothing was learned: PGT and the baseline are {level}. Train longer, or try other learning rates."]
    sentences = []
    for side, name in (("baseline", "the baseline"), ("pgt", "PGT")):
        if not learned[side]:
            sentences.append(f"Not a fair comparison: {name} is {level}. Train longer, or try other learning rates.")
        rate = confirmed[side].learning_rate
        place = math.log(rate / rates[0]) / math.log(rates[1] / rates[0])
        if not 0.05 < place < 0.95:
            end, flag = ("lower", "smaller --lr-low") if place < 0.5 else ("upper", "larger --lr-high")
            sentences.append(
                f"The best learning rate of {name}, {rate:.3g}, lies at the {end} end of its range, and a better one "
                f"may lie beyond: search again with a {flag}, in another --output-dir."
            )
    return [*sentences, str(result)]
