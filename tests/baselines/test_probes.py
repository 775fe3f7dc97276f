"""The linear probe: its bound is below what scikit-learn reaches, and its weights read vectors as they are."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from convexhead.baselines.probes import INVERSE_WEIGHTS, fit_probe, probe_scores
from convexhead.experiments.cells import AdamSettings
from convexhead.experiments.splits import Part, Splits
from convexhead.runtime.run_folder import RunFolder


@pytest.fixture(params=[10, 2], ids=["10 classes", "2 classes"])
def splits(request):
    """Digits as four tokens of 16 pixels each; some pixels are 0 in all of them."""
    images, labels = load_digits(n_class=request.param, return_X_y=True)
    tokens = images.astype(np.float32).reshape(-1, 4, 16)[:360]
    parts = [Part(tokens[i::3], labels[:360][i::3]) for i in range(3)]
    names = [str(k) for k in range(request.param)]
    return Splits(parts[0], parts[1], lambda: parts[2], names, (4, 1), "digits", "pixels", {})


@pytest.mark.slow
def test_the_bound_is_below_scikit_learn_s_optimum(splits, tmp_path):
    (piece,) = fit_probe("mean-token", splits, AdamSettings(), RunFolder(tmp_path)).runs
    record, y = piece.record, splits.train.labels
    assert record["converged"]
    assert record["fits"] == len(INVERSE_WEIGHTS) == 45
    # Two classes: one row of weights there, whose penalty is twice that of our two opposite columns.
    halved = 0.5 if len(splits.class_names) == 2 else 1.0
    C = 1 / (halved * len(y) * record["beta"])
    assert min(abs(INVERSE_WEIGHTS / C - 1)) < 1e-9
    assert f"C={C:.3g} " in record["detail"]

    X = StandardScaler().fit_transform(splits.train.mean_tokens()).astype(np.float64)
    theirs = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(X, y)
    loss = -theirs.predict_log_proba(X)[np.arange(len(y)), y].mean()
    optimum = loss + halved * record["beta"] / 2 * (theirs.coef_**2).sum()
    assert record["dual"] <= optimum * (1 + 1e-9)
    assert optimum * (1 - 1e-6) <= record["objective"] <= optimum * (1 + record["relative_gap"]) * (1 + 1e-6)


@pytest.mark.slow
def test_its_weights_take_vectors_as_they_are(splits, tmp_path):
    (piece,) = fit_probe("mean-token", splits, AdamSettings(), RunFolder(tmp_path)).runs
    scores = probe_scores("mean-token", piece, splits.train, splits.validation)
    assert scores.shape == (len(splits.validation.labels), len(splits.class_names))
    accuracy = (scores.argmax(1) == splits.validation.labels).mean()
    assert accuracy == pytest.approx(piece.record["validation_accuracy"], abs=1e-12)
    assert accuracy > 0.6
