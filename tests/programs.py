"""Random problems, each as the library and as the `oracle` sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

import oracle
from convexhead.certificate.certify import Certificate
from convexhead.drive import solve
from convexhead.program.activations import make_activation, sample_gates
from convexhead.program.atoms import Atoms
from convexhead.program.losses import make_loss
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from kinds import cases, head_of

CASES = cases("linear", "gated-relu")
MIXING = [case for case in CASES if case[0] != "linear"]
POOLS = ("mean", "cls", "none")
LOSSES = ("cross-entropy", "squared", "huber")


@dataclass(frozen=True)
class Instance:
    """One random problem, as the library and as the oracle see it."""

    problem: Problem
    dense: oracle.DenseProgram

    @property
    def beta(self) -> float:
        return self.dense.beta

    def point(self, atoms: Atoms) -> oracle.Point:
        """The model in the oracle's form."""
        return self.dense.point(*(x.numpy() for x in (atoms.U, atoms.V, atoms.block, atoms.intercept)))


def make_instance(
    name: str,
    activation: str = "linear",
    outputs: str = "shared",
    *,
    pool: str = "mean",
    loss: str = "squared",
    intercept: bool = False,
    n: int = 60,
    grid: tuple[int, int] = (2, 3),
    d: int = 4,
    c: int = 4,
    n_gates: int = 2,
    ratio: float = 0.25,
    scale: float = 1.0,
    target_scale: float = 2.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Instance:
    """Gaussian tokens times ``scale``, targets that depend on them, ``beta = ratio · beta_max``."""
    rng = np.random.default_rng(seed)
    pool = "mean" if name == "attentive" else pool  # it pools by its queries
    s, groups = grid[0] * grid[1], 2 if name == "block-fno" else 1
    X = rng.normal(size=(n, s, d))
    r = s if pool == "none" else 1
    teacher = rng.normal(size=(s, d, r, c))
    scores = np.einsum("nsd,sdrc->nrc", X, teacher) / np.sqrt(s * d) + rng.normal(size=(n, r, c))
    if loss == "cross-entropy":
        label = scores.argmax(-1)
        label[: min(n, c)] = np.arange(c)[: min(n, c), None]  # every class occurs
        Y = np.eye(c)[label]
    else:
        Y = target_scale * scores
    head = head_of(name, s, d, pool=pool, grid=grid, n_blocks=groups, variant=outputs)
    gates = None
    if activation == "gated-relu":
        gates = sample_gates(head, n_gates, torch.Generator().manual_seed(seed))
    X = torch.as_tensor(scale * X, dtype=dtype)  # the oracle sees the tokens as rounded
    problem = Problem(
        Operator(X, head, make_activation(activation, head, gates), dtype=dtype),
        torch.as_tensor(Y),
        make_loss(loss),
        fit_intercept=intercept,
    )
    dense = oracle.dense_program(
        name,
        X.double().numpy(),
        Y,
        loss=loss,
        pool=pool,
        grid=grid,
        gates=None if gates is None else gates.numpy(),
        groups=groups,
        outputs=outputs,
        queries=None if head.queries is None else head.queries.numpy(),
        intercept=intercept,
    )
    return Instance(problem, replace(dense, beta=ratio * dense.beta_max()))


def run(instance: Instance, tol: float, **options: object) -> tuple[Atoms, Certificate]:
    """The library's model and certificate."""
    generator = torch.Generator().manual_seed(0)
    solution = solve(instance.problem, instance.beta, tol=tol, generator=generator, **options)
    return solution.atoms, solution.certificate


def spread(*parts: object) -> int:
    """A seed of its own for every case, the same in every run."""
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(repr(parts)))
