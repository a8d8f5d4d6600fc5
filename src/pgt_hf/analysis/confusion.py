"""The confusion matrix and the most confident mistakes of a classifier."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..functional import IGNORED


def confusion_matrix(labels: ArrayLike, predicted: ArrayLike, classes: int) -> NDArray[np.int64]:
    """How many images of each class (rows) were taken for each class (columns); ``IGNORED`` labels are left out.

    Example:
        >>> confusion_matrix([0, 0, 1], [0, 1, 1], classes=2).tolist()
        [[1, 1], [0, 1]]
    """
    truth, best = np.asarray(labels), np.asarray(predicted)
    counted = truth != IGNORED
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (truth[counted], best[counted]), 1)
    return counts


def worst_mistakes(labels: ArrayLike, predicted: ArrayLike, confidence: ArrayLike, most: int) -> list[int]:
    """The indices of at most ``most`` wrongly classified images, the most confident mistake first.

    Arrays have shape (N); ``confidence`` is the probability of ``predicted``. ``IGNORED`` labels are left out.

    Example:
        >>> worst_mistakes([0, 1, 1], [1, 1, 0], [0.6, 0.9, 0.8], most=2)
        [2, 0]
    """
    truth, sure = np.asarray(labels), np.asarray(confidence)
    wrong = np.flatnonzero((truth != IGNORED) & (truth != np.asarray(predicted)))
    return [int(i) for i in wrong[np.argsort(-sure[wrong], kind="stable")][:most]]
