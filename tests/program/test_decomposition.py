"""Cone decomposition: the same training outputs from true ReLU heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convexhead.dual_norm import cone_decomposition
from convexhead.errors import InputError
from convexhead.program.activations import GatedReLU, LinearActivation, sample_gates
from convexhead.program.heads import make_head
from convexhead.program.losses import Squared
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from kinds import MASKED


def gated(name, *, pool="mean", outputs="shared", gates=None, seed=0, X=None):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(10, 4, 4, generator=generator, dtype=torch.float64) if X is None else X
    head = make_head(name, X.shape[1], X.shape[2], pool=pool, n_blocks=2, outputs=outputs)
    gates = sample_gates(head, 3, generator) if gates is None else gates
    Y = torch.randn(len(X), head.r, 2, generator=generator, dtype=torch.float64)
    problem = Problem(Operator(X, head, GatedReLU(head, gates)), Y, Squared())
    atoms = problem.empty()
    k = 2 * problem.n_blocks
    atoms.block = torch.arange(k) % problem.n_blocks
    atoms.U = torch.randn(k, *head.mixing_shape, generator=generator, dtype=torch.float64)
    atoms.V = problem.mask_values(
        torch.randn(k, *problem.value_shape, generator=generator, dtype=torch.float64), atoms.block
    )
    atoms.intercept = torch.randn(2, generator=generator, dtype=torch.float64)
    return problem, atoms


@pytest.mark.parametrize("pool", ["mean", "cls", "none"])
@pytest.mark.parametrize("name", MASKED)
def test_training_outputs_are_the_same(name, pool):
    problem, atoms = gated(name, pool=pool, outputs="grouped")
    split = cone_decomposition(problem, atoms)
    f, g = problem.outputs(atoms), split.problem.outputs(split.atoms)
    assert float((f - g).abs().max() / f.abs().max()) <= 1e-10
    assert split.output_error <= 1e-10
    assert split.border_rows == 0
    assert len(split.atoms) <= 2 * len(atoms)
    assert split.norm_growth >= 1 - 1e-12


def test_many_rows_are_split_along_the_gate():
    """Where the least split would take too long: exact, and what is taken away is a multiple of the gate."""
    X = torch.randn(40, 64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gate = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    problem, atoms = gated("fno", X=X, gates=gate)
    split = cone_decomposition(problem, atoms)
    assert split.output_error <= 1e-9
    assert split.border_rows == 0
    U = split.atoms.U.flatten(1)
    cosine = U @ gate.flatten() / (U.norm(dim=1) * gate.norm())
    assert (cosine > 1 - 1e-12).sum() == len(atoms) == len(U) / 2


def test_split_has_the_least_norm():
    """Against CVXPY."""
    import cvxpy as cp

    problem, atoms = gated("mlp")
    K = problem.operator.X.flatten(0, 1).numpy()
    for k, (u, j) in enumerate(zip(atoms.U, atoms.block.tolist(), strict=True)):
        signs = torch.sign(torch.from_numpy(K) @ problem.activation.gates[j]).numpy()
        w = cp.Variable(4)
        cone = signs[:, None] * K
        cp.Problem(
            cp.Minimize(cp.sum_squares(u.numpy() + w) + cp.sum_squares(w)), [cone @ w >= 0, cone @ (u.numpy() + w) >= 0]
        ).solve(solver="CLARABEL")
        least = np.linalg.norm(w.value) + np.linalg.norm(u.numpy() + w.value)
        split = cone_decomposition(problem, atoms.select(torch.tensor([k])))
        assert split.norm_growth * float(u.norm()) <= least * (1 + 1e-6)


def test_rows_on_the_border_are_reported():
    X = torch.randn(6, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X[0, 0] = torch.tensor([1.0, 0.0, 0.0])
    X[1] = 0.0  # a zero token has no side, and needs none
    gate = torch.tensor([[0.0, 1.0, 0.5]], dtype=torch.float64)
    problem, atoms = gated("mlp", X=X, gates=gate)
    split = cone_decomposition(problem, atoms)
    assert split.border_rows == 1
    f, g = problem.outputs(atoms), split.problem.outputs(split.atoms)
    torch.testing.assert_close(f[1:], g[1:])
    assert split.output_error == pytest.approx(float((f - g).abs().max() / f.abs().max()))


def test_only_gated_heads_are_split():
    problem, atoms = gated("mlp")
    linear = Problem(Operator(problem.operator.X, problem.head, LinearActivation(problem.head)), problem.Y, Squared())
    with pytest.raises(InputError, match="gated ReLU"):
        cone_decomposition(linear, atoms)


def test_no_atoms():
    problem, _ = gated("mlp")
    split = cone_decomposition(problem, problem.empty())
    assert len(split.atoms) == 0
    assert split.norm_growth == 1.0
