"""The contract that every head keeps. To test a new head, add its name to `HEADS` and its formula to `reference.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import reference
from convexhead.errors import InputError
from convexhead.program.activations import make_activation, sample_gates
from convexhead.program.heads import make_head
from convexhead.program.heads.attentive import Attentive
from convexhead.program.losses import Squared
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from kinds import cases, head_of, pooled

GRIDS = [(2, 3), (6, 1), (1, 6)]
CASES = cases("linear", "gated-relu", "relu")
POOLS = ("mean", "cls", "none")
N, D, C, GATES = 7, 4, 4, 3


def build(name, activation, outputs, pool, grid, *, d=D, reuse=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s = grid[0] * grid[1]
    X = torch.randn(N, s, d, generator=generator, dtype=torch.float64)
    head = head_of(name, s, d, pool=pool, grid=grid, variant=outputs)
    gates = sample_gates(head, GATES, generator) if activation == "gated-relu" else None
    Y = torch.randn(N, head.r, C, generator=generator, dtype=torch.float64)
    problem = Problem(Operator(X, head, make_activation(activation, head, gates), reuse=reuse), Y, Squared())
    k = 2 * problem.n_blocks + 1
    block = torch.arange(k) % problem.n_blocks
    atoms = problem.empty()
    atoms.U = torch.randn(k, *head.mixing_shape, generator=generator, dtype=torch.float64)
    atoms.V = problem.mask_values(torch.randn(k, *problem.value_shape, generator=generator, dtype=torch.float64), block)
    atoms.block = block
    atoms.intercept = torch.randn(C, generator=generator, dtype=torch.float64)
    return problem, atoms, gates


def reference_outputs(problem, atoms, gates):
    head = problem.head
    f = np.zeros((N, head.r, C)) + atoms.intercept.numpy()
    for i, X in enumerate(problem.operator.X.numpy()):
        for U, V, j in zip(atoms.U.numpy(), atoms.V.numpy(), atoms.block.tolist(), strict=True):
            group, gate = j % head.n_groups, None
            if gates is not None:
                gate = gates[j // head.n_groups].numpy()
                gate = gate[group] if head.n_groups > 1 else gate
            if not problem.activation.convex:
                gate = U  # a ReLU is gated by its own pre-activation
            if head.name == "attentive":
                f[i] += reference.attend(X, U, head.queries.numpy(), j) @ V
                continue
            M = reference.mix(head.name, X, U, grid=head.grid, group=group, gate=gate)
            f[i] += reference.pool(M, head.pool) @ V
    return f


@pytest.mark.parametrize("reuse", [True, False], ids=["prepared", "streamed"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("name", "activation", "outputs", "pool"), pooled(CASES, *POOLS))
def test_outputs_are_the_formula(name, activation, outputs, pool, grid, reuse):
    for d in (D, 16):  # attention takes another path where d >= 2 s
        problem, atoms, gates = build(name, activation, outputs, pool, grid, d=d, reuse=reuse)
        np.testing.assert_allclose(problem.outputs(atoms).numpy(), reference_outputs(problem, atoms, gates), atol=1e-10)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("name", "activation", "outputs", "pool"), pooled(CASES, *POOLS))
def test_adjoints(name, activation, outputs, pool, grid):
    """``⟨R, 𝒜_j(u vᵀ)⟩ = ⟨𝒜_j*(R) v, u⟩ = ⟨𝒜_j*(R)ᵀ u, v⟩`` for every atom, in one number each."""
    problem, atoms, _ = build(name, activation, outputs, pool, grid)
    R = torch.randn(N, problem.head.r, C, dtype=torch.float64)
    right = problem.operator.adjoint_times_values(R, atoms.V, atoms.block, atoms.U)
    left = problem.operator.adjoint_times_mixing(R, atoms.U, atoms.block)
    for k in range(len(atoms)):
        one = atoms.select(torch.tensor([k]))
        one.intercept = torch.zeros(C, dtype=torch.float64)
        outputs_k = problem.outputs(one)
        expected = float((R * outputs_k).sum())
        scale = float(R.norm() * outputs_k.norm())
        assert abs(float((right[k] * one.U[0]).sum()) - expected) <= 1e-10 * scale
        assert abs(float((left[k] * one.V[0]).sum()) - expected) <= 1e-10 * scale


@pytest.mark.parametrize(
    ("name", "activation", "outputs", "pool"), pooled([case for case in CASES if case[1] != "relu"], *POOLS)
)
def test_dense_materialisation(name, activation, outputs, pool):
    """The feature matrix and the gradient matrix say the same as the factored passes."""
    problem, atoms, _ = build(name, activation, outputs, pool, (2, 3))
    features = problem.operator.features()
    p, (e, c) = problem.head.mixing_size, problem.value_shape
    f = atoms.intercept + torch.zeros(N * problem.head.r, C, dtype=torch.float64)
    for j in range(problem.n_blocks):
        mine = atoms.select(atoms.block == j)
        Z = mine.U.reshape(-1, p).T @ mine.V.reshape(-1, e * c)
        f = f + features[j] @ Z.view(p * e, c)
    torch.testing.assert_close(problem.outputs(atoms).view(f.shape), f, rtol=1e-10, atol=1e-10)
    R = torch.randn(N, problem.head.r, C, dtype=torch.float64)
    blocks = torch.arange(problem.n_blocks).flip(0)
    for j, formed in zip(blocks.tolist(), problem.operator.gradient_matrices(R, blocks), strict=True):
        G = (features[j].T @ R.flatten(0, 1)).view(p, e, c)
        G = problem.mask_values(G, torch.full((p,), j)).view(p, e * c)
        torch.testing.assert_close(formed, G, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "activation", "outputs"), CASES)
def test_gradient_is_the_derivative_of_the_objective(name, activation, outputs):
    problem, atoms, _ = build(name, activation, outputs, "mean", (2, 3))
    problem.fit_intercept = True
    leaves = [atoms.U, atoms.V, atoms.intercept]
    for leaf in leaves:
        leaf.requires_grad_()
    f = problem.outputs(atoms)
    objective = problem.loss.value(f, problem.Y).mean() + 0.3 / 2 * atoms.V.square().sum()
    if problem.head.learns_mixing:
        objective = objective + 0.3 / 2 * atoms.U.square().sum()
    expected = list(torch.autograd.grad(objective, leaves))
    expected[1] = problem.mask_values(expected[1], atoms.block)
    for leaf in leaves:
        leaf.requires_grad_(False)
    value, at, _ = problem.value_and_gradient(atoms, 0.3)
    gradient = [at.U, at.V, at.intercept]
    assert value == pytest.approx(float(objective.detach()), rel=1e-12)
    for mine, theirs, learned in zip(gradient, expected, (problem.head.learns_mixing, True, True), strict=True):
        if learned:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_mean_pooled_linear_fno_is_the_mlp_on_mean_tokens():
    problem, atoms, _ = build("fno", "linear", "shared", "mean", (2, 3))
    mlp = make_head("mlp", 6, D)
    data = make_activation("linear", mlp, None).prepare(problem.operator.X, reuse=False)
    mixed = mlp.linear_mix(data, atoms.U.sum(1), atoms.block)
    torch.testing.assert_close(mixed.flatten(2) @ atoms.V.flatten(0, 1) + atoms.intercept, problem.outputs(atoms))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_head("self-atention", 4, 4), "did you mean 'self-attention'"),
        (lambda: make_head("mlp", 4, 4, pool="max"), "unknown pool"),
        (lambda: make_head("fno", 6, 4, grid=(2, 2)), "does not hold 6 tokens"),
        (lambda: make_head("block-fno", 4, 6, n_blocks=4), "divisor of the 6 channels"),
        (
            lambda: make_head("block-fno", 4, 4, n_blocks=2, outputs="grouped").output_mask(3),
            "divisible by n_blocks",
        ),
        (lambda: make_activation("gated-relu", make_head("mlp", 4, 4), torch.ones(3, 5)), "needs \\(J, 4\\)"),
        (lambda: make_activation("gated-relu", make_head("mlp", 4, 4), torch.full((1, 4), torch.nan)), "NaN"),
        (
            lambda: make_activation("gated-relu", make_head("linear", 4, 4), torch.ones(1)),
            "activation='linear' only",
        ),
        (lambda: make_activation("relu", head_of("attentive", 4, 4), None), "activation='linear' only"),
        (lambda: make_head("attentive", 4, 4), "needs the queries"),
        (lambda: Attentive(4, 4, queries=torch.zeros(2, 5)), "needs \\(J, 4\\)"),
        (lambda: Attentive(4, 4, queries=torch.full((2, 8), torch.inf)), "NaN or infinity"),
        (lambda: Attentive(4, 4, queries=torch.zeros(2, 4), pool="cls"), "pools tokens by its queries"),
        (lambda: Attentive(4, 4, queries=torch.zeros(2, 4), query_norm="both"), "unknown query_norm"),
    ],
)
def test_errors(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_masks_take_one_bit_an_entry():
    problem, *_ = build("self-attention", "gated-relu", "shared", "mean", (4, 4))
    assert problem.operator.masks.dtype == torch.uint8
    assert problem.operator.masks.numel() == N * GATES * 16 * 16 // 8
