"""Cone decomposition: every gated ReLU head as a true ReLU head with the same outputs on its training data.

The gate lies in its own cone, ``K_j g_j ≥ 0`` with ``K_j = (2D_j − I) K``. So every ``u`` is a difference
``u = u⁺ − u⁻`` of two vectors of the cone, and on the training data

    D_j K u = max(K u⁺, 0) − max(K u⁻, 0)

one gated atom ``(u, v)`` becomes two ReLU atoms ``(u⁺, v)`` and ``(u⁻, −v)``. What it costs is norm: the penalty goes
from ``‖u‖‖v‖`` to ``(‖u⁺‖ + ‖u⁻‖)‖v‖``. The minimum-norm split solves the quadratic program

    min ‖u + w‖² + ‖w‖²    over    K_j w ≥ 0,  K_j (u + w) ≥ 0          (u⁻ = w, u⁺ = u + w)

By the substitution ``y = w + u/2`` it is the projection of the origin onto ``{y : K_j y ≥ |K_j u|/2}``, a non-negative
least-squares problem. Where the rows are too many for that, ``w = t g_j`` with the smallest ``t`` that will do.

Rows where the gate's own pre-activation vanishes (or nearly: relative to ``‖K_i‖‖g_j‖``) have no side: the split
ignores them and the result says how many there were, and what the outputs lost by it.

Source: Mishkin, Sahiner, Pilanci, *Fast convex optimization for two-layer ReLU networks*, ICML 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import nnls
from torch import Tensor

from convexhead.errors import InputError
from convexhead.program.activations import GatedReLU, ReLU
from convexhead.program.atoms import Atoms, rescale
from convexhead.program.operator import Operator
from convexhead.program.patterns import preactivation_rows
from convexhead.program.problem import Problem

BORDER = 1e-10
"""Relative size (to the norms of its factors) below which a gate's pre-activation lies on the border. Chosen by
hand."""
QUADRATIC = 2_000_000
"""Largest number of entries of ``K`` for which the minimum-norm split is computed. Chosen by hand."""


@dataclass(frozen=True)
class Decomposition:
    """A ReLU head with the training outputs of a gated one.

    Attributes
    ----------
    atoms : Atoms
        Of the ReLU head, balanced; blocks are channel groups.
    problem : Problem
        The gated problem's data with a ReLU: what the atoms are for.
    norm_growth : float
        ``Σ ‖U_k‖‖V_k‖`` after over before.
    border_rows : int
        Pre-activations on the border of their gate's cone, over all gates in use.
    output_error : float
        Largest change of a training output, relative to the largest output.
    """

    atoms: Atoms
    problem: Problem
    norm_growth: float
    border_rows: int
    output_error: float


def cone_decomposition(problem: Problem, atoms: Atoms) -> Decomposition:
    """Split the atoms of a gated ReLU head into those of a true ReLU head.

    Parameters
    ----------
    problem : Problem
        With a `GatedReLU`.
    atoms : Atoms
        Its weights.

    Raises
    ------
    InputError
        The problem has another activation.
    """
    if not isinstance(problem.activation, GatedReLU):
        raise InputError("a cone decomposition starts from a gated ReLU head: fit one with activation='gated-relu'")
    head, gates = problem.head, problem.activation.gates
    exact = problem.astype(torch.float64)
    atoms = atoms.to(exact.device, torch.float64)
    X = exact.operator.tokens().double()
    parts: list[Atoms] = []
    border = 0
    for j in torch.unique(atoms.block).tolist():
        mine = atoms.select(atoms.block == j)
        group = j % head.n_groups
        gate = gates.to(X).reshape(-1, head.mixing_size)[j]
        splitter = _Splitter(head, X, group, gate)
        border += splitter.border
        flat = mine.U.flatten(1)
        minus = torch.stack([splitter(u) for u in flat])
        block = torch.full((2 * len(flat),), group, device=X.device)
        U = torch.cat([flat + minus, minus]).view(-1, *head.mixing_shape)
        parts.append(Atoms(U, torch.cat([mine.V, -mine.V]), block, atoms.intercept))
    operator = problem.operator
    relu = Problem(
        Operator(operator.X, head, ReLU(head), dtype=operator.dtype, reuse=operator.samples.kept > 0),
        problem.targets,
        problem.loss,
        weights=problem.weights,
        fit_intercept=problem.fit_intercept,
    )
    joined = Atoms(
        torch.cat([part.U for part in parts]) if parts else atoms.U,
        torch.cat([part.V for part in parts]) if parts else atoms.V,
        torch.cat([part.block for part in parts]) if parts else atoms.block,
        atoms.intercept,
    )
    split, sizes = rescale(joined)
    _, before = rescale(atoms)
    total = float(sum(size.sum() for size in before))
    f, g = exact.outputs(atoms), relu.astype(torch.float64).outputs(split)
    return Decomposition(
        atoms=split,
        problem=relu,
        norm_growth=float(sum(size.sum() for size in sizes)) / total if total else 1.0,
        border_rows=border,
        output_error=float((f - g).abs().max() / f.abs().max().clamp_min(torch.finfo(f.dtype).tiny)),
    )


class _Splitter:
    """``u ↦ u⁻`` for one gate."""

    def __init__(self, head, X: Float[Tensor, "n s d"], group: int, gate: Float[Tensor, " p"]) -> None:  # type: ignore[no-untyped-def]
        self.gate = gate / gate.norm()
        self.head, self.X, self.group = head, X, group
        a = self._rows_times(self.gate)
        self.K: Tensor | None = None
        if a.numel() * head.mixing_size <= QUADRATIC:
            self.K = preactivation_rows(head, X, group)
            size = self.K.norm(dim=1)
        else:
            size = torch.full_like(a, float(a.abs().max()))
        on_border = a.abs() <= BORDER * size
        self.border = int((on_border & (size > 0)).sum())
        self.a, self.inside = a, ~on_border

    def _rows_times(self, u: Float[Tensor, " p"]) -> Float[Tensor, " N"]:
        U = u.view(1, *self.head.mixing_shape)
        group = torch.tensor([self.group], device=u.device)
        parts = [self.head.preactivation(self.head.prepare(x), U, group).flatten() for x in self.X.split(256)]
        return torch.cat(parts)

    def __call__(self, u: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        along = self._rows_times(u)[self.inside]
        a = self.a[self.inside]
        # The smallest t with t a ≥ 0 and t a + K_j u ≥ 0, along the gate.
        needed = (-along * a.sign() / a.abs()).clamp_min(0)
        t = float(needed.max()) if len(needed) else 0.0
        if t == 0.0:
            return torch.zeros_like(u)
        line = t * self.gate
        if self.K is None:
            return line
        K = self.K[self.inside] * a.sign().unsqueeze(1)
        y = _nearest(K, (K @ u).abs() / 2)
        best = y - u / 2
        # Solvers leave a little outside of the cone; a step along the gate brings it back.
        short = torch.maximum((-(K @ best)).clamp_min(0), (-(K @ (best + u))).clamp_min(0)) / a.abs()
        best = best + float(short.max()) * self.gate
        return best if _cost(best, u) < _cost(line, u) else line


def _cost(minus: Float[Tensor, " p"], u: Float[Tensor, " p"]) -> float:
    return float(minus.norm() + (u + minus).norm())


def _nearest(K: Float[Tensor, "h p"], b: Float[Tensor, " h"]) -> Float[Tensor, " p"]:
    """The point of ``{y : K y ≥ b}`` nearest to the origin: least distance programming by non-negative least squares.

    Source: Lawson & Hanson, *Solving Least Squares Problems*, 1974, chapter 23.
    """
    A = torch.cat([K, b.unsqueeze(1)], 1).T.numpy(force=True)
    target = np.zeros(len(A))
    target[-1] = 1.0
    lam, _ = nnls(A, target, maxiter=30 * A.shape[1])
    r = A @ lam - target
    if abs(r[-1]) < 1e-14:
        return torch.zeros_like(K[0])
    return torch.as_tensor(-r[:-1] / r[-1], dtype=K.dtype, device=K.device)
