"""Every pass over the tokens of a small problem: the same wherever tokens are and whoever computes."""

from __future__ import annotations

import torch

from convexhead.program.activations import make_activation, sample_gates
from convexhead.program.atoms import Atoms
from convexhead.program.losses import CrossEntropy
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from kinds import cases, head_of

N, S, D, C = 61, 6, 4, 3
CASES = list(dict.fromkeys(case[:2] for case in cases("linear", "gated-relu")))


def problem_on(X, name, activation, pool="mean", **options):
    generator = torch.Generator().manual_seed(0)
    pool = "mean" if name == "attentive" else pool  # it pools by its queries
    head = head_of(name, S, D, pool=pool, grid=(2, 3))
    gates = sample_gates(head, 3, generator) if activation == "gated-relu" else None
    Y = torch.eye(C)[torch.randint(0, C, (N,), generator=generator)].unsqueeze(1).bool()
    return Problem(
        Operator(X, head, make_activation(activation, head, gates), **options), Y, CrossEntropy(), fit_intercept=True
    )


def passes(problem):
    """What every pass gives at fixed weights."""
    generator = torch.Generator().manual_seed(1)
    block = torch.arange(5) % problem.n_blocks
    U = torch.randn(5, *problem.head.mixing_shape, generator=generator, dtype=torch.float64)
    V = torch.randn(5, *problem.value_shape, generator=generator, dtype=torch.float64)
    b = torch.randn(C, generator=generator, dtype=torch.float64)
    atoms = Atoms(U, problem.mask_values(V, block).double(), block, b).to("cpu", problem.dtype)
    f = problem.outputs(atoms)
    R = problem.residual(f)
    _, at, outputs = problem.value_and_gradient(atoms, 0.1)
    return [
        f,
        at.U,
        at.V,
        at.intercept,
        outputs,
        problem.operator.adjoint_times_values(R, atoms.V, block),
        problem.operator.adjoint_times_mixing(R, atoms.U, block),
        problem.operator.features(),
    ]
