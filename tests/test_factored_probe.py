"""A probe that is trained in its factors, as the field does, ends at the optimum of the convex program."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import convexhead as ch


def test_the_best_of_twenty_factored_probes_is_the_certified_optimum():
    rng = np.random.default_rng(0)
    n, s, d, c, J = 12, 4, 3, 2, 3
    X, y = rng.standard_normal((n, s, d)), np.arange(n) % c
    q = rng.standard_normal((J, d))
    clf = ch.ConvexHeadClassifier("attentive", queries=q, query_norm="each", beta_ratio=0.2, tol=1e-7).fit(X, y)
    scores = np.exp(X @ q.T)
    features = torch.from_numpy(np.einsum("nsd,nsj->njd", X, scores / scores.sum(1, keepdims=True)))
    m, beta, target = min(d, c), clf.beta_, torch.from_numpy(y)

    def objective(flat):
        w = torch.from_numpy(flat).requires_grad_()
        V, W = w[: J * d * m].reshape(J, d, m), w[J * d * m :].reshape(J, m, c)
        logits = torch.einsum("njd,jdm,jmc->nc", features, V, W)
        value = torch.nn.functional.cross_entropy(logits, target) + beta / 2 * w.square().sum()
        value.backward()
        return value.item(), w.grad.numpy()

    size = J * (d * m + m * c)
    ends = [minimize(objective, rng.standard_normal(size), jac=True, method="L-BFGS-B").fun for _ in range(20)]
    assert min(ends) >= clf.certificate_.dual
    assert min(ends) == pytest.approx(clf.certificate_.primal, rel=1e-5)
    assert clf.certificate_.primal < 0.99 * np.log(c)  # weights that are not zero
