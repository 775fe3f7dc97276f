"""Arrangements that are hardly any: no hyperplane, one, all the same, or of rows that float64 can hardly hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import convexhead as ch
from convexhead.dual_norm.bound import largest_norm
from convexhead.dual_norm.faces import count_faces, doubt_of, faces, largest_norm_on_faces
from convexhead.dual_norm.norm import NormOracle, _over_patterns, product_of_norms
from convexhead.dual_norm.scores import Form, _written_as_planes
from convexhead.program import patterns
from convexhead.program.activations import ReLU
from convexhead.program.heads import make_head
from convexhead.program.losses import Squared
from convexhead.program.operator import Operator
from convexhead.program.patterns import cells_and_doubt, most_arrangements
from convexhead.program.problem import Problem
from kinds import MASKED


def few_planes(w, h, q, seed=0):
    """A form with ``h`` planes in ``w`` dimensions, which need not span them."""
    generator = torch.Generator().manual_seed(seed)
    K, L, c = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((h, w), (w, q), (h, q)))
    return Form(L, torch.nn.functional.normalize(K), c, 0.25)


def sphere(w, m=20_000):
    u = torch.randn(m, w, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.nn.functional.normalize(u)


@pytest.mark.parametrize(("w", "h"), [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (5, 1)])
@pytest.mark.parametrize("q", [1, 3])
def test_every_bound_holds_with_few_planes_or_none(w, h, q):
    form = few_planes(w, h, q)
    attained = float(form(sphere(w)).norm(dim=1).max()) if w else 0.0
    arrangement = faces(form.K)
    assert sum(len(group.signs) for group in arrangement) <= count_faces(h, w)[0]
    exact, u = largest_norm_on_faces(form, arrangement)
    assert float(form(u[:1]).norm()) == pytest.approx(exact, rel=1e-9)
    gates, doubt = cells_and_doubt(form.K)
    bounds = {
        "faces": exact * (1 + 1e-11) + doubt_of(form, arrangement) + form.neglected,
        "branch and bound": largest_norm(form)[0],
        "patterns": _over_patterns(form, gates) + form.size * doubt,
        "product of norms": product_of_norms(form),
    }
    assert all(bound >= attained + form.neglected for bound in bounds.values()), (attained, bounds)
    if w <= 2:
        assert bounds["faces"] == pytest.approx(attained + form.neglected, rel=1e-6)


DEGENERATE = {
    "all zero": torch.zeros(4, 4, 2),
    "all equal": torch.ones(4, 4, 2),
    "one that is not zero": torch.cat([torch.zeros(3, 4, 2), torch.ones(1, 4, 2)]),
    "one sample": torch.ones(1, 4, 2),
}


@pytest.mark.parametrize("what", DEGENERATE)
@pytest.mark.parametrize("name", MASKED)
def test_tokens_without_geometry_have_bounds(name, what):
    X = DEGENERATE[what].double()
    head = make_head(name, 4, 2, n_blocks=2)
    problem = Problem(Operator(X, head, ReLU(head)), torch.ones(len(X), head.r, 4).double(), Squared())
    oracle, R = NormOracle(problem), torch.randn_like(problem.Y)
    assert oracle.method == "faces"
    found = oracle.bound(R, oracle.search(R, generator=torch.Generator().manual_seed(0)))
    assert found.lower <= found.upper <= found.lower * (1 + 1e-9)
    assert (found.upper == 0) == (what == "all zero")


@pytest.mark.parametrize("name", ["mlp", "self-attention"])
def test_heads_that_read_zeros_are_certified(name):
    """The class token is zero in every sample: only the intercept is trained."""
    X, y = np.random.default_rng(0).normal(size=(6, 4, 2)), np.arange(6) % 3
    X[:, 0] = 0.0
    clf = ch.ConvexHeadClassifier(name, activation="relu", pool="cls", fit_intercept=True, random_state=0).fit(X, y)
    assert clf.certificate_.converged
    assert clf.certificate_.primal == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize("exponent", [-180, -150, 0, 150, 180])
def test_rows_of_any_scale_are_written_out(exponent):
    """Squares of such entries are 0 or infinite in float64."""
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis, _, planes, plane, scale, lost = _written_as_planes(rows * 10.0**exponent)
    assert planes.shape == (6, 3)
    torch.testing.assert_close(scale.unsqueeze(1) * planes[plane] @ basis / 10.0**exponent, rows)
    assert bool((lost > 0).all())
    assert bool((lost < 1e-12 * scale.abs()).all())


def test_rows_too_small_to_be_seen_are_charged():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1e-200], [0.0, 0.0]], dtype=torch.float64)
    lost = _written_as_planes(rows)[-1]
    assert float(lost[1]) >= 1e-200
    assert float(lost[2]) == 0


@pytest.mark.parametrize(("n", "rank"), [(5, 2), (6, 3), (7, 4), (8, 5), (6, 6), (4, 6)])
def test_arrangements_on_the_way_are_counted(n, rank, monkeypatch):
    gone_through, inner = [], patterns._cells
    monkeypatch.setattr(patterns, "_cells", lambda *args: (gone_through.append(1), inner(*args))[1])
    cells_and_doubt(few_planes(rank, n, 1).K)
    assert len(gone_through) == most_arrangements(n, rank)


def test_many_values_are_read_in_their_span():
    form = few_planes(3, 4, 50)
    narrow = form.narrow()
    u = sphere(3, 100)
    assert narrow.c.shape == (4, 7)
    torch.testing.assert_close(narrow(u).norm(dim=1), form(u).norm(dim=1))
    assert form.neglected < narrow.neglected < form.neglected + 1e-10
