"""Comparing the raw, folded and temperature-scaled probabilities of the same logits.

PGT trains ``softmax(alpha z)``, a temperature of 1/alpha. Guo et al. 2017 fit the temperature to held-out images
instead, whatever the training was. Which of the three to use has to be measured: folding helps where the network
fits its data, and hurts where its logits have not grown by 1/alpha.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..functional import IGNORED, check_alpha
from ..limits import Count, Seed, checked
from .metrics import BINS, Reliability, check_logits, probability_scores, reliability, score_logits


@dataclass(frozen=True)
class Calibration:
    """The scores of ``softmax(logits / temperature)``.

    ``temperatures`` holds one number, or the two that were fitted, one to each half of the images; ``confidence`` is
    the probability of each image's best class.
    """

    temperatures: tuple[float, ...]
    nll: float
    ece: float
    brier: float
    confidence: NDArray[np.float32]
    reliability: Reliability

    @property
    def temperature(self) -> float:
        """The one temperature to use: the geometric mean of both halves' temperatures."""
        return math.prod(self.temperatures) ** (1 / len(self.temperatures))


@checked
def compare_calibration(
    logits: Tensor, labels: Tensor, alpha: float | None = None, *, bins: Count = BINS, seed: Seed = 0
) -> dict[str, Calibration]:
    """Scores the probabilities of the same logits as they are, folded, and at the temperature that fits best.

    The images are halved by ``seed``; each half is scored at the temperature fitted to the *other* one, so no image is
    scored at a temperature that it helped to choose, and all three are scores of all the images.

    Args:
        logits: Shape (N, C).
        labels: Shape (N); images with the label -100 are left out.
        alpha: The exponent that the model was trained with. Without one there is no "folded"; nor at 1, where it is
            "raw", nor at 0, where every probability is 1/C.
        bins: Number of bins of the ECE.
        seed: Draws the halves.

    Returns:
        "raw", "folded" and "fitted"; no "fitted" where one half holds no mistake, which no temperature fits.

    Example:
        >>> logits, labels = torch.randn(100, 10), torch.arange(100) % 10
        >>> list(compare_calibration(logits, labels, alpha=0.25))
        ['raw', 'folded', 'fitted']
    """
    check_logits(logits, labels)
    counted = labels != IGNORED
    logits, labels = logits[counted], labels[counted]
    if not len(labels):
        raise ValueError(f"labels must leave at least 1 image to score, got {IGNORED} alone")
    if not logits.isfinite().all():
        raise ValueError("logits must be finite, got nan or infinity among them")
    rows: dict[str, tuple[tuple[float, ...], Tensor]] = {"raw": ((1.0,), score_logits(logits, labels))}
    if alpha is not None and check_alpha(alpha) not in (0, 1):
        rows["folded"] = ((1 / alpha,), score_logits(logits, labels, alpha))

    right = logits.argmax(dim=1) == labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(int(seed))).to(labels.device)
    halves = order.tensor_split(2)
    if not any(right[half].all() for half in halves):
        temperatures = tuple(_fit_temperature(logits[half], labels[half]) for half in halves)
        fitted = torch.empty_like(rows["raw"][1])
        for half, temperature in zip(reversed(halves), temperatures, strict=True):
            fitted[half] = score_logits(logits[half], labels[half], 1 / temperature)
        rows["fitted"] = (temperatures, fitted)

    hits = right.cpu().numpy()
    return {name: _score(used, scores, hits, bins) for name, (used, scores) in rows.items()}


@checked
def best_calibrated(found: Mapping[str, Calibration]) -> str:
    """Which of the probabilities has the lowest NLL.

    Example:
        >>> best_calibrated(compare_calibration(torch.tensor([[9.0, 0.0]] * 4), torch.tensor([0, 0, 1, 1]), alpha=0.1))
        'fitted'
    """
    return min(found, key=lambda name: found[name].nll)


@checked
def calibration_table(found: Mapping[str, Calibration]) -> str:
    """A table of temperatures and scores to print, and which of the probabilities to use.

    Example:
        >>> print(calibration_table(compare_calibration(logits, labels, alpha=0.25)))
    """
    lines = [f"{'probabilities':15}{'temperature':>15}{'NLL':>10}{'ECE':>10}{'Brier':>10}"]
    for name, row in found.items():
        used = " and ".join(f"{value:.3g}" for value in row.temperatures)
        lines.append(f"{name:15}{used:>15}{row.nll:>10.4f}{row.ece:>10.4f}{row.brier:>10.4f}")
    how = "each half of the images at the temperature fitted to the other half"
    lines.append(f"fitted: {how if 'fitted' in found else 'none, as one half of the images holds no mistake'}")
    best = best_calibrated(found)
    return "\n".join([*lines, f"Lowest NLL: {best}, softmax({scaled_logits(found[best].temperature)})."])


def scaled_logits(temperature: float) -> str:
    """``z / temperature`` as people write it.

    Example:
        >>> scaled_logits(1.0), scaled_logits(4.0), scaled_logits(1.31)
        ('z', 'z / 4', 'z / 1.31')
    """
    return "z" if temperature == 1 else f"z / {temperature:.3g}"


def _fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T in [0.01, 100] at which ``softmax(logits / T)`` has the smallest NLL, which is convex in 1/T."""
    from scipy.optimize import minimize_scalar

    logits = logits.double()

    def nll(log_temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits * math.exp(-log_temperature), labels).item()

    return math.exp(minimize_scalar(nll, bounds=(math.log(0.01), math.log(100)), method="bounded").x)


def _score(temperatures: tuple[float, ...], scores: Tensor, hits: NDArray[np.bool_], bins: int) -> Calibration:
    rows = scores.cpu().numpy()
    values = probability_scores(rows, hits, bins)
    confidence = rows[:, 1]
    return Calibration(temperatures, **values, confidence=confidence, reliability=reliability(confidence, hits, bins))
