"""Coordinates in which the factored objective curves about alike in every direction.

At fixed mixing weights the outputs are linear in the values, ``f_i = M_i V``, and features ``M_i`` of real tokens are
far from white: curvatures in ``V`` differ by factors of thousands, while in ``U`` the penalty dominates. With the
Hessian of the loss replaced by its mean ``h``, the factored objective's in the values of a group of atoms is

    A ⊗ I_c,    A = h C + β I = L Lᵀ,    C = (1/n) Σ_i M_iᵀ M_i,

and in the coordinates ``Ũ = √β U, Ṽ = Lᵀ V, b̃ = √h b`` it is the identity (Kronecker-factored curvature: Martens &
Grosse 2015). L-BFGS learns the rest.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.problem import Atoms, Problem

GROUP = 2048
"""Rows of the largest matrix that is factored: atoms of a block share one as far as that goes."""


class Whitening:
    """The change of coordinates at ``atoms``.

    Parameters
    ----------
    problem : Problem
    atoms : Atoms
        Where curvature is taken.
    f : Tensor (n, r, c)
        Their outputs.
    beta : float
    """

    def __init__(self, problem: Problem, atoms: Atoms, f: Float[Tensor, "n r c"], beta: float) -> None:
        self.root_beta = math.sqrt(beta)
        h = mean_curvature(problem, f)
        self.root_h = math.sqrt(h) or 1.0
        most = max(1, GROUP // problem.head.value_rows)
        blocks = [(atoms.block == j).nonzero().squeeze(1) for j in torch.unique(atoms.block).tolist()]
        self.groups = [group for of_block in blocks for group in of_block.split(most)]
        self.roots = [_root(h * gram, beta) for gram in problem.value_grams(atoms, self.groups)]

    def whiten(self, atoms: Atoms) -> Atoms:
        """From weights to coordinates."""
        V = self._by_group(atoms.V, lambda L, V: L.T @ V)
        return replace(atoms, U=self.root_beta * atoms.U, V=V, intercept=self.root_h * atoms.intercept)

    def weights(self, atoms: Atoms) -> Atoms:
        """Inverse of `whiten`."""
        V = self._by_group(atoms.V, lambda L, V: torch.linalg.solve_triangular(L.T, V, upper=True))
        return replace(atoms, U=atoms.U / self.root_beta, V=V, intercept=atoms.intercept / self.root_h)

    def pull(self, gradient: Atoms) -> Atoms:
        """The gradient in the coordinates, from that in the weights."""
        V = self._by_group(gradient.V, lambda L, V: torch.linalg.solve_triangular(L, V, upper=False))
        return replace(gradient, U=gradient.U / self.root_beta, V=V, intercept=gradient.intercept / self.root_h)

    def _by_group(self, V: Float[Tensor, "k e c"], change) -> Float[Tensor, "k e c"]:  # type: ignore[no-untyped-def]
        out = torch.empty_like(V)
        for group, L in zip(self.groups, self.roots, strict=True):
            out[group] = change(L, V[group].flatten(0, 1)).view(len(group), *V.shape[1:])
        return out


def mean_curvature(problem: Problem, f: Float[Tensor, "n r c"]) -> float:
    """``h``: the mean of the loss's second derivatives over samples, rows and outputs; 0 where they are not known."""
    signs = probes(problem, f, torch.Generator().manual_seed(0))
    if signs is None:
        return 0.0
    return problem.mean(signs.square().sum((1, 2))) / (signs.shape[1] * signs.shape[2])


def probes(problem: Problem, f: Float[Tensor, "n r c"], generator: torch.Generator) -> Float[Tensor, "n r c"] | None:
    """Draws whose covariance is the loss's Hessian at ``f``; None where the loss does not say."""
    # Processes have different numbers of samples, and must still agree on the generator afterwards.
    seed = int(torch.randint(2**31, (1,), generator=generator)) + problem.ranks.rank
    own = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, f.shape, generator=own, dtype=torch.int8).to(f.device, f.dtype) * 2 - 1
    return problem.loss.hessian_root(f, problem.Y, signs)


def _root(C: Float[Tensor, "m m"], beta: float) -> Float[Tensor, "m m"]:
    """Lower triangular ``L`` with ``L Lᵀ = C + βI``; as much more as rounding asks for is added to the diagonal."""
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    more = beta
    while True:
        L, failed = torch.linalg.cholesky_ex(C + more * eye)
        if not failed:
            return L
        more *= 4
