"""A sample of the attack on certificates in `benchmarks/trust.py`: nothing false, nothing crashed, nothing hung."""

from __future__ import annotations

import os

import pytest

import trust

SAMPLE = {
    "convex": 16,
    "relu": 6,
    "audit": 5,
    "reference": 30,
    "model_files": 24,
    "store_files": 12,
    "checkpoint_files": 6,
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="trials are stopped by an alarm")
@pytest.mark.parametrize("kind", SAMPLE)
def test_nothing_is_false_crashes_or_hangs(kind):
    outcomes = {seed: trust.trial(kind, seed) for seed in range(10_000, 10_000 + SAMPLE[kind])}
    wrong = {seed: told for seed, told in outcomes.items() if told[0] in ("false", "crashed", "hung")}
    assert not wrong


@pytest.mark.slow
def test_the_search_reaches_what_the_library_certifies():
    """A search that found too little would prove nothing: here it comes to within a certified gap."""
    import numpy as np

    from attained import search

    reached = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        program, y, parameters, geometry = trust.draw(rng, ("linear", "gated-relu"))
        if geometry not in ("normal", "integers", "duplicates", "zero tokens"):
            continue
        try:
            model = trust.estimator({**parameters, "max_time": 10.0}).fit(program.X, y)
        except ValueError:
            continue
        if model.certificate_.converged:
            best, _ = search(program, model.beta_, starts=[], random=6, rng=rng)
            assert best <= model.certificate_.primal * (1 + 1e-2)
            reached += 1
    assert reached
