"""Top-k accuracy through ``evaluate``, without a network and without keeping every logit of the evaluation set.

``evaluate.load("accuracy")`` fetches its code from the Hub; ``TopKAccuracy`` is one that lives here.
In Trainer, ``keep_top_k`` runs on each batch (K numbers per image instead of C) and ``compute_metrics`` at the end.
"""

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from datasets import Sequence as ListOf
from torch import Tensor
from transformers import EvalPrediction

__all__ = ["TOP_K", "TopKAccuracy", "compute_metrics", "keep_top_k"]

TOP_K = 5

_DESCRIPTION = "The share of images whose class is among the k best predictions."


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
        features = Features({"predictions": ListOf(Value("int64")), "references": Value("int64")})
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=str(self.__doc__), features=features
        )

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


def keep_top_k(logits: Tensor | tuple[Tensor, ...], labels: Tensor | None = None) -> Tensor:
    """The class numbers of the best ``TOP_K`` logits, for Trainer's ``preprocess_logits_for_metrics``.

    Args:
        logits: Shape (N, C), or a tuple that begins with it.
        labels: Not used; Trainer passes it.

    Returns:
        Shape (N, min(TOP_K, C)), from best to worst.

    Example:
        >>> keep_top_k(torch.tensor([[0.1, 0.7, 0.2]]))
        tensor([[1, 2, 0]])
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    return torch.topk(scores, min(TOP_K, scores.shape[-1]), dim=-1).indices


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 and top-5 of what ``keep_top_k`` kept, for Trainer's ``compute_metrics``.

    Example:
        >>> compute_metrics(EvalPrediction(predictions=np.array([[1, 2, 0]]), label_ids=np.array([2])))
        {'top1': 0.0, 'top3': 1.0}
    """
    return TopKAccuracy().compute(predictions=prediction.predictions, references=prediction.label_ids)
