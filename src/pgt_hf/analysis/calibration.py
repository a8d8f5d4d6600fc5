"""Comparing the raw, folded and temperature-scaled probabilities of the same logits.

PGT trains ``softmax(alpha z)``, a temperature of 1/alpha. Guo et al. 2017 fit the temperature to held-out images
instead, whatever the training was; the comparison shows how far folding alone gets.
"""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..functional import check_alpha
from ..limits import Count, Seed, checked
from ..splits import IGNORED
from .metrics import BINS, Reliability, check_logits, probability_scores, reliability, score_logits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """The scores of ``softmax(logits / temperature)``.

    ``temperatures`` holds one number, or the two that were fitted to one half of the images each; ``confidence`` is
    the probability of each image's best class.
    """

    temperatures: tuple[float, ...]
    nll: float
    ece: float
    brier: float
    confidence: NDArray[np.float32]
    reliability: Reliability


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
        alpha: The exponent that the model was trained with; without one, or at 1 (or 0, which leaves no
            probabilities but 1/C), there is no "folded".
        bins: Number of bins of the ECE.
        seed: Of the halves.

    Returns:
        "raw", "folded" and "fitted".

    Raises:
        ValueError: There are fewer than two labelled images, or an argument is not allowed.

    Example:
        >>> logits, labels = torch.randn(100, 10), torch.arange(100) % 10
        >>> list(compare_calibration(logits, labels, alpha=0.25))
        ['raw', 'folded', 'fitted']
    """
    check_logits(logits, labels)
    counted = labels != IGNORED
    logits, labels = logits[counted], labels[counted]
    if len(labels) < 2:
        raise ValueError(f"labels must leave at least 2 images to score, got {len(labels)}")
    rows: dict[str, tuple[tuple[float, ...], Tensor]] = {"raw": ((1.0,), score_logits(logits, labels))}
    if alpha is not None and check_alpha(alpha) not in (0, 1):
        rows["folded"] = ((1 / alpha,), score_logits(logits, labels, alpha))

    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    halves = order.tensor_split(2)
    temperatures = tuple(fit_temperature(logits[half], labels[half]) for half in halves)
    fitted = torch.empty_like(rows["raw"][1])
    for half, temperature in zip(reversed(halves), temperatures, strict=True):
        fitted[half] = score_logits(logits[half], labels[half], 1 / temperature)
    rows["fitted"] = (temperatures, fitted)

    hits = (logits.argmax(dim=1) == labels).cpu().numpy()
    return {name: _score(used, scores, hits, bins) for name, (used, scores) in rows.items()}


@checked
def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T in [0.01, 100] at which ``softmax(logits / T)`` has the smallest NLL (Guo et al. 2017).

    The NLL is convex in 1/T, so there is one minimum. If every image is right, the smallest T fits best
    and says nothing about other images, which is logged as a warning.

    Args:
        logits: Shape (N, C), of images that are not scored afterwards.
        labels: Shape (N); images with the label -100 are left out.

    Raises:
        ValueError: No image is left to fit on, or the logits are not finite.

    Example:
        >>> round(fit_temperature(torch.tensor([[3.0, 0.0]]).repeat(4, 1), torch.tensor([0, 0, 0, 1])), 2)
        2.73
    """
    from scipy.optimize import minimize_scalar

    check_logits(logits, labels)
    counted = labels != IGNORED
    logits, labels = logits[counted].double(), labels[counted]
    if not len(labels) or not logits.isfinite().all():
        raise ValueError(f"logits must be finite and at least one image labelled, got {len(labels)} labelled images")

    def nll(log_temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits * math.exp(-log_temperature), labels).item()

    if bool((logits.argmax(dim=1) == labels).all()):
        logger.warning("a temperature fitted to %d images that are all right says nothing of others", len(labels))
    return math.exp(minimize_scalar(nll, bounds=(math.log(0.01), math.log(100)), method="bounded").x)


def _score(temperatures: tuple[float, ...], scores: Tensor, hits: NDArray[np.bool_], bins: int) -> Calibration:
    rows = scores.cpu().numpy()
    values = probability_scores(rows, hits, bins)
    confidence = rows[:, 1]
    return Calibration(temperatures, **values, confidence=confidence, reliability=reliability(confidence, hits, bins))
