"""Metrics of classifiers on test images: accuracies, calibration, intervals, paired tests.

Of one class an image they are functions of `Predictions`: of each image the true and the predicted class, the rank of
the true one, and the confidence. That is all that has to be kept of a classifier's outputs. Of several labels an image
they are functions of probabilities and indicators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_auc_score

from convexhead.errors import InputError

Array = NDArray[Any]
BINS = 15
"""Bins of confidence of the calibration error, the usual number."""
LEVEL = 0.95
"""Of intervals, the usual one."""


@dataclass(frozen=True)
class Predictions:
    """What a classifier said of ``n`` images.

    Attributes
    ----------
    truth, predicted : int array (n,)
        Classes.
    rank : int array (n,)
        1 where the prediction is right; else 1 + the number of other classes that score at least as high as the true
        one, so that ties count against the classifier. One more than there are classes where it does not know the true
        one.
    confidence : float array (n,)
        Probability of the predicted class.
    """

    truth: Array
    predicted: Array
    rank: Array
    confidence: Array

    @classmethod
    def of(cls, probabilities: Float[Array, "n c"], classes: Int[Array, " c"], truth: Int[Array, " n"]) -> Predictions:
        """Read the probabilities of ``classes``.

        Raises
        ------
        InputError
            They are not finite.
        """
        if not np.isfinite(probabilities).all():
            raise InputError("the probabilities of some images are not finite numbers")
        n, c = probabilities.shape
        best = probabilities.argmax(1)
        predicted = classes[best]
        known = truth[:, None] == classes[None, :]
        own = np.where(known, probabilities, -np.inf).max(1, keepdims=True)
        rank = np.where(known.any(1), (probabilities >= own).sum(1), c + 1)
        rank = np.where(predicted == truth, 1, np.maximum(rank, 2))
        return cls(truth, predicted, rank, probabilities[np.arange(n), best])

    @property
    def right(self) -> Array:
        """Whether each image is predicted right."""
        return self.predicted == self.truth


def top_k_accuracy(predictions: Predictions, k: int = 1) -> float:
    """The share of images whose true class is among the ``k`` most probable ones."""
    return float((predictions.rank <= k).mean())


def per_class_accuracy(predictions: Predictions) -> dict[int, float]:
    """Of each class that has images, the share of them that is predicted right: its recall."""
    return {int(c): float(predictions.right[predictions.truth == c].mean()) for c in np.unique(predictions.truth)}


def balanced_accuracy(predictions: Predictions) -> float:
    """The mean of `per_class_accuracy`: every class counts alike."""
    return float(np.mean(list(per_class_accuracy(predictions).values())))


def calibration_error(predictions: Predictions, bins: int = BINS) -> float:
    """The expected calibration error: ``Σ_b n_b/n |accuracy_b − mean confidence_b|``.

    The bins have equal width on [0, 1]; the upper edge of a bin belongs to it.
    """
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, predictions.confidence, side="left") - 1, 0, bins - 1)
    excess = np.bincount(bin_of, weights=predictions.confidence - predictions.right, minlength=bins)
    return float(np.abs(excess).sum() / len(bin_of))


def accuracy_interval(right: Bool[Array, " n"]) -> tuple[float, float]:
    """The 95% interval of top-1 accuracy, given which of ``n`` test images are right: Wilson's score interval.

    It says how the accuracy of *this* classifier varies with the test images, and nothing of other training images. It
    has a width where all images are right, unlike the percentiles of images drawn with replacement.
    """
    found = binomtest(int(right.sum()), len(right)).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


class PairedTest(NamedTuple):
    """McNemar's exact test of two classifiers on the same images.

    Attributes
    ----------
    gained, lost : int
        Images that only the first, or only the second, predicts right.
    p_value : float
        Two-sided: the probability of so uneven a split, or one less probable, where each of these images is as likely
        on either side.
    """

    gained: int
    lost: int
    p_value: float


def mcnemar(first: Predictions, second: Predictions) -> PairedTest:
    """Compare two classifiers by the images that only one of them predicts right."""
    gained = int((first.right & ~second.right).sum())
    lost = int((second.right & ~first.right).sum())
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return PairedTest(gained, lost, p_value)


# -- several labels an image ------------------------------------------------------------------------------------------
def average_precision(
    p: Float[Array, "n c"], truth: Bool[Array, "n c"], sample_weight: Array | None = None
) -> Float[Array, " c"]:
    """The average precision of each label, NaN where all images have it or none: ``Σ_k (R_k − R_{k−1}) P_k``."""
    return _of_each(average_precision_score, p, truth, sample_weight)


def auroc(p: Float[Array, "n c"], truth: Bool[Array, "n c"], sample_weight: Array | None = None) -> Float[Array, " c"]:
    """The area under the ROC curve of each label, NaN where all images have it or none."""
    return _of_each(roc_auc_score, p, truth, sample_weight)


def mean_of_known(values: Float[Array, " c"]) -> float:
    """The mean of what is no NaN; NaN where there is nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _of_each(score: Callable[..., float], p: Array, truth: Array, sample_weight: Array | None) -> Array:
    """A score of each column; weights of images ``(n,)`` or of entries ``(n, c)``, of which 0 is as not there."""
    w = np.ones(p.shape) if sample_weight is None else np.asarray(sample_weight, float)
    w = np.broadcast_to(w[:, None] if w.ndim == 1 else w, p.shape)
    found = np.full(p.shape[1], np.nan)
    for k in range(p.shape[1]):
        there = w[:, k] > 0
        if len(np.unique(truth[there, k])) == 2:
            found[k] = score(truth[there, k], p[there, k], sample_weight=w[there, k])
    return found
