"""Work on a dual norm ends when it is told to, with a bound that holds; what depends on the tokens is found once."""

from __future__ import annotations

import itertools
import math
import signal

import numpy as np
import pytest
import torch

import convexhead as ch
from convexhead.drive import solve
from convexhead.dual_norm import norm
from convexhead.dual_norm.bound import largest_norm
from convexhead.dual_norm.faces import LIMITS, count_faces, faces, largest_norm_on_faces
from convexhead.dual_norm.norm import NormOracle, _over_patterns, product_of_norms
from convexhead.dual_norm.scores import Form
from convexhead.program.activations import ReLU
from convexhead.program.heads import make_head
from convexhead.program.losses import Squared
from convexhead.program.operator import Operator
from convexhead.program.patterns import MAX_PATTERNS, cells, cells_and_doubt, most_arrangements, most_cells
from convexhead.program.problem import Problem
from convexhead.runtime.clock import OutOfTimeError
from convexhead.solvers.base import Stop


def at_call(k):
    """A clock that runs out when it is asked for the ``k``-th time."""
    calls = itertools.count(1)
    return lambda: next(calls) >= k


def random_form(w, h, q, seed=0):
    generator = torch.Generator().manual_seed(seed)
    K, L, c = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((h, w), (w, q), (h, q)))
    return Form(L, torch.nn.functional.normalize(K), c)


def attained(form):
    u = torch.randn(20_000, form.K.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return float(form(torch.nn.functional.normalize(u)).norm(dim=1).max())


def build(n=6, d=3, c=2, name="mlp", s=1):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, s, d, generator=generator, dtype=torch.float64)
    head = make_head(name, s, d)
    Y = torch.randn(n, head.r, c, generator=generator, dtype=torch.float64)
    return Problem(Operator(X, head, ReLU(head)), Y, Squared())


@pytest.mark.parametrize("k", [1, 2, 5])
def test_lists_are_given_up(k):
    K = random_form(4, 8, 1).K
    with pytest.raises(OutOfTimeError):
        faces(K, late=at_call(k))
    with pytest.raises(OutOfTimeError):
        cells_and_doubt(K, late=at_call(k))


@pytest.mark.parametrize("k", [1, 2, 3, 30])
@pytest.mark.parametrize("h", [6, 300])
def test_branch_and_bound_ends_with_a_bound(k, h):
    form = random_form(4, h, 2)
    calls = itertools.count(1)
    upper, lower, _ = largest_norm(form, rtol=1e-9, late=lambda: next(calls) >= k)
    assert next(calls) <= k + 1
    assert max(lower, attained(form)) <= upper
    if k == 1:
        assert upper == math.inf


@pytest.mark.parametrize("k", [1, 2, 10])
def test_patterns_end_with_a_bound(k):
    for seed in range(5):
        form = random_form(3, 7, 1, seed)
        gates = cells(form.K)
        whole, part = _over_patterns(form, gates), _over_patterns(form, gates, at_call(k))
        assert largest_norm_on_faces(form, faces(form.K))[0] <= whole <= part


@pytest.mark.slow
@pytest.mark.parametrize(("d", "method"), [(3, "branch and bound"), (8, "product of norms")])
def test_an_oracle_that_is_late_takes_the_next_method(d, method):
    problem = build(d=d, n=d + 1)
    whole, hurried = NormOracle(problem), NormOracle(problem, late=at_call(3))
    assert (whole.method, hurried.method) == ("faces", method)
    R = torch.randn_like(problem.Y)
    maxima = whole.search(R, generator=torch.Generator().manual_seed(0))
    for late in (lambda: False, lambda: True):
        found = hurried.bound(R, maxima, late=late)
        assert whole.bound(R, maxima).lower <= found.upper < math.inf
        assert not found.refuted


def test_a_bound_that_is_late_everywhere_is_the_product_of_norms():
    problem = build(n=30, d=5)
    oracle, R = NormOracle(problem), torch.randn_like(problem.Y)
    assert oracle.method == "branch and bound"
    found = oracle.bound(R, oracle.search(R, generator=torch.Generator(), late=lambda: True), late=lambda: True)
    (form,) = (scores.weights(problem.operator, R) for scores in oracle.scores)
    assert found.method == "product of norms"
    assert found.upper == pytest.approx(product_of_norms(form), rel=1e-6)


def test_ascents_that_are_late_stay_where_they_begin():
    problem = build(n=30, d=5)
    oracle, R = NormOracle(problem), torch.randn_like(problem.Y)
    search = {"generator": torch.Generator().manual_seed(0), "n_starts": 4}
    hurried = oracle.search(R, **search, late=lambda: True)
    search["generator"].manual_seed(0)
    begun = oracle.search(R, **search, iterations=0)
    torch.testing.assert_close(hurried.values, begun.values)


@pytest.mark.parametrize("w", range(2, 13))
def test_what_is_listed_is_limited(w):
    """The work of a list: arrangements gone through, of the most hyperplanes that are within the limits."""
    h = w
    while all(n <= limit for n, limit in zip(count_faces(h + 1, w), LIMITS, strict=True)):
        h += 1
    flats = [(math.comb(h, k), h - k, w - k) for k in range(w)]
    gone_through = sum(m * most_arrangements(n, rank) for m, n, rank in flats)
    assert h == w or gone_through <= LIMITS[2]
    m = w
    while most_cells(m + 1, w) <= MAX_PATTERNS:
        m += 1
    assert most_arrangements(m, w) <= LIMITS[2]


@pytest.mark.parametrize("max_time", [1e-9, None])
def test_a_fit_prepares_one_oracle(max_time, monkeypatch):
    """β_max, solver and certificate share it, and it heeds the clock of the fit."""
    made, init = [], NormOracle.__init__

    def counted(self, *args, **options):
        init(self, *args, **options)
        made.append(self.method)

    monkeypatch.setattr(NormOracle, "__init__", counted)
    X, y = np.random.default_rng(0).normal(size=(8, 3)), np.arange(8) % 2
    clf = ch.ConvexHeadClassifier("mlp", activation="relu", beta_ratio=0.3, tol=0.05, random_state=0)
    certificate = clf.set_params(max_time=max_time).fit(X, y).certificate_
    assert made == ["branch and bound" if max_time else "faces"]
    assert certificate.dual <= certificate.primal
    assert certificate.converged or max_time


def test_interrupts_end_the_preparation(monkeypatch):
    """Ctrl-C while faces are listed: the model so far, with the bound that can be had."""
    problem, inner = build(n=8), norm.faces
    oracle = NormOracle(problem)

    def interrupted(K, *, late):
        signal.raise_signal(signal.SIGINT)
        return inner(K, late=late)

    monkeypatch.setattr(norm, "faces", interrupted)
    solution = solve(problem, 0.1, tol=1e-3, generator=torch.Generator().manual_seed(0))
    assert solution.interrupted
    assert solution.stop in (Stop.INTERRUPTED, Stop.CONVERGED)
    best = solve(problem, 0.1, tol=1e-3, generator=torch.Generator().manual_seed(0), oracle=oracle)
    assert solution.certificate.dual <= best.certificate.primal


def test_wide_scores_are_not_written_out():
    """A million mixing weights of two samples: the unit matrix that reads their scores has 10¹² entries."""
    oracle = NormOracle(build(n=2, d=1_000, name="self-attention"))
    assert oracle.method == "none"
    assert NormOracle(build(n=2, d=20, name="self-attention")).method != "none"


@pytest.mark.parametrize(("k", "method"), [(2, "product of norms"), (60, "branch and bound")])
def test_the_better_of_two_bounds_is_taken(k, method):
    """Before branch and bound has been everywhere it knows nothing; soon after it is better than the product."""
    problem = build(n=60, d=6)
    oracle, R = NormOracle(problem), torch.randn(60, 1, 2, generator=torch.Generator().manual_seed(0)).double()
    (form,) = (scores.weights(problem.operator, R) for scores in oracle.scores)
    found = oracle.bound(R, oracle.search(R, generator=torch.Generator().manual_seed(0)), late=at_call(k))
    assert found.method == method
    assert attained(form) <= found.upper <= product_of_norms(form) * (1 + 1e-9)
