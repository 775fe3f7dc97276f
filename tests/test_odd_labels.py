"""Labels as users have them: of any type, a rounding off, or missing where they do not count."""

from __future__ import annotations

import numpy as np
import pytest

import convexhead as ch

RNG = np.random.default_rng(0)
N, S = 24, 3
X = RNG.normal(size=(N, S, 4))
Y = np.arange(N) % 3
P = RNG.dirichlet(np.ones(3), N)
SEVERAL = (RNG.random((N, 3)) < 0.4).astype(float)
TOKENS = RNG.integers(0, 3, (N, S))


def fit(y, sample_weight=None, **settings):
    return ch.ConvexHeadClassifier("linear", beta_ratio=0.1, **settings).fit(X, y, sample_weight)


@pytest.mark.parametrize(
    "y",
    [
        Y.astype(object),
        Y.astype(np.int8),
        Y.astype(float),
        np.array(["a b", "ä\u200b", "日本"])[Y],
        np.array(["a", "b", "c"], object)[Y],
        Y.astype(np.uint64) + np.uint64(2**63),
        Y - 5,
    ],
    ids=["objects", "int8", "floats", "unicode", "texts as objects", "beyond int64", "negative"],
)
def test_labels_of_any_type(y):
    clf, plain = fit(y), fit(Y)
    assert clf.certificate_.primal == pytest.approx(plain.certificate_.primal, rel=1e-9)
    np.testing.assert_array_equal(clf.predict(X), np.unique(np.array(y.tolist()))[plain.predict(X)])
    assert clf.score(X, y) == plain.score(X, Y)


def test_truth_values_are_two_classes():
    clf = fit(Y > 0)
    assert clf.predict(X).dtype == bool
    np.testing.assert_array_equal(fit((Y > 0).astype(object)).predict_proba(X), clf.predict_proba(X))


@pytest.mark.parametrize(
    "rows",
    [P * (1 + 1e-6), P * (1 - 1e-6), P.astype(np.float32), P.astype(np.float16)],
    ids=["above", "below", "float32", "float16"],
)
def test_rows_that_are_a_rounding_off(rows):
    exact = rows.astype(float) / rows.astype(float).sum(1, keepdims=True)
    assert fit(rows).certificate_.primal == pytest.approx(fit(exact).certificate_.primal, rel=1e-12)


def test_entries_that_are_a_rounding_off():
    rows = np.eye(3)[Y]
    odd = rows + np.where(rows == 1, 1e-7, 0) - np.where(np.arange(3) == (Y[:, None] + 1) % 3, 1e-7, 0)
    assert fit(odd).certificate_.primal == pytest.approx(fit(rows).certificate_.primal, rel=1e-6)
    several = {"loss": "binary-cross-entropy"}
    assert fit(SEVERAL * (1 + 1e-7), **several).certificate_.primal == fit(SEVERAL, **several).certificate_.primal


# -- where the weight is 0, anything may stand -------------------------------------------------------------------------
W = (np.arange(N) > 4).astype(float)


def gap(y, w, value=np.nan):
    """``y`` with ``value`` where the weight is 0."""
    y = y.astype(object if value is None else float)
    y[w == 0] = value
    return y


@pytest.mark.parametrize(
    ("y", "w", "settings"),
    [
        (Y, W, {}),
        (P, W, {}),
        (SEVERAL, W, {"loss": "binary-cross-entropy"}),
        (SEVERAL, (RNG.random((N, 3)) < 0.7).astype(float), {"loss": "binary-cross-entropy"}),
        (TOKENS, (RNG.random((N, S)) < 0.7).astype(float), {"pool": None}),
        (np.eye(3)[TOKENS], (RNG.random((N, S)) < 0.7).astype(float), {"pool": None}),
    ],
    ids=["labels", "probabilities", "several", "entries", "tokens", "token probabilities"],
)
def test_missing_labels_of_weight_0(y, w, settings):
    full, clf = fit(y, w, **settings), fit(gap(y, w), w, **settings)
    assert clf.certificate_.identity == full.certificate_.identity
    assert clf.score(X, gap(y, w), w) == full.score(X, y, w)
    proof = ch.certify(clf, X, gap(y, w), sample_weight=w)
    assert proof.primal == pytest.approx(full.certificate_.primal, rel=1e-9)
    with pytest.raises(ch.InputError, match="NaN"):
        fit(gap(y, w), np.ones_like(w), **settings)
    if y.ndim == 2:  # folds of labels are stratified
        cv = ch.ConvexHeadClassifierCV("linear", beta_ratios=[0.1], cv=3, refit=False, **settings)
        np.testing.assert_array_equal(cv.fit(X, gap(y, w), w).scores_, cv.fit(X, y, w).scores_)


def test_a_missing_label_of_weight_0_among_objects():
    names = np.array(["ant", "bee", "cat"], object)[Y]
    clf = fit(gap(names, W, None), W)
    np.testing.assert_array_equal(clf.classes_, ["ant", "bee", "cat"])
    assert clf.certificate_.identity == fit(names, W).certificate_.identity


def test_samples_of_different_length_in_an_array_of_objects():
    samples = [X[i, : 1 + i % S] for i in range(N)]
    array = np.empty(N, object)
    array[:] = samples
    clf = ch.ConvexHeadClassifier("linear", beta_ratio=0.1).fit(array, Y)
    listed = ch.ConvexHeadClassifier("linear", beta_ratio=0.1).fit(samples, Y)
    np.testing.assert_array_equal(clf.predict(array), listed.predict(samples))
