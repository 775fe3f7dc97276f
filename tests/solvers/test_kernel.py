"""Column generation among the samples' features, against the methods that form or read all features."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

import convexhead as ch
from convexhead.drive import solve
from convexhead.errors import InputError
from convexhead.program.activations import make_activation
from convexhead.program.atoms import Atoms
from convexhead.program.heads import make_head
from convexhead.program.kernel import features_at_hand, kernel_of
from convexhead.program.losses import CrossEntropy, Huber, Squared
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.solvers import kernel, select
from convexhead.solvers.kernel import Combinations, KernelColumnGeneration
from convexhead.solvers.monitor import Monitor

N, S, D, J, C = 24, 5, 4, 20, 3


def build(loss=None, *, intercept=True, weighed=False, dtype=torch.float64, norm="all", n=N, scale=1.0, seed=0):
    """Attentive heads of 80 features for 24 samples."""
    generator = torch.Generator().manual_seed(seed)
    X = scale * torch.randn(n, S, D, generator=generator, dtype=torch.float64)
    queries = torch.randn(J, D, generator=generator, dtype=torch.float64) / scale
    Y = torch.randn(n, 1, C, generator=generator, dtype=torch.float64)
    if isinstance(loss or CrossEntropy(), CrossEntropy):
        Y = torch.eye(C, dtype=torch.float64)[Y.argmax(2)]
    head = make_head("attentive", S, D, queries=queries, query_norm=norm)
    operator = Operator(X.to(dtype), head, make_activation("linear", head, None), dtype=dtype)
    weights = 3 * torch.rand(n, 1, 1, generator=generator, dtype=torch.float64) if weighed else None
    return Problem(operator, Y, loss or CrossEntropy(), weights=weights, fit_intercept=intercept)


def beta_of(problem, ratio=0.05):
    R = problem.residual(problem.outputs(problem.empty()))
    return ratio * float(torch.linalg.matrix_norm(problem.operator.gradient_matrices(R, torch.zeros(1).long()), 2))


def solved(problem, beta, solver="kernel", tol=1e-7, **options):
    return solve(problem, beta, tol=tol, solver=solver, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize(
    ("loss", "intercept", "weighed"), list(product([Squared(), CrossEntropy()], [False, True], [False, True]))
)
def test_it_finds_the_optimum_that_other_methods_find(loss, intercept, weighed):
    problem = build(loss, intercept=intercept, weighed=weighed)
    beta = beta_of(problem)
    ours, other = solved(problem, beta).certificate, solved(problem, beta, "fista").certificate
    assert ours.converged
    assert other.converged
    assert ours.primal == pytest.approx(other.primal, rel=1e-6)
    assert min(ours.primal, other.primal) >= max(ours.dual, other.dual)


@pytest.mark.parametrize("seed", range(8))
def test_few_outputs_and_features_far_from_0(seed):
    """Rounds find few directions each, and what an intercept leaves weighs much in gradients."""
    generator = torch.Generator().manual_seed(seed)
    n, c, queries = 37, 1 + seed % 3, torch.randn(20, 3, generator=generator, dtype=torch.float64)
    X = 3 + torch.randn(n, 6, 3, generator=generator, dtype=torch.float64)
    head = make_head("attentive", 6, 3, queries=queries, query_norm="all")
    operator = Operator(X, head, make_activation("linear", head, None), dtype=torch.float64)
    Y = torch.randn(n, 1, c, generator=generator, dtype=torch.float64)
    problem = Problem(operator, Y, Squared() if seed % 2 else Huber(), fit_intercept=True)
    assert solved(problem, beta_of(problem, 0.002), tol=1e-6).certificate.converged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_is_that_of_the_features(dtype, monkeypatch):
    monkeypatch.setattr("convexhead.program.kernel.ROWS", 7)
    monkeypatch.setattr("convexhead.program.kernel.TOGETHER", 11)
    operator = build(dtype=dtype).operator
    Phi = operator.features()[0].double()
    torch.testing.assert_close(features_at_hand(operator).double(), Phi, rtol=1e-6, atol=1e-6)
    K = kernel_of(operator)
    torch.testing.assert_close(K, Phi @ Phi.T, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-12)
    assert torch.equal(K, K.T)
    assert kernel_of(operator) is K


def test_combinations_are_directions_of_all_features():
    operator = build().operator
    Phi, K = operator.features()[0], kernel_of(operator)
    generator = torch.Generator().manual_seed(1)
    U0, C0, A = (torch.randn(*shape, generator=generator).double() for shape in ((2, 80), (2, 3), (N, 3)))
    dense = U0.T @ C0 + Phi.T @ A
    directions = Combinations(C0, A, U0 @ dense, Phi @ U0.T @ C0 + K @ A)
    torch.testing.assert_close(directions.gram(directions), dense.T @ dense)
    doubled = directions.beside(directions).orthonormal()  # dependent directions are left out
    both = U0.T @ doubled.of_start + Phi.T @ doubled.of_samples
    torch.testing.assert_close(both.T @ both, torch.eye(3).double())
    torch.testing.assert_close(both @ (both.T @ dense), dense)
    torch.testing.assert_close(Phi @ both, doubled.features)


def test_a_start_may_lie_outside_of_what_the_samples_span():
    problem = build()
    beta, generator = beta_of(problem), torch.Generator().manual_seed(2)
    U, V = torch.randn(6, J, D, generator=generator).double(), torch.randn(6, 1, C, generator=generator).double()
    start = Atoms(U, V, torch.zeros(6).long(), torch.ones(C).double())
    method = KernelColumnGeneration(problem, beta, start, Monitor())
    torch.testing.assert_close(problem.outputs(method.atoms()), problem.outputs(start))
    warm, cold = solved(problem, beta, start=start), solved(problem, beta)
    assert warm.certificate.converged
    assert warm.certificate.primal == pytest.approx(cold.certificate.primal, rel=1e-6)


def test_an_interruption_in_the_middle_of_a_round_leaves_the_model_before_it(monkeypatch):
    calls = []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args, **options)

    plain = kernel.solve_over
    monkeypatch.setattr(kernel, "solve_over", interrupted)
    problem = build()
    solution = solved(problem, beta_of(problem), tol=1e-9)
    history = [row.objective for row in solution.history]
    assert solution.interrupted
    assert solution.certificate.primal == pytest.approx(history[-1], rel=1e-4)
    assert solution.certificate.primal <= history[-1]
    assert solution.certificate.primal < history[0]


def test_the_zero_model_is_the_optimum_at_a_large_weight():
    problem = build()
    solution = solved(problem, 10 * beta_of(problem, 1.0))
    assert solution.certificate.converged
    assert not len(solution.atoms)


def test_single_precision_and_a_path(monkeypatch):
    monkeypatch.setattr("convexhead.fitting.SMALL_TOKENS", 0)
    rng = np.random.default_rng(0)
    X = rng.normal(size=(150, 6, 8)).astype(np.float32)
    y = X.max(1)[:, :5].argmax(1)
    options = {"beta_ratios": [0.3, 0.1, 0.03], "n_queries": 60, "random_state": 0, "tol": 1e-4}
    ours, others = (
        ch.regularization_path(X, y, head="attentive", solver=solver, **options)
        for solver in ("auto", "column-generation")
    )
    assert all(row["converged"] for row in ours)
    for one, other in zip(ours, others, strict=True):
        assert max(one["dual"], other["dual"]) <= min(one["objective"], other["objective"])


@pytest.mark.parametrize(("scale", "dtype"), [(1e25, torch.float32), (1e-25, torch.float32), (1e45, torch.float64)])
def test_tokens_of_any_scale(scale, dtype):
    plain, scaled = build(), build(scale=scale, dtype=dtype)
    beta = beta_of(plain)
    expected, certificate = solved(plain, beta).certificate, solved(scaled, scale * beta, tol=1e-5).certificate
    assert certificate.converged
    assert certificate.primal == pytest.approx(expected.primal, rel=1e-4)


def test_it_is_chosen_where_it_pays(monkeypatch):
    monkeypatch.setattr(select, "DENSE_FEATURES", 0)
    assert select._cheapest(build(), None, None) is KernelColumnGeneration
    assert select._cheapest(build(), None, 5) is not KernelColumnGeneration  # a bound on heads
    assert (
        select._cheapest(build(n=90), None, None) is not KernelColumnGeneration  # more samples than features
    )  # more samples than half the features
    assert select._cheapest(build(norm="each"), None, None) is not KernelColumnGeneration


def test_a_run_resumed_where_it_cannot_go_on_says_so(tmp_path):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 5, 4)), np.arange(60) % 3
    options = {"n_queries": 20, "solver": "kernel", "random_state": 0, "tol": 1e-6, "beta_ratio": 0.05}
    ch.ConvexHeadClassifier("attentive", **options).fit(X, y, checkpoint=tmp_path, checkpoint_minutes=0.0)
    with pytest.raises(InputError, match=r"'kernel', which this run began with, needs .* memory for its features"):
        ch.ConvexHeadClassifier("attentive", max_memory=20_000, **options).fit(X, y, checkpoint=tmp_path)


def test_what_it_needs_is_said():
    with pytest.raises(InputError, match=r"'kernel' needs the attentive head with one norm for all queries"):
        solved(build(norm="each"), 0.1)
    with pytest.raises(InputError, match=r"'kernel' needs features whose fourth powers"):
        solved(build(scale=1e160), 0.1)
    with pytest.raises(InputError, match=r"'kernel' cannot keep max_heads"):
        solved(build(), 0.1, max_heads=2)
