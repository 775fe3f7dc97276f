"""The linear head's Newton method where float32 ends."""

import numpy as np

import convexhead as ch
from convexhead.solvers import ridge


def test_short_steps_in_float32_give_way_to_float64(monkeypatch):
    """At a tiny β rounding turns Newton's steps: of the short ones that followed each took its products for nothing."""
    rng = np.random.default_rng(0)
    n, d, c = 1000, 300, 10
    X = (rng.standard_normal((n, d)) * np.logspace(0, -2, d)).astype(np.float32)
    y = (X @ rng.standard_normal((d, c))).argmax(1)
    beta, taken, search = 1 / (n * 1e7), [], ridge.minimise_on_plane

    def noted(problem, stage, *rest):
        found = search(problem, stage, *rest)
        if stage == beta:
            taken.append((str(problem.dtype), found[1]))
        return found

    monkeypatch.setattr(ridge, "minimise_on_plane", noted)
    clf = ch.ConvexHeadClassifier("linear", fit_intercept=True, beta=beta, tol=1e-4, random_state=0).fit(X, y)
    assert clf.certificate_.converged
    single = [t for dtype, t in taken if dtype == "torch.float32"]
    double = [t for dtype, t in taken if dtype == "torch.float64"]
    assert single
    assert all(t >= ridge.SHORT for t in single[:-1])
    assert double
    assert min(double) == 1
