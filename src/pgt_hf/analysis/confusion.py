"""The confusion matrix and the most confident mistakes of a classifier."""

from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..functional import IGNORED
from ..limits import Count, Whole, checked

_Most = Annotated[int, Whole("[0, inf)")]


@checked
def confusion_matrix(labels: ArrayLike, predicted: ArrayLike, classes: Count) -> NDArray[np.int64]:
    """How many images of each class (rows) were taken for each class (columns); ``IGNORED`` labels are left out.

    Example:
        >>> confusion_matrix([0, 0, 1], [0, 1, 1], classes=2).tolist()
        [[1, 1], [0, 1]]
    """
    truth, best = np.asarray(labels), np.asarray(predicted)
    for name, numbers in (("labels", truth), ("predicted", best)):
        if numbers.dtype.kind not in "iu":
            raise TypeError(f"{name} must hold class numbers, got dtype {numbers.dtype}")
        if numbers.ndim != 1 or numbers.shape != truth.shape:
            raise ValueError(f"labels and predicted must have shape (N,), got {truth.shape} and {best.shape}")
        if not ((numbers >= 0) & (numbers < classes) | (numbers == IGNORED)).all():
            raise ValueError(f"{name} must lie in [0, {classes}), got {numbers.min()} to {numbers.max()}")
    counted = truth != IGNORED
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (truth[counted], best[counted]), 1)
    return counts


@checked
def worst_mistakes(labels: ArrayLike, predicted: ArrayLike, confidence: ArrayLike, most: _Most) -> list[int]:
    """The indices of at most ``most`` wrongly classified images, the most confident mistake first.

    Arrays have shape (N); ``confidence`` is the probability of ``predicted``. ``IGNORED`` labels are left out.

    Example:
        >>> worst_mistakes([0, 1, 1], [1, 1, 0], [0.6, 0.9, 0.8], most=2)
        [2, 0]
    """
    truth, sure = np.asarray(labels), np.asarray(confidence)
    if not truth.shape == sure.shape == np.shape(predicted) or truth.ndim != 1:
        shapes = f"{truth.shape}, {np.shape(predicted)} and {sure.shape}"
        raise ValueError(f"labels, predicted and confidence must have the same shape (N,), got {shapes}")
    wrong = np.flatnonzero((truth != IGNORED) & (truth != np.asarray(predicted)))
    return [int(i) for i in wrong[np.argsort(-sure[wrong], kind="stable")][:most]]
