"""scikit-learn's own checks, and life inside its tools."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import convexhead as ch

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.mark.slow
@parametrize_with_checks(
    [
        # Weighted and repeated samples give the same optimum, and fits that end near it give nearly the same.
        cls(head, fit_intercept=True, tol=1e-10, n_queries=3)
        for cls in (ch.ConvexHeadClassifier, ch.ConvexHeadRegressor)
        for head in ("mlp", "linear", "attentive")
    ]
)
def test_check_estimator(estimator, check):
    check(estimator)


@pytest.mark.table
@pytest.mark.filterwarnings("ignore:the best β", "ignore:The least populated class")
@parametrize_with_checks(
    [
        cls("linear", beta_ratios=[0.1, 0.03], cv=3, fit_intercept=True, tol=1e-10)
        for cls in (ch.ConvexHeadClassifierCV, ch.ConvexHeadRegressorCV)
    ]
)
def test_check_estimator_that_chooses_beta(estimator, check):
    check(estimator)


def test_grid_search_over_a_pipeline():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(90, 6)), np.repeat(["a", "b", "c"], 30)
    X[y == "a", 0] += 3
    search = GridSearchCV(
        make_pipeline(StandardScaler(), ch.ConvexHeadClassifier("mlp", random_state=0)),
        {"convexheadclassifier__beta_ratio": [0.5, 0.05]},
        cv=3,
    ).fit(X, y)
    assert search.best_score_ > 0.5
    assert search.best_estimator_[-1].certificate_.converged


def test_clone_keeps_every_parameter():
    estimator = ch.ConvexHeadClassifier("fno", beta=0.3, grid=(2, 3), gates=np.ones((1, 6, 2)), max_heads=4)
    assert clone(estimator).get_params().keys() == estimator.get_params().keys()
    assert clone(estimator).grid == (2, 3)
