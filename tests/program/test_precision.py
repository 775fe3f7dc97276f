"""Rough work in bfloat16: close to what it stands for, refused where it would not help, never in a certificate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import convexhead as ch
from convexhead import fitting
from convexhead.program import operator
from convexhead.program.activations import make_activation, sample_gates
from convexhead.program.atoms import Atoms
from convexhead.program.heads import make_head
from convexhead.program.losses import CrossEntropy
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.solvers.increments import Increments


@pytest.fixture(autouse=True)
def _bfloat16_anywhere(monkeypatch):
    """Emulated where the hardware has none: slow, and the same numbers."""
    monkeypatch.setattr(operator, "has_fast_bfloat16", lambda device: True)


def make_problem(name: str, activation: str, *, pool: str = "mean", dtype: torch.dtype = torch.float32) -> Problem:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(60, 9, 8, generator=generator)
    Y = torch.eye(3)[torch.randint(0, 3, (60,), generator=generator)].unsqueeze(1)
    head = make_head(name, 9, 8, pool=pool, n_blocks=2)
    gates = sample_gates(head, 3, generator) if activation == "gated-relu" else None
    return Problem(Operator(X, head, make_activation(activation, head, gates), dtype=dtype), Y, CrossEntropy())


@pytest.mark.parametrize("activation", ["linear", "gated-relu"])
@pytest.mark.parametrize("name", ["self-attention", "mlp-mixer", "mlp"])
def test_every_pass_is_close_to_float32(name, activation):
    single = make_problem(name, activation)
    half = single.with_half_products()
    assert half is not None
    assert half.dtype == torch.float32
    generator = torch.Generator().manual_seed(1)
    U = torch.randn(4, *single.head.mixing_shape, generator=generator)
    V = torch.randn(4, *single.value_shape, generator=generator)
    block = torch.arange(4) % single.n_blocks
    atoms = Atoms(U, V, block, torch.zeros(3))
    R = single.residual(single.outputs(atoms))
    for one, other in (
        (single.outputs(atoms), half.outputs(atoms)),
        (single.operator.adjoint_times_values(R, V, block), half.operator.adjoint_times_values(R, V, block)),
        (single.operator.adjoint_times_mixing(R, U, block), half.operator.adjoint_times_mixing(R, U, block)),
        (single.value_and_gradient(atoms, 0.1).gradient.U, half.value_and_gradient(atoms, 0.1).gradient.U),
    ):
        assert other.dtype == torch.float32
        assert float((one - other).norm() / one.norm()) < 0.03
        assert not torch.equal(one, other)


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("activation", ["linear", "gated-relu"])
@pytest.mark.parametrize("name", ["self-attention", "mlp-mixer", "mlp"])
def test_around_an_anchor_rounding_is_relative_to_the_distance(name, activation, pool):
    single = make_problem(name, activation, pool=pool)
    single.fit_intercept = True
    half, exact = single.with_half_products(), single.astype(torch.float64)
    generator = torch.Generator().manual_seed(1)

    def atoms(scale):
        shapes = (4, *single.head.mixing_shape), (4, *single.value_shape), (3,)
        U, V, b = (scale * torch.randn(*shape, generator=generator) for shape in shapes)
        return Atoms(U, V, torch.arange(4) % single.n_blocks, b)

    def gradients(at):
        return at.gradient.U, at.gradient.V, at.gradient.intercept

    anchor = atoms(0.5)
    increments = Increments(single, half, anchor)
    assert Increments.affordable(single, half, anchor)
    assert not Increments.affordable(single, single, anchor)
    rounded = half.value_and_gradient(anchor, 0.1)
    for distance in (0.0, 1e-3, 1e-1):
        step = atoms(distance)
        moved = replace(anchor, U=anchor.U + step.U, V=anchor.V + step.V, intercept=anchor.intercept + step.intercept)
        true = exact.value_and_gradient(moved.to(exact.device, torch.float64), 0.1)
        ours = increments.value_and_gradient(moved, 0.1)
        off = (ours.outputs - true.outputs).norm() / true.outputs.norm()
        assert float(off) < 1e-6 + 0.05 * distance
        assert abs(ours.value - true.value) <= (1e-6 + 0.02 * distance) * abs(true.value)
        for mine, theirs, rough in zip(*(gradients(one) for one in (ours, true, rounded)), strict=True):
            error = float((mine - theirs).norm() / theirs.norm())
            assert error < 2e-6 + 0.3 * distance
            if distance == 0.0:
                assert error < 0.05 * float((rough - theirs).norm() / theirs.norm())


def test_refused_where_nothing_is_gained():
    assert make_problem("self-attention", "linear", dtype=torch.float64).with_half_products() is None
    assert make_problem("fno", "gated-relu").with_half_products() is None


@pytest.mark.slow
def test_a_solve_with_rounded_products_is_certified_in_float64(monkeypatch):
    monkeypatch.setattr(fitting, "SMALL_TOKENS", 0)
    used = []
    whole = Problem.with_half_products
    monkeypatch.setattr(Problem, "with_half_products", lambda self: used.append(whole(self)) or used[-1])
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 9, 8))
    y = (X[:, :, 0] * X[:, :, 1]).mean(1) > 0
    settings = {"solver": "column-generation", "random_state": 0}
    rough = ch.ConvexHeadClassifier("self-attention", beta_ratio=0.1, tol=1e-3, **settings).fit(X, y)
    assert used
    assert used[0] is not None
    assert rough.certificate_.converged
    monkeypatch.undo()
    exact = ch.ConvexHeadClassifier("self-attention", beta=rough.beta_, tol=1e-7, random_state=0).fit(X, y)
    assert rough.certificate_.dual <= exact.certificate_.primal * (1 + 1e-9)
    assert rough.certificate_.primal <= exact.certificate_.primal * (1 + 1.1e-3)
