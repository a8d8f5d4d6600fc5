"""Accuracy and calibration of classifiers, without keeping every logit.

In Trainer, ``ClassificationMetrics`` keeps a few numbers of each image as the batches pass, and scores them at the
end; other metrics of the best class come from the ``evaluate`` package, by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import EvalPrediction

from ..extras import require
from ..functional import IGNORED, check_alpha
from ..limits import Count, check_type, checked

TOP_K = 5
BINS = 15  # Guo et al. 2017


@checked
def top_k_accuracy(ranked: ArrayLike, labels: ArrayLike, k: Sequence[Count] = (1, TOP_K)) -> dict[str, float]:
    """The shares of images whose class is among the k best predictions.

    ``ranked`` has class numbers from best to worst, (N, K), as ``ranked_classes`` gives them. A k above K is left out.

    Example:
        >>> top_k_accuracy([[2, 0], [1, 2]], [2, 2], k=(1, 2))
        {'top1': 0.5, 'top2': 1.0}
    """
    best, truth = np.asarray(ranked), np.asarray(labels)
    if not len(truth):
        raise ValueError("top-k accuracy of no images at all is not defined")
    hits = best == truth[:, None]  # (N, K)
    return {f"top{depth}": float(hits[:, :depth].any(axis=1).mean()) for depth in k if depth <= best.shape[1]}


@checked
def ranked_classes(logits: Tensor, k: Count = TOP_K) -> Tensor:
    """The k best classes of each image, (N, k); the best one alone where there are no more than k classes.

    Example:
        >>> ranked_classes(torch.tensor([[0.1, 0.7, 0.2]]), k=2)
        tensor([[1, 2]])
    """
    return logits.topk(k if k < logits.size(-1) else 1, dim=-1).indices


@checked
def probability_scores(scores: ArrayLike, hits: ArrayLike, bins: Count = BINS) -> dict[str, float]:
    """How good the probabilities are: NLL, ECE and Brier score.

    With p the probabilities, y the class and q its one-hot vector, over N images:

        nll = mean(-log p_y),  brier = mean(sum_i (p_i - q_i)^2),
        ece = sum over bins of (images in it / N) |accuracy in it - mean confidence in it|

    Args:
        scores: What ``score_logits`` gives, (N, 3).
        hits: Whether the best class is right, (N).
        bins: Number of equal-width bins of the expected calibration error.

    Example:
        >>> {name: round(value, 4) for name, value in probability_scores([[np.log(0.75), 0.75, 0.625]], [1]).items()}
        {'nll': 0.2877, 'ece': 0.25, 'brier': 0.125}
    """
    rows, right = np.asarray(scores, dtype=np.float64).reshape(-1, 3), np.asarray(hits)
    if not len(right):
        raise ValueError("the calibration of no images at all is not defined")
    log_prob, confidence, squares = rows.T
    return {
        "nll": float(0.0 - log_prob.mean()),  # not -0.0, which is printed with its sign
        "ece": reliability(confidence, right, bins).ece if np.isfinite(confidence).all() else np.nan,  # it diverged
        "brier": float((squares - 2 * np.exp(log_prob) + 1).mean()),
    }


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram, bin by bin; accuracy and confidence of an empty bin are nan."""

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


@checked
def reliability(confidence: ArrayLike, hits: ArrayLike, bins: Count = BINS) -> Reliability:
    """Sorts predictions into ``bins`` of equal width by their confidence, as in Guo et al. 2017.

    Args:
        confidence: The probability of the best class, (N), in [0, 1]. Bin m holds ((m - 1) / bins, m / bins].
        hits: Whether that class is right, (N).
        bins: How many.

    Example:
        >>> reliability([0.9, 0.8, 0.3], [1, 0, 0], bins=2).count
        array([1, 2])
    """
    certain, right = np.asarray(confidence, dtype=np.float64), np.asarray(hits, dtype=np.float64)
    if certain.shape != right.shape or certain.ndim != 1:
        raise ValueError(f"confidence and hits must both have shape (N,), got {certain.shape} and {right.shape}")
    if not certain.size or not ((certain >= 0) & (certain <= 1 + 1e-6)).all():
        raise ValueError(f"confidence must hold at least one number, all in [0, 1], got {certain}")
    edges = np.linspace(0.0, 1.0, bins + 1)
    number = np.searchsorted(edges[1:], certain, side="left").clip(max=bins - 1)
    count = np.bincount(number, minlength=bins)
    with np.errstate(invalid="ignore"):
        accuracy, mean = (np.bincount(number, values, minlength=bins) / count for values in (right, certain))
    return Reliability(edges, count, accuracy, mean)


@checked
def score_logits(logits: Tensor, labels: Tensor, scale: float = 1.0) -> Tensor:
    """Three numbers of each image's ``softmax(scale * logits)`` for ``probability_scores``, in float32 at least.

    Args:
        logits: Shape (N, C).
        labels: Class numbers (N); the row of an image labelled ``IGNORED`` means nothing.
        scale: 1 for the raw probabilities, alpha for those that PGT trained, 1/T for a temperature T.

    Returns:
        Shape (N, 3): log-probability of the label, probability of the best class, sum of squared probabilities.

    Example:
        >>> score_logits(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).exp()[0, 0]
        tensor(0.5000)
    """
    check_logits(logits, labels)
    counted = labels != IGNORED
    classes = logits.size(1)
    if not ((labels >= 0) & (labels < classes) | ~counted).all():
        raise ValueError(f"labels must lie in [0, {classes}) or be {IGNORED}, got {labels.min()} to {labels.max()}")
    log_probs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale, dim=-1)
    log_prob = log_probs.gather(1, labels.where(counted, 0)[:, None])[:, 0]
    probs = log_probs.exp()
    return torch.stack([log_prob, probs.amax(dim=1), probs.square().sum(dim=1)], dim=1)


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Raises TypeError or ValueError unless they are logits (N, C) and class numbers (N)."""
    check_type("logits", logits, Tensor)
    check_type("labels", labels, Tensor)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must hold class numbers, got dtype {labels.dtype}")
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits and labels must have shapes (N, C) and (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )


class ClassificationMetrics:
    """Top-1, top-k, NLL, ECE and Brier score for Trainer, from a few numbers of each image.

    ``preprocess`` goes to Trainer's ``preprocess_logits_for_metrics``, the object itself to ``compute_metrics``. With
    several processes every image counts once. Images with the label -100 are left out, and counted as ``skipped``.

    Args:
        alpha: The exponent that the model was trained with. Unless it is None or 1, ``nll_folded``, ``ece_folded`` and
            ``brier_folded`` are reported too: those of ``softmax(alpha * logits)``, the probabilities that PGT trains
            and ``fold_powergrad`` gives. The attribute may be changed.
        keep_logits: Keep the logits and labels of the last evaluation in ``kept``, for ``Evaluation.from_logits``. The
            attribute may be changed.
        top_k: The second accuracy to report, next to top-1; left out where there are no more than ``top_k`` classes.
        bins: Number of bins of the ECE.
        also: More metrics of the best class, as ``evaluate.load`` takes them: "f1", "matthews_correlation", or the
            path of your own metric.
        **options: For those, such as ``average="macro"``.

    Example:
        >>> metrics = ClassificationMetrics(alpha=0.25)
        >>> kept = metrics.preprocess(torch.tensor([[0.0, 4.0, 1.0]]), torch.tensor([1]))
        >>> sorted(metrics(EvalPrediction(tuple(part.numpy() for part in kept), np.array([1]))))
        ['brier', 'brier_folded', 'ece', 'ece_folded', 'nll', 'nll_folded', 'top1']
        >>> trainer = Trainer(..., compute_metrics=metrics, preprocess_logits_for_metrics=metrics.preprocess)
    """

    @checked
    def __init__(
        self,
        alpha: float | None = None,
        top_k: Count = TOP_K,
        bins: Count = BINS,
        also: Sequence[str] = (),
        keep_logits: bool = False,
        **options: Any,
    ) -> None:
        if alpha is not None:
            check_alpha(alpha)
        self.alpha = alpha
        self.keep_logits = keep_logits
        self.kept: tuple[Tensor, Tensor] | None = None
        self.top_k = top_k
        self.bins = bins
        self._options = options
        self._also: Any = None
        if also:
            require("evaluate", "also=")
            import evaluate

            self._also = evaluate.combine(list(also))

    def preprocess(self, logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, ...]:
        """The best classes of each image, as ``ranked_classes``, and its ``score_logits``, raw and folded.

        ``logits`` are (N, C), or a tuple that begins with them.
        """
        raw = logits[0] if isinstance(logits, tuple) else logits
        scores = [score_logits(raw, labels, scale) for scale in self._scales.values()]
        return ranked_classes(raw, self.top_k), *scores, *([raw.float()] if self.keep_logits else [])

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        everyone, *parts = map(np.asarray, (prediction.label_ids, *prediction.predictions))
        if self.keep_logits:
            self.kept = torch.from_numpy(parts.pop()), torch.from_numpy(everyone)
        counted = everyone != IGNORED
        labels, best, *scores = (part[counted] for part in (everyone, *parts))
        results = top_k_accuracy(best, labels, k=(1, self.top_k))
        for suffix, rows in zip(self._scales, scores, strict=True):
            values = probability_scores(rows, best[:, 0] == labels, self.bins)
            results |= {name + suffix: value for name, value in values.items()}
        if self._also is not None:
            results |= self._also.compute(predictions=best[:, 0], references=labels, **self._options)
        if skipped := int((~counted).sum()):
            results["skipped"] = skipped
        return results

    @property
    def _scales(self) -> dict[str, float]:
        return {"": 1.0} if self.alpha is None or self.alpha == 1 else {"": 1.0, "_folded": self.alpha}
