"""Gradient matrices formed outright: the same as by products, kept only where there is room."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch

from convexhead.linalg import deflation
from convexhead.linalg.deflation import spectral_norm
from convexhead.linalg.gradient_matrices import GradientMatrices, formed_norm, rounding_of_norm, worth_decomposing
from convexhead.program.activations import make_activation, sample_gates
from convexhead.program.heads import make_head
from convexhead.program.losses import CrossEntropy
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem

CASES = [("self-attention", "linear"), ("self-attention", "gated-relu"), ("mlp-mixer", "gated-relu")]
N, C = 300, 5


def build(name, activation, pool="mean", *, s=9, d=7, memory=float("inf"), dtype=torch.float64):
    """Enough samples for several batches of those that `Operator.gradient_matrices` takes at a time."""
    rng = torch.Generator().manual_seed(0)
    X = torch.randn(N, s, d, generator=rng, dtype=torch.float64)
    Y = torch.nn.functional.one_hot(torch.randint(0, C, (N, 1), generator=rng), C)
    head = make_head(name, s, d, pool=pool)
    gates = sample_gates(head, 3, rng) if activation == "gated-relu" else None
    activation = make_activation(activation, head, gates)
    operator = Operator(X, head, activation, dtype=dtype, memory=memory)
    problem = Problem(operator, Y.expand(N, head.r, C), CrossEntropy())
    R = torch.randn(N, head.r, C, generator=rng, dtype=torch.float64).to(dtype) / N
    return problem, R


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr("convexhead.program.operator.GRADIENT_BYTES", {"cpu": 100_000})


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize(("name", "activation"), CASES)
def test_formed_matrices_are_those_of_products(name, activation, pool):
    problem, R = build(name, activation, pool)
    assert problem.operator.gradient_cost(C) is not None
    blocks = torch.arange(problem.n_blocks).flip(0)
    formed = problem.operator.gradient_matrices(R, blocks)
    products = GradientMatrices(problem.operator, R, form=False)
    every = torch.eye(products.q, dtype=torch.float64).expand(len(blocks), -1, -1)
    torch.testing.assert_close(formed, products.times(every, blocks), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "activation"), CASES)
def test_products_with_formed_matrices(name, activation, dtype):
    problem, R = build(name, activation, dtype=dtype)
    formed, plain = (GradientMatrices(problem.operator, R, form=form) for form in (True, False))
    assert formed.formed is not None
    assert plain.formed is None
    blocks = torch.arange(problem.n_blocks)[-2:]
    V = torch.randn(len(blocks), plain.q, 3, dtype=dtype)
    U = torch.randn(len(blocks), plain.p, 3, dtype=dtype)
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(formed.times(V, blocks), plain.times(V, blocks), **near)
    torch.testing.assert_close(formed.transpose_times(U, blocks), plain.transpose_times(U, blocks), **near)


@pytest.mark.parametrize(("name", "activation"), CASES)
def test_norm_from_eigenvalues_and_from_krylov(name, activation, monkeypatch):
    problem, R = build(name, activation)
    G = GradientMatrices(problem.operator, R)
    assert worth_decomposing(G)
    exact = float(
        torch.linalg.matrix_norm(problem.operator.gradient_matrices(R, torch.arange(problem.n_blocks)), 2).max()
    )
    assert formed_norm(G) == pytest.approx(exact, rel=1e-12)
    monkeypatch.setattr(deflation, "worth_decomposing", lambda G: False)
    assert spectral_norm(problem.operator, R, torch.Generator().manual_seed(0)) == pytest.approx(exact, rel=1e-5)
    single, _ = build(name, activation, dtype=torch.float32)
    searched = spectral_norm(problem.operator, R, torch.Generator().manual_seed(0), fast=single.operator)
    assert searched == pytest.approx(exact, rel=1e-5)


def test_tiny_matrices_keep_their_norm():
    problem, R = build("self-attention", "linear")
    tiny = formed_norm(GradientMatrices(problem.operator, 1e-200 * R))
    assert tiny == pytest.approx(1e-200 * formed_norm(GradientMatrices(problem.operator, R)), rel=1e-12, abs=0)


def hard_matrices(p, q):
    """Singular values that are all the same, nearly so, graded, one alone, at the ends of a range; integers, ties."""
    rng = np.random.default_rng(p * 100 + q)
    m = min(p, q)
    left, right = (np.linalg.qr(rng.normal(size=(side, side)))[0][:, :m] for side in (p, q))
    for values in (
        np.ones(m), 1 + 1e-15 * np.arange(m), np.logspace(0, -18, m), np.eye(1, m)[0], np.logspace(100, 90, m),
        1 + 1e-8 * rng.normal(size=m),
    ):  # fmt: skip
        yield (left * values) @ right.T
    yield rng.integers(-2, 3, size=(p, q)).astype(float)
    yield np.ones((p, q))


@pytest.mark.parametrize(("p", "q"), [(1, 1), (2, 5), (4, 3), (12, 12), (7, 30), (40, 9)])
def test_the_norm_of_a_formed_matrix_misses_by_less_than_is_charged(p, q):
    """Against 40 digits. With samples that are unit vectors the gradient matrix is the residual itself."""
    head = make_head("mlp", 1, p)
    operator = Operator(torch.eye(p).double().unsqueeze(1), head, make_activation("linear", head, None))
    for matrix in hard_matrices(p, q):
        R = torch.from_numpy(matrix).unsqueeze(1)
        G = GradientMatrices(operator, R)
        assert torch.equal(operator.gradient_matrices(R, torch.arange(1))[0], R[:, 0])
        with mpmath.workdps(40):
            tall = mpmath.matrix((matrix if p >= q else matrix.T).tolist())
            exact = mpmath.sqrt(max(mpmath.eigsy(tall.T * tall, eigvals_only=True)))
            missed = abs(mpmath.mpf(formed_norm(G)) / exact - 1)
        assert missed <= rounding_of_norm(p, q)
        assert missed <= 1e-13  # so the charge, which grows faster than errors do, has much in reserve
    assert rounding_of_norm(p, q) <= 1e-10


def test_nothing_is_kept_beyond_the_budget_and_room_is_given_back():
    problem, R = build("self-attention", "gated-relu")
    size = problem.n_blocks * 49 * 35 * 8
    before = problem.operator.budget.left = 1.5 * size
    first, second = GradientMatrices(problem.operator, R), GradientMatrices(problem.operator, R)
    assert first.formed is not None
    assert second.formed is None
    del first
    assert problem.operator.budget.left == before
    assert GradientMatrices(problem.operator, R).formed is not None


def test_without_pooling_gates_leave_no_cheap_way():
    for name in ("self-attention", "mlp-mixer"):
        problem, R = build(name, "gated-relu", "none")
        assert problem.operator.gradient_cost(C) is None
        assert GradientMatrices(problem.operator, R).formed is None
