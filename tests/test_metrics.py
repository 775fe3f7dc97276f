"""Metrics against scikit-learn, against sums by hand, and on examples whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score

import convexhead as ch
from convexhead.metrics import (
    Predictions,
    accuracy_interval,
    balanced_accuracy,
    calibration_error,
    mcnemar,
    per_class_accuracy,
    top_k_accuracy,
)


def random_case(seed, n=200, c=8):
    """Probabilities, classes whose numbers have gaps, and labels of unequal frequency."""
    rng = np.random.default_rng(seed)
    classes = np.sort(rng.choice(30, c, replace=False))
    truth = rng.choice(classes, n, p=rng.dirichlet(np.ones(c)))
    scores = rng.normal(size=(n, c)) + 1.5 * (truth[:, None] == classes)
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return probabilities, classes, truth


def of_right(right, confidence=None):
    right = np.asarray(right, bool)
    truth = np.zeros(len(right), int)
    confidence = np.ones(len(right)) if confidence is None else np.asarray(confidence, float)
    return Predictions(truth, np.where(right, 0, 1), np.where(right, 1, 2), confidence)


@pytest.mark.parametrize("seed", range(5))
def test_accuracies_are_scikit_learn_s(seed):
    probabilities, classes, truth = random_case(seed)
    predictions = Predictions.of(probabilities, classes, truth)
    assert top_k_accuracy(predictions) == pytest.approx(accuracy_score(truth, classes[probabilities.argmax(1)]))
    for k in (1, 3, 5):
        expected = top_k_accuracy_score(truth, probabilities, k=k, labels=classes)
        assert top_k_accuracy(predictions, k) == pytest.approx(expected)
    assert balanced_accuracy(predictions) == pytest.approx(balanced_accuracy_score(truth, predictions.predicted))
    for number, accuracy in per_class_accuracy(predictions).items():
        mine = truth == number
        assert accuracy == pytest.approx((predictions.predicted[mine] == number).mean())


def test_ties_and_unknown_classes_count_against_the_classifier():
    probabilities = np.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    predictions = Predictions.of(probabilities, np.array([0, 1, 2]), np.array([0, 1, 2, 7]))
    assert predictions.rank.tolist() == [1, 2, 3, 4]
    assert top_k_accuracy(predictions, 3) == 0.75


def test_calibration_error_by_hand():
    # Two images in the bin (12/15, 13/15]: |0.5 - 0.83|; two in (13/15, 14/15]: |1 - 0.9|.
    predictions = of_right([1, 0, 1, 1], [0.82, 0.84, 0.88, 0.92])
    assert calibration_error(predictions) == pytest.approx((2 * 0.33 + 2 * 0.1) / 4)
    assert calibration_error(of_right([1, 1], [1.0, 1.0])) == 0
    assert calibration_error(of_right([0, 0], [1.0, 1.0])) == 1
    assert calibration_error(of_right([1, 0], [0.5, 0.5]), bins=2) == 0  # an upper edge belongs to its bin


@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_is_the_sum_over_bins(seed):
    predictions = Predictions.of(*random_case(seed))
    total = 0.0
    for b in range(15):
        inside = (predictions.confidence > b / 15) & (predictions.confidence <= (b + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(predictions.right[inside].mean() - predictions.confidence[inside].mean())
    assert calibration_error(predictions) == pytest.approx(total)


@pytest.mark.parametrize(("right", "n"), [(700, 1000), (39, 40), (1, 3), (0, 20), (40, 40)])
def test_accuracy_intervals_end_where_the_share_is_just_believable(right, n):
    # At an end p the share seen is 1.96 standard deviations of a binomial share away from p.
    ends = accuracy_interval(np.arange(n) < right)
    for p in ends:
        if 0 < p < 1:
            assert abs(right / n - p) / np.sqrt(p * (1 - p) / n) == pytest.approx(1.959964, rel=1e-5)
    assert ends[0] < right / n < ends[1] or right in (0, n)
    assert ends[1] - ends[0] > 0.05


def test_mcnemar_by_hand():
    first = of_right([1, 1, 1, 1, 1, 1, 0, 1, 0])
    second = of_right([0, 0, 0, 0, 0, 0, 1, 1, 0])
    test = mcnemar(first, second)
    assert (test.gained, test.lost) == (6, 1)
    assert test.p_value == pytest.approx(2 * (1 + 7) / 2**7)  # at most one of seven fair coins, on either side
    assert mcnemar(second, first) == (1, 6, test.p_value)
    assert mcnemar(first, first) == (0, 0, 1.0)


def test_probabilities_that_are_none_are_refused():
    with pytest.raises(ch.InputError, match="not finite"):
        Predictions.of(np.array([[np.nan, 1.0]]), np.array([0, 1]), np.array([0]))
