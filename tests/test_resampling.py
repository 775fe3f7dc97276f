"""Intervals and paired tests by drawing images, against loops over scikit-learn's scores."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, r2_score

from convexhead import resampling
from convexhead.experiments.probe_outcomes import OfClasses, OfLabels, OfNumbers, OfPixels
from convexhead.metrics import Predictions
from convexhead.resampling import average_precisions, interval, paired, r_squareds, score

DRAWS = 100


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(resampling, "DRAWS", DRAWS)


def labels(seed=0, n=40, c=3, noise=1.0):
    """Targets, and probabilities with many ties."""
    rng = np.random.default_rng(seed)
    truth = (np.random.default_rng(9).random((n, c)) < 0.3).astype(float)
    logits = 2 * truth + noise * rng.normal(size=(n, c))
    return OfLabels(np.round(1 / (1 + np.exp(-logits)), 1), truth)


def numbers(seed=0, n=40, c=2, noise=0.7):
    y = np.random.default_rng(9).normal(size=(n, c))
    return OfNumbers(y + noise * np.random.default_rng(seed).normal(size=(n, c)), y)


def pixels(seed=0, n=20):
    rng = np.random.default_rng(seed)
    return OfPixels(rng.integers(0, 50, (n, 3, 3)) + 30 * np.eye(3, dtype=int))


def by_hand(outcome, rows):
    """The score of some images, an image as often as it is in ``rows``."""
    if isinstance(outcome, OfLabels):
        y, p = outcome.targets[rows] >= 0.5, outcome.p[rows]
        return np.mean([average_precision_score(y[:, k], p[:, k]) for k in range(y.shape[1]) if y[:, k].any()])
    if isinstance(outcome, OfNumbers):
        return r2_score(outcome.targets[rows], outcome.f[rows])
    matrix = outcome.confusions[rows].sum(0)
    return np.mean([matrix[k, k] / (matrix[k].sum() + matrix[:, k].sum() - matrix[k, k]) for k in range(len(matrix))])


@pytest.mark.parametrize("make", [labels, numbers, pixels])
def test_intervals_are_percentiles_of_resampled_scores(make):
    outcome = make()
    n = len(outcome)
    assert score(outcome) == pytest.approx(by_hand(outcome, np.arange(n)))
    rng = np.random.default_rng(5)
    scores = [by_hand(outcome, rng.integers(0, n, n)) for _ in range(DRAWS)]
    np.testing.assert_allclose(interval(outcome, seed=5), np.quantile(scores, [0.025, 0.975]))


@pytest.mark.parametrize("right", [np.ones(30, bool), np.zeros(30, bool)])
def test_draws_that_are_all_alike_are_no_interval(right):
    always = OfClasses(Predictions(np.zeros(30, int), 1 - right.astype(int), 2 - right, np.ones(30)))
    groups = np.arange(30) // 3
    values = always.values("ab", 0, groups)
    assert values["top1"] == right[0]
    assert values["low"] is values["high"] is None
    alone = always.values("ab", 0)
    assert alone["high"] - alone["low"] > 0.1
    tested = OfNumbers(np.arange(9.0)[:, None], np.arange(9.0)[:, None]).values("x", 0)
    assert tested["r2"] == 1
    assert tested["low"] is None


@pytest.mark.parametrize("make", [labels, numbers, pixels])
def test_paired_tests_exchange_what_methods_say(make):
    first, second = make(0), make(1)
    found = paired(first, second, seed=3)
    n = len(first)
    value = by_hand(first, np.arange(n)) - by_hand(second, np.arange(n))
    assert found.value == pytest.approx(value)
    assert found.low <= found.value <= found.high
    rng, both, as_large = np.random.default_rng([3, 1]), first.joined(second), 0
    for _ in range(DRAWS):
        own = rng.random(n) < 0.5
        rows = np.where(own, np.arange(n), n + np.arange(n))
        others = np.where(own, n + np.arange(n), np.arange(n))
        as_large += abs(by_hand(both, rows) - by_hand(both, others)) >= abs(value) - 1e-12
    assert found.p_value == pytest.approx((1 + as_large) / (1 + DRAWS))


def test_methods_that_say_the_same_do_not_differ():
    for outcome in (labels(), numbers(), pixels()):
        np.testing.assert_array_equal(paired(outcome, outcome), (0, np.nan, np.nan, 1))


def test_a_much_better_method_has_the_smallest_p():
    found = paired(numbers(noise=0.1), numbers(noise=2.0))
    assert found.p_value == 1 / (1 + DRAWS)
    assert 0 < found.low < found.value < found.high


def test_p_values_of_methods_that_are_alike_are_uniform():
    """The test keeps its level: of 200 pairs of equally good methods about a tenth have p ≤ 0.1."""
    few = [paired(numbers(2 * i, n=25, c=1), numbers(2 * i + 1, n=25, c=1), seed=i).p_value <= 0.1 for i in range(200)]
    assert 0.04 < np.mean(few) < 0.17  # seven out of ten thousand such tests would be outside


def test_scores_that_are_not_defined_are_nan():
    p, y = np.array([0.1, 0.9, 0.5]), np.array([True, False, False])
    weights = np.array([[1.0, 0, 0], [0, 1, 1], [2, 1, 0]])
    np.testing.assert_allclose(average_precisions(p, y, weights), [1, np.nan, 2 / 3])
    common = OfLabels(np.array([[0.9, 0.2], [0.8, 0.7], [0.7, 0.1]]), np.array([[1.0, 0], [1, 1], [0, 0]]))
    without = np.array([[1.0, 1, 0]])  # in this draw all images have the first label
    np.testing.assert_allclose(common.scores(without), [1.0])
    assert np.isnan(r_squareds(p, np.array([1.0, 2, 2]), np.array([[0.0, 1, 1]]))).all()


# -- images that belong together ---------------------------------------------------------------------------------------
def classes(seed=0, n=40):
    rng = np.random.default_rng(seed)
    predicted, truth = rng.integers(0, 2, n), np.random.default_rng(9).integers(0, 2, n)
    return OfClasses(Predictions(truth, predicted, 1 + (predicted != truth), np.full(n, 0.6)))


@pytest.mark.parametrize("make", [labels, numbers, pixels])
def test_groups_are_drawn_whole(make):
    outcome = make()
    n = len(outcome)
    groups = np.random.default_rng(1).permutation(np.arange(n) % 7)
    rng = np.random.default_rng(5)
    draws = [rng.integers(0, 7, 7) for _ in range(DRAWS)]
    scores = [by_hand(outcome, np.concatenate([np.flatnonzero(groups == g) for g in drawn])) for drawn in draws]
    np.testing.assert_allclose(interval(outcome, seed=5, groups=groups), np.quantile(scores, [0.025, 0.975]))


@pytest.mark.parametrize("make", [classes, labels, numbers, pixels])
def test_each_image_a_group_is_each_image(make):
    first, second = make(0), make(1)
    alone = np.arange(len(first))
    if make is not classes:
        assert first.against(second, 3, alone) == pytest.approx(first.against(second, 3))
        assert first.values("abc", 3, alone) == pytest.approx(first.values("abc", 3))
        return
    low, high = (first.values("ab", 3, alone)[key] for key in ("low", "high"))
    assert low < first.values("ab", 3)["top1"] < high
    assert first.against(second, 3, alone)["p_value"] == pytest.approx(first.against(second, 3)["p_value"], abs=0.15)


@pytest.mark.parametrize("make", [classes, labels, numbers, pixels])
def test_copies_of_images_in_their_groups_tell_nothing_new(make):
    """Of images that are there four times, drawing single ones promises an interval of half the width."""
    first, second = make(0), make(1)

    def four_times(outcome):
        if isinstance(outcome, OfClasses):
            return OfClasses(
                Predictions(**{key: np.tile(value, 4) for key, value in vars(outcome.predictions).items()})
            )
        return type(outcome)(*(np.concatenate([value] * 4) for value in outcome.arrays()))

    n = len(first)
    groups, names = np.tile(np.arange(n), 4), "abc"
    once, fold = first.values(names, 0, np.arange(n)), four_times(first).values(names, 0, groups)
    assert (fold["low"], fold["high"]) == pytest.approx((once["low"], once["high"]), rel=1e-6)
    blind = four_times(first).values(names, 0)
    assert blind["high"] - blind["low"] < 0.75 * (fold["high"] - fold["low"])
    tested = four_times(first).against(four_times(second), 0, groups)
    assert tested["p_value"] == first.against(second, 0, np.arange(n))["p_value"]


@pytest.mark.parametrize("make", [classes, labels, numbers, pixels])
def test_a_single_group_has_no_interval(make):
    one = np.zeros(len(make()), int)
    values, tested = make(0).values("abc", 0, one), make(0).against(make(1), 0, one)
    assert values["low"] is values["high"] is None
    assert tested["p_value"] == 1
    assert tested.get("difference_low") is None
