"""Accuracy and calibration through ``evaluate``, without a network and without keeping every logit.

``evaluate.load("accuracy")`` fetches its code from the Hub; the metrics here live in this file. In Trainer,
``ClassificationMetrics`` keeps a few numbers of each image as the batches pass, and scores them at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from datasets import Sequence as ListOf
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import EvalPrediction

from ..functional import check_alpha
from ..splits import IGNORED

__all__ = [
    "BINS",
    "IGNORED",
    "TOP_K",
    "ClassificationMetrics",
    "ProbabilityScores",
    "Reliability",
    "TopKAccuracy",
    "reliability",
    "score_logits",
]

TOP_K = 5
BINS = 15  # Guo et al. 2017


class TopKAccuracy(evaluate.Metric):
    """The share of images whose class is among the k best predictions, as an ``evaluate`` metric.

    Its ``compute`` and ``add_batch`` take ``predictions`` of shape (N, K), class numbers from best to worst, and
    ``references`` of shape (N). ``compute(..., k=(1, 5))`` says which k to report. A k above K, as where there are
    fewer classes, is reported as top-K under that name.

    Raises:
        ValueError: There is nothing to count, or a k is below 1.

    Example:
        >>> TopKAccuracy().compute(predictions=[[2, 0], [1, 2]], references=[2, 2], k=(1, 2))
        {'top1': 0.5, 'top2': 1.0}
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**({"keep_in_memory": True} | kwargs))

    def _info(self) -> evaluate.MetricInfo:
        return _describe(self, predictions=ListOf(Value("int64")), references=Value("int64"))

    def _compute(
        self, *, predictions: Sequence[Sequence[int]], references: Sequence[int], k: Sequence[int] = (1, TOP_K)
    ) -> dict[str, float]:
        ranked, truth = np.asarray(predictions), np.asarray(references)
        if not len(truth):
            raise ValueError("top-k accuracy of no images at all is not defined")
        if min(k) < 1:
            raise ValueError(f"k must be at least 1, got {tuple(k)}")
        hits = ranked == truth[:, None]  # (N, K)
        depths = sorted({min(depth, ranked.shape[1]) for depth in k})
        return {f"top{depth}": float(hits[:, :depth].any(axis=1).mean()) for depth in depths}


class ProbabilityScores(evaluate.Metric):
    """How good the probabilities are: NLL, ECE and Brier score, as an ``evaluate`` metric.

    Its ``compute`` and ``add_batch`` take ``predictions`` of shape (N, 3), what ``score_logits`` keeps of an image:
    the log-probability of its class, the probability of the best class, and the sum of all squared probabilities;
    and ``references`` of shape (N), 1 where the best class is the image's, else 0. ``compute(..., bins=15)`` sets the
    number of equal-width bins of the expected calibration error.

    With p the probabilities, y the class and q its one-hot vector, over N images:

        nll = mean(-log p_y),  brier = mean(sum_i (p_i - q_i)^2),
        ece = sum over bins of (images in it / N) |accuracy in it - mean confidence in it|

    Raises:
        ValueError: There is nothing to score, or ``bins`` is below 1.

    Example:
        >>> scores = ProbabilityScores().compute(predictions=[[np.log(0.75), 0.75, 0.625]], references=[1])
        >>> {name: round(value, 4) for name, value in scores.items()}
        {'nll': 0.2877, 'ece': 0.25, 'brier': 0.125}
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**({"keep_in_memory": True} | kwargs))

    def _info(self) -> evaluate.MetricInfo:
        return _describe(self, predictions=ListOf(Value("float64")), references=Value("int64"))

    def _compute(
        self, *, predictions: Sequence[Sequence[float]], references: Sequence[int], bins: int = BINS
    ) -> dict[str, float]:
        scores, hits = np.asarray(predictions, dtype=np.float64).reshape(-1, 3), np.asarray(references)
        if not len(hits):
            raise ValueError("the calibration of no images at all is not defined")
        log_prob, confidence, squares = scores.T
        return {
            "nll": float(-log_prob.mean()),
            "ece": reliability(confidence, hits, bins).ece,
            "brier": float((squares - 2 * np.exp(log_prob) + 1).mean()),
        }


@dataclass(frozen=True)
class Reliability:
    """What a reliability diagram shows, bin by bin; an empty bin has nan for accuracy and confidence."""

    edges: NDArray[np.float64]
    count: NDArray[np.int64]
    accuracy: NDArray[np.float64]
    confidence: NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Expected calibration error, in [0, 1]."""
        filled = self.count > 0
        gap = np.abs(self.accuracy - self.confidence)[filled]
        return float((self.count[filled] * gap).sum() / self.count.sum())


def reliability(confidence: ArrayLike, hits: ArrayLike, bins: int = BINS) -> Reliability:
    """Sorts predictions into ``bins`` of equal width by their confidence, as in Guo et al. 2017.

    Args:
        confidence: The probability of the best class, (N), in [0, 1]. Bin m holds ((m - 1) / bins, m / bins].
        hits: Whether that class is right, (N).
        bins: How many.

    Raises:
        ValueError: ``bins`` is below 1, or the shapes differ.

    Example:
        >>> reliability([0.9, 0.8, 0.3], [1, 0, 0], bins=2).count
        array([1, 2])
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    certain, right = np.asarray(confidence, dtype=np.float64), np.asarray(hits, dtype=np.float64)
    if certain.shape != right.shape or certain.ndim != 1:
        raise ValueError(f"confidence and hits must both have shape (N,), got {certain.shape} and {right.shape}")
    edges = np.linspace(0.0, 1.0, bins + 1)
    number = np.searchsorted(edges[1:], certain, side="left").clip(max=bins - 1)
    count = np.bincount(number, minlength=bins)
    with np.errstate(invalid="ignore"):
        accuracy, mean = (np.bincount(number, values, minlength=bins) / count for values in (right, certain))
    return Reliability(edges, count, accuracy, mean)


def score_logits(logits: Tensor, labels: Tensor, scale: float = 1.0) -> Tensor:
    """What ``ProbabilityScores`` needs of each image's ``softmax(scale * logits)``, in float32 at least.

    Args:
        logits: Shape (N, C).
        labels: Class numbers (N); those of ``IGNORED`` give a row that means nothing.
        scale: 1 for the raw probabilities, alpha for those that PGT trained, 1/T for a temperature T.

    Returns:
        Shape (N, 3): log-probability of the label, probability of the best class, sum of squared probabilities.

    Raises:
        ValueError: A label is no class, or the shapes do not fit.

    Example:
        >>> score_logits(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).exp()[0, 0]
        tensor(0.5000)
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits and labels must have shapes (N, C) and (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    counted = labels != IGNORED
    if not ((labels >= 0) & (labels < logits.size(1)) | ~counted).all():
        raise ValueError(
            f"labels must lie in [0, {logits.size(1)}) or be {IGNORED}, got {labels.min()} to {labels.max()}"
        )
    log_probs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale, dim=-1)
    log_prob = log_probs.gather(1, labels.where(counted, 0)[:, None])[:, 0]
    probs = log_probs.exp()
    return torch.stack([log_prob, probs.amax(dim=1), probs.square().sum(dim=1)], dim=1)


class ClassificationMetrics:
    """Top-1, top-k, NLL, ECE and Brier score for Trainer, from a few numbers of each image.

    ``preprocess`` goes to Trainer's ``preprocess_logits_for_metrics``, the object itself to ``compute_metrics``. With
    several processes every image counts once. Images with the label -100 are left out; where there are some, their
    number is reported as ``skipped``.

    Args:
        alpha: The exponent that the model was trained with. Unless it is None or 1, ``nll_folded``, ``ece_folded`` and
            ``brier_folded`` are reported too: those of ``softmax(alpha * logits)``, the probabilities that PGT trains
            and ``fold_powergrad`` gives. The attribute may be moved.
        top_k: The second accuracy to report, next to top-1.
        bins: Number of bins of the ECE.

    Raises:
        TypeError, ValueError: ``alpha``, ``top_k`` or ``bins`` is not allowed.

    Example:
        >>> metrics = ClassificationMetrics(alpha=0.25)
        >>> kept = metrics.preprocess(torch.tensor([[0.0, 4.0, 1.0]]), torch.tensor([1]))
        >>> sorted(metrics(EvalPrediction(tuple(part.numpy() for part in kept), np.array([1]))))
        ['brier', 'brier_folded', 'ece', 'ece_folded', 'nll', 'nll_folded', 'top1', 'top3']
        >>> trainer = Trainer(..., compute_metrics=metrics, preprocess_logits_for_metrics=metrics.preprocess)
    """

    def __init__(self, alpha: float | None = None, top_k: int = TOP_K, bins: int = BINS) -> None:
        if alpha is not None:
            check_alpha(alpha)
        for name, value in (("top_k", top_k), ("bins", bins)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.alpha = alpha
        self.top_k = top_k
        self.bins = bins

    def preprocess(self, logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, ...]:
        """Keeps of each image: its best classes, from best to worst, and its scores, raw and folded.

        Args:
            logits: Shape (N, C), or a tuple that begins with it.
            labels: Shape (N).

        Returns:
            Shapes (N, min(top_k, C)), (N, 3) and, where there is something to fold, (N, 3); see ``score_logits``.
        """
        scores = logits[0] if isinstance(logits, tuple) else logits
        best = torch.topk(scores, min(self.top_k, scores.size(-1)), dim=-1).indices
        return best, *(score_logits(scores, labels, scale) for scale in self._scales.values())

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        counted = np.asarray(prediction.label_ids) != IGNORED
        labels = np.asarray(prediction.label_ids)[counted]
        best, *scores = (np.asarray(part)[counted] for part in prediction.predictions)
        results = dict(TopKAccuracy().compute(predictions=best, references=labels, k=(1, self.top_k)))
        for suffix, rows in zip(self._scales, scores, strict=True):
            values = ProbabilityScores().compute(predictions=rows, references=best[:, 0] == labels, bins=self.bins)
            results |= {name + suffix: value for name, value in values.items()}
        if skipped := int((~counted).sum()):
            results["skipped"] = skipped
        return results

    @property
    def _scales(self) -> dict[str, float]:
        return {"": 1.0} if self.alpha is None or self.alpha == 1 else {"": 1.0, "_folded": self.alpha}


def _describe(metric: evaluate.Metric, **features: Any) -> evaluate.MetricInfo:
    text = str(metric.__doc__)
    return evaluate.MetricInfo(
        description=text.partition("\n")[0], citation="", inputs_description=text, features=Features(features)
    )
