"""Newton's method over factors: its Hessian by automatic differentiation, its optimum by descent."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import convexhead as ch
from convexhead.program.activations import make_activation, sample_gates
from convexhead.program.atoms import Atoms
from convexhead.program.heads import make_head
from convexhead.program.losses import CrossEntropy, Huber, Loss, Squared
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.solvers.dense import DensePasses
from convexhead.solvers.factored import FactoredDescent, pack, unpack
from convexhead.solvers.newton import FactoredNewton

BETA = 0.05


class Smooth(Loss):
    """``Σ log cosh(f − y)``, as a user may add a loss: without a Hessian of its own."""

    name = "smooth"

    def value(self, f, y):
        return torch.log(torch.cosh(f - y)).sum((-2, -1))

    def residual(self, f, y):
        return torch.tanh(f - y)

    def conjugate(self, g, y):
        raise NotImplementedError


def build(name, activation, loss, *, outputs="shared", fit_intercept=False, n=30):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, 4, 4, generator=generator, dtype=torch.float64)
    head = make_head(name, 4, 4, **({"n_blocks": 2, "outputs": outputs} if name == "block-fno" else {}))
    gates = sample_gates(head, 2, generator) if activation == "gated-relu" else None
    Y = torch.nn.functional.one_hot(torch.randint(4, (n, 1), generator=generator), 4).double()
    problem = Problem(Operator(X, head, make_activation(activation, head, gates)), Y, loss, fit_intercept=fit_intercept)
    dense = DensePasses(problem)
    k = 2 * problem.n_blocks
    block = torch.arange(k) % problem.n_blocks
    U = torch.randn(k, dense.shape[1], generator=generator, dtype=torch.float64)
    V = torch.randn(k, *problem.value_shape, generator=generator, dtype=torch.float64)
    b = torch.randn(4, generator=generator, dtype=torch.float64) * fit_intercept
    return dense, Atoms(U, problem.mask_values(V, block), block, b)


CASES = [
    ("self-attention", "linear", CrossEntropy(), {}),
    ("self-attention", "gated-relu", CrossEntropy(), {"fit_intercept": True}),
    ("mlp", "linear", Squared(), {"fit_intercept": True}),
    ("mlp-mixer", "gated-relu", Huber(0.7), {}),
    ("block-fno", "gated-relu", CrossEntropy(), {"outputs": "grouped"}),
    ("fno", "linear", Smooth(), {"fit_intercept": True}),
]


@pytest.mark.parametrize(("name", "activation", "loss", "options"), CASES)
def test_hessian_is_the_second_derivative(name, activation, loss, options):
    dense, atoms = build(name, activation, loss, **options)
    problem = dense.problem

    def objective(x):
        moved = unpack(x, atoms)
        V = problem.mask_values(moved.V, atoms.block)
        Z = torch.zeros(dense.shape, dtype=x.dtype)
        for k, j in enumerate(atoms.block.tolist()):
            Z = Z + torch.nn.functional.one_hot(torch.tensor(j), len(Z)).view(-1, 1, 1) * torch.outer(
                moved.U[k], V[k].flatten()
            )
        b = moved.intercept if problem.fit_intercept else torch.zeros_like(moved.intercept)
        penalty = moved.U.square().sum() + moved.V.square().sum()
        return loss.value(dense.outputs(Z, b), problem.Y).mean() + BETA / 2 * penalty

    expected = torch.autograd.functional.hessian(objective, pack(atoms))
    newton = FactoredNewton(dense, atoms, BETA)
    torch.testing.assert_close(newton._hessian(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "activation", "loss", "options"), CASES)
def test_reaches_a_stationary_point_no_worse_than_descent_does(name, activation, loss, options):
    dense, atoms = build(name, activation, loss, **options)
    newton, descent = FactoredNewton(dense, atoms, BETA), FactoredDescent(dense, atoms, BETA)
    steps = sum(newton.step() for _ in range(60))
    for _ in range(300):
        descent.step()
    _, at, _ = dense.value_and_gradient(newton.atoms, BETA)
    assert max(float(part.abs().max()) for part in (at.U, at.V, at.intercept)) < 1e-6
    assert newton.value <= descent.value + 1e-3 * abs(descent.value)
    assert 0 < steps < 60


def test_is_for_tiny_problems_only():
    dense, atoms = build("self-attention", "linear", CrossEntropy())
    assert FactoredNewton.pays(dense, atoms)
    many = atoms
    for _ in range(6):
        many = many.append(many)
    assert not FactoredNewton.pays(dense, many)


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1e5])
def test_small_problems_do_not_depend_on_the_scale_of_tokens(scale):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(120, 6, 3)), rng.integers(0, 3, 120)
    one, other = (
        ch.ConvexHeadClassifier(beta_ratio=0.1, tol=1e-6, random_state=0).fit(tokens, y) for tokens in (X, scale * X)
    )
    assert other.certificate_.converged
    assert other.certificate_.primal == pytest.approx(one.certificate_.primal, rel=2e-6)
