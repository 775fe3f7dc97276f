"""Bounds on the dual norm of a ReLU head: never below anything that anybody finds, and equal where they are exact."""

from __future__ import annotations

import math

import pytest
import torch

from convexhead.dual_norm.bound import largest_norm
from convexhead.dual_norm.faces import count_faces, faces, largest_norm_on_faces
from convexhead.dual_norm.norm import NormOracle, _over_patterns, product_of_norms
from convexhead.dual_norm.scores import Form, scores_of
from convexhead.program.activations import ReLU
from convexhead.program.heads import make_head
from convexhead.program.losses import Squared
from convexhead.program.operator import Operator
from convexhead.program.patterns import cells
from convexhead.program.problem import Problem
from kinds import MASKED


def build(name, *, n=4, s=4, d=2, c=4, pool="mean", outputs="shared", seed=0, degenerate=False):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, s, d, generator=generator, dtype=torch.float64)
    if degenerate:
        X[1], X[2, 1], X[3] = X[0], 0.0, -X[0]
    head = make_head(name, s, d, pool=pool, n_blocks=2, outputs=outputs)
    Y = torch.randn(n, head.r, c, generator=generator, dtype=torch.float64)
    return Problem(Operator(X, head, ReLU(head)), Y, Squared())


def random_form(w, h, q, seed):
    generator = torch.Generator().manual_seed(seed)
    K, L, c = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((h, w), (w, q), (h, q)))
    return Form(L, torch.nn.functional.normalize(K), c)


def sphere(w, m=20_000, seed=1):
    u = torch.randn(m, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(u)


@pytest.mark.parametrize("outputs", ["shared", "grouped"])
@pytest.mark.parametrize("pool", ["mean", "cls", "none"])
@pytest.mark.parametrize("name", MASKED)
def test_written_out_scores_are_the_passes(name, pool, outputs):
    """Duplicate, zero and opposite tokens included."""
    problem = build(name, pool=pool, outputs=outputs, degenerate=True)
    R = torch.randn_like(problem.Y)
    span = problem.head.mixing_span()
    for scores in scores_of(problem.operator):
        u = torch.randn(5, problem.head.mixing_size, dtype=torch.float64)
        if span is not None:
            u = u @ span.T @ span
        block = torch.full((5,), scores.group)
        expected = problem.operator.adjoint_times_mixing(R, u.view(5, *problem.head.mixing_shape), block).flatten(1)
        torch.testing.assert_close(
            scores.weights(problem.operator, R)(u @ scores.basis.T), expected, rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("name", ["mlp-mixer"])
def test_mixing_span_loses_nothing(name):
    """Rows of a Mixer's U that differ are never better than equal ones under a mean."""
    problem = build(name, s=2)
    R = torch.randn_like(problem.Y)
    oracle = NormOracle(problem)
    maxima = oracle.search(R, generator=torch.Generator().manual_seed(0))
    upper = oracle.bound(R, maxima).upper
    U = sphere(4).view(-1, 2, 2)
    values = problem.operator.adjoint_times_mixing(R, U, torch.zeros(len(U), dtype=torch.int64)).flatten(1).norm(dim=1)
    assert float(values.max()) <= upper
    assert float(values.max()) >= 0.9 * upper


def test_only_the_highest_starts_climb():
    problem = build("mlp", n=20, d=5)
    R, generator = torch.randn_like(problem.Y), torch.Generator()
    oracle = NormOracle(problem)
    before = oracle.search(R, generator=generator.manual_seed(0), n_starts=12, iterations=0)
    after = oracle.search(R, generator=generator.manual_seed(0), n_starts=12, ascents=3)
    assert len(before.values) == 12
    assert len(after.values) == 3
    assert bool((after.values >= before.values[:3] * (1 - 1e-12)).all())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("w", "h"), [(1, 3), (2, 7), (3, 9), (4, 8)])
def test_faces_and_branch_and_bound_agree(w, h, seed):
    form = random_form(w, h, 1 + seed % 3, seed)
    exact, maximisers = largest_norm_on_faces(form, faces(form.K))
    assert float(form(maximisers[:1]).norm()) == pytest.approx(exact, rel=1e-9)
    upper, lower, _ = largest_norm(form, rtol=1e-5)
    assert lower <= exact * (1 + 1e-12)
    assert exact <= upper <= exact * (1 + 1.1e-5)
    assert float(form(sphere(w)).norm(dim=1).max()) <= exact * (1 + 1e-12)


def test_number_of_faces_in_general_position():
    for w, h in ((2, 5), (3, 6), (4, 7)):
        found = faces(random_form(w, h, 1, 0).K)
        assert sum(len(part.signs) for part in found) == count_faces(h, w)[0]
        # Euler's relation of a sphere that is cut into cells
        assert sum((-1) ** part.span.shape[1] * len(part.signs) for part in found) == -1 + (-1) ** w


@pytest.mark.slow
@pytest.mark.parametrize("work", [0.0, 3e4, 1e6])
@pytest.mark.parametrize("h", [20, 400])
def test_branch_and_bound_may_stop_at_any_time(work, h):
    for seed in range(3):
        form = random_form(4, h, 3, seed)
        upper, lower, _ = largest_norm(form, rtol=1e-6, work=work)
        found = float(form(sphere(4)).norm(dim=1).max())
        assert max(found, lower) <= upper


@pytest.mark.parametrize("seed", range(5))
def test_patterns_with_their_cones_are_exact_for_scalar_values(seed):
    form = random_form(3, 7, 1, seed)
    exact, _ = largest_norm_on_faces(form, faces(form.K))
    assert _over_patterns(form, cells(form.K)) == pytest.approx(exact, rel=1e-9)
    vector = random_form(3, 7, 3, seed)
    assert _over_patterns(vector, cells(vector.K)) >= largest_norm_on_faces(vector, faces(vector.K))[0]


@pytest.mark.parametrize("seed", range(5))
def test_product_of_norms_is_a_bound(seed):
    form = random_form(5, 40, 3, seed)
    assert product_of_norms(form) >= float(form(sphere(5)).norm(dim=1).max())


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["mean", "cls", "none"])
@pytest.mark.parametrize("name", MASKED)
def test_no_mixing_weight_is_above_the_bound(name, pool):
    for seed, degenerate in ((0, False), (1, True)):
        problem = build(name, pool=pool, s=2, d=2, c=2, seed=seed, degenerate=False)
        if degenerate:
            problem = build(name, pool=pool, s=4, d=2, c=2, seed=seed, degenerate=True)
        R = torch.randn_like(problem.Y)
        oracle = NormOracle(problem)
        generator = torch.Generator().manual_seed(seed)
        reward = oracle.bound(R, oracle.search(R, generator=generator))
        assert reward.lower <= reward.upper < math.inf
        U = sphere(problem.head.mixing_size, 2000).view(-1, *problem.head.mixing_shape)
        block = torch.arange(len(U)) % problem.n_blocks
        values = problem.operator.adjoint_times_mixing(R, U, block).flatten(1).norm(dim=1)
        assert float(values.max()) <= reward.upper
        if oracle.tight:
            assert reward.upper <= reward.lower * 1.01


def test_dimension_zero_has_no_reward():
    form = Form(torch.zeros(0, 2).double(), torch.zeros(0, 0).double(), torch.zeros(0, 2).double(), 0.0)
    assert largest_norm(form)[0] == 0.0
