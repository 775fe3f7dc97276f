"""Metrics of classifiers on test images: accuracies, calibration, intervals, paired tests.

All of them are functions of `Predictions`: of each image the true and the predicted class, the rank of the true one,
and the confidence. That is all that has to be kept of a classifier's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.stats import binomtest

from convexhead.errors import InputError

Array = NDArray[Any]
BINS = 15
"""Bins of confidence of the calibration error, the usual number."""
DRAWS = 1000
"""Draws of a bootstrap, the usual number."""


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


def bootstrap_interval(
    predictions: Predictions, *, draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """The percentile interval of top-1 accuracy over test images drawn with replacement.

    It says how the accuracy of *this* classifier varies with the test images, and nothing of other training images. The
    same seed and number of images give the same draws, for every classifier.
    """
    rng, n = np.random.default_rng(seed), len(predictions.truth)
    means = [predictions.right[rng.integers(0, n, n)].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
