"""Second-order pooling as self-attention: the page's two formulas, and CVXPY on the program that it names."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest

import convexhead as ch

N, S, D, C = 90, 5, 4, 3


@pytest.fixture(scope="module")
def data():
    """Tokens with a constant channel, and labels that depend on second moments."""
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(size=(N, S, D - 1)), np.ones((N, S, 1))], axis=2)
    scores = np.einsum("nsd,nse,dec->nc", X, X, rng.normal(size=(D, D, C)))
    return X, scores.argmax(1)


def second_moments(X):
    return np.einsum("nsd,nse->nde", X, X) / X.shape[1]


def test_mean_pooled_attention_reads_the_mean_through_second_moments(data):
    X, y = data
    clf = ch.ConvexHeadClassifier("self-attention", beta_ratio=0.05, random_state=0).fit(X, y)
    outputs = np.einsum("nd,kdb,nbe,kec->nc", X.mean(1), clf.mixing_[0], second_moments(X), clf.values_[0])
    np.testing.assert_allclose(clf.decision_function(X), outputs, atol=1e-10)


def test_a_constant_query_gives_second_order_pooling_with_a_nuclear_norm(data):
    X, y = data
    query = np.zeros((N, 1, D))
    query[:, :, -1] = 1
    tokens = np.concatenate([query, X], axis=1)
    clf = ch.ConvexHeadClassifier("self-attention", pool="cls", beta_ratio=0.05, tol=1e-6, random_state=0)
    clf.fit(tokens, y)
    U, V = clf.mixing_[0], clf.values_[0]
    np.testing.assert_allclose(U[:, :-1], 0, atol=1e-10)  # only the constant channel asks
    moments = second_moments(tokens)
    outputs = np.einsum("kb,nbe,kec->nc", U[:, -1], moments, V)
    np.testing.assert_allclose(clf.decision_function(tokens), outputs, atol=1e-10)

    W = cp.Variable((D, D * C))  # one matrix for each class, side by side, as `V` has them
    scores = [moments.reshape(N, -1) @ cp.vec(W[:, k::C], order="C") for k in range(C)]
    loss = cp.sum(cp.log_sum_exp(cp.vstack(scores).T, axis=1)) - sum(cp.sum(scores[k][y == k]) for k in range(C))
    problem = cp.Problem(cp.Minimize(loss / N + clf.beta_ * cp.normNuc(W)))
    problem.solve(solver=cp.CLARABEL)
    assert clf.certificate_.primal == pytest.approx(problem.value, rel=1e-6)
