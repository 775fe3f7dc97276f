"""Newton's method for one output, against CVXPY, the method for any number of outputs, and data that degenerate."""

from __future__ import annotations

import pytest
import torch

from convexhead.drive import solve
from convexhead.program.activations import make_activation
from convexhead.program.finish import zero_model
from convexhead.program.heads import make_head
from convexhead.program.losses import CrossEntropy, Huber, Loss, Squared
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.solvers.base import Stop
from convexhead.solvers.group_lasso import GroupNewton, is_group_lasso
from convexhead.solvers.monitor import Monitor
from programs import POOLS, make_instance, run, spread

CASES = [(name, activation) for name in ("mlp", "fno", "block-fno") for activation in ("linear", "gated-relu")]


def problem_of(X, Y, *, gates, loss=None, intercept=False, dtype=torch.float64):
    """MLP head over one token ``(n, 1, d)``."""
    head = make_head("mlp", 1, X.shape[1])
    activation = make_activation("gated-relu", head, gates)
    X, Y = X.unsqueeze(1).to(dtype), Y.view(-1, 1, 1)
    return Problem(Operator(X, head, activation, dtype=dtype), Y, loss or Squared(), fit_intercept=intercept)


def beta_of(problem, ratio):
    R = problem.residual(problem.outputs(zero_model(problem)))
    blocks = torch.arange(problem.n_blocks)
    return ratio * float(problem.operator.gradient_matrices(R, blocks).norm(dim=(1, 2)).max())


def certified(problem, beta, tol=1e-7, **options):
    assert is_group_lasso(problem)
    generator = torch.Generator().manual_seed(0)
    solution = solve(problem, beta, tol=tol, solver="group-newton", generator=generator, **options)
    assert solution.certificate.converged, solution.stop
    return solution


def random_data(n=50, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    gates = torch.randn(10, d, generator=generator, dtype=torch.float64)
    Y = X.relu().sum(1) - X[:, 0].abs() + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
    return X, Y, gates


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("name", "activation"), CASES)
def test_agrees_with_cvxpy(name, activation, pool):
    seed = spread(name, activation, pool)
    for loss in ("squared", "huber"):
        instance = make_instance(
            name, activation, pool=pool, loss=loss, intercept=bool(seed % 2), n=9, grid=(3, 1), d=2, c=1, seed=seed
        )
        tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-10)
        truth = instance.dense.solve_cvxpy(**tight)
        assert is_group_lasso(instance.problem)
        atoms, certificate = run(instance, tol=1e-7, solver="group-newton")
        assert certificate.converged
        assert instance.dense.objective(instance.point(atoms)) == pytest.approx(certificate.primal, rel=1e-11)
        assert certificate.primal == pytest.approx(truth.upper, rel=1e-6)
        assert certificate.dual <= truth.upper


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.5, 0.1])
@pytest.mark.parametrize(("name", "activation"), CASES)
def test_agrees_with_the_method_for_any_number_of_outputs(name, activation, ratio):
    seed = spread(name, activation, ratio)
    instance = make_instance(name, activation, intercept=bool(seed % 2), n=40, c=1, n_gates=3, ratio=ratio, seed=seed)
    _, certificate = run(instance, tol=1e-7, solver="group-newton")
    _, other = run(instance, tol=1e-5, solver="column-generation")
    assert certificate.converged
    assert certificate.primal <= other.primal * (1 + 1e-7)
    assert certificate.primal >= other.dual
    assert certificate.dual <= other.primal


def spoil(X, gates, how):
    X, gates = X.clone(), gates.clone()
    if how == "gates twice":
        gates = torch.cat([gates, gates, 3 * gates[:2]])
    elif how == "zero columns":
        X[:, 2:4] = 0
    elif how == "columns twice":
        X[:, 3:] = X[:, :2]
    elif how == "samples twice":
        X = torch.cat([X[:25], X[:25]])
    elif how == "a gate that is always shut":
        X, gates[0] = X.abs(), -1.0
    elif how == "few samples":
        X = X[:3]
    return X, gates


@pytest.mark.slow
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize(
    "how",
    ["gates twice", "zero columns", "columns twice", "samples twice", "a gate that is always shut", "few samples"],
)
def test_degenerate_data(how, intercept):
    X, Y, gates = random_data()
    X, gates = spoil(X, gates, how)
    for loss in (Squared(), Huber(0.2)):
        for ratio in (0.9, 0.02):
            problem = problem_of(X, Y[: len(X)], gates=gates, loss=loss, intercept=intercept)
            certified(problem, beta_of(problem, ratio), tol=1e-6)


@pytest.mark.parametrize("intercept", [False, True])
def test_around_beta_max(intercept):
    X, Y, gates = random_data()
    problem = problem_of(X, Y, gates=gates, intercept=intercept)
    assert len(certified(problem, beta_of(problem, 1 + 1e-6)).atoms) == 0
    assert len(certified(problem, beta_of(problem, 0.999), tol=1e-10).atoms) > 0


@pytest.mark.slow
def test_single_precision_goes_on_in_double_where_it_must():
    X, Y, gates = random_data(n=300)
    problem = problem_of(X.float(), Y, gates=gates, dtype=torch.float32)
    certified(problem, beta_of(problem, 0.05), tol=1e-9)


def test_a_warm_start_may_have_several_atoms_a_block():
    X, Y, gates = random_data()
    problem = problem_of(X, Y, gates=gates)
    first = certified(problem, beta_of(problem, 0.1)).atoms
    twice = first.append(first)
    twice.V = twice.V / 2
    again = certified(problem, beta_of(problem, 0.1), start=twice)
    assert len(again.history) <= 2


def test_a_bound_on_heads_is_kept():
    X, Y, gates = random_data()
    problem = problem_of(X, Y, gates=gates)
    beta = beta_of(problem, 0.01)
    assert len(certified(problem, beta).atoms) > 3
    generator = torch.Generator().manual_seed(0)
    solution = solve(problem, beta, tol=1e-6, max_heads=3, solver="group-newton", generator=generator)
    assert len(solution.atoms) == 3
    assert solution.stop is Stop.HEADS


@pytest.mark.slow
def test_goes_on_exactly_from_any_round():
    X, Y, gates = random_data()
    problem = problem_of(X, Y, gates=gates, loss=Huber(0.3), intercept=True)
    beta, states = beta_of(problem, 0.02), []

    def newton(save=None):
        monitor = Monitor()
        monitor.save = save
        return GroupNewton(problem, beta, zero_model(problem), monitor, max_heads=None)

    whole = newton(lambda state: states.append(state()))
    assert whole.advance(1e-8) is Stop.CONVERGED
    rest = newton()
    rest.restore(*states[len(states) // 2])
    assert rest.advance(1e-8) is Stop.CONVERGED
    assert torch.equal(whole.W, rest.W)
    assert torch.equal(whole.b, rest.b)


@pytest.mark.parametrize("loss", [CrossEntropy(), Squared(), Huber(0.7)])
def test_hessians_of_losses_are_derivatives_of_their_residuals(loss):
    generator = torch.Generator().manual_seed(0)
    f, y, z = (torch.randn(5, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    y = torch.softmax(y, -1)
    torch.testing.assert_close(loss.hessian_times(f, y, z), Loss.hessian_times(loss, f, y, z))
