"""Coordinates in which the factored objective curves about alike in every direction.

At fixed mixing weights the outputs are linear in the values, ``f_i = M_i V``, and features ``M_i`` of real tokens are
far from white: curvatures in ``V`` differ by factors of thousands, while in ``U`` the penalty dominates. With the
Hessian of the loss replaced by its mean ``h``, the factored objective's in the values of a group of atoms is

    A ⊗ I_c,    A = h C + β I = L Lᵀ,    C = (1/n) Σ_i M_iᵀ M_i,

and in the coordinates ``Ũ = √β U, Ṽ = Lᵀ V, b̃ = √h b`` it is the identity (Kronecker-factored curvature: Martens &
Grosse 2015).

What that misses is how an output's curvature goes with the features: a class is in doubt on the images that look like
it. With ``w_io``, the loss's second derivative in output ``o``, the block of ``Ṽ_o`` is ``L⁻¹ A_o L⁻ᵀ`` with
``A_o = (1/n) Σ_i w_io M_iᵀ M_i + β I``; it is far above the identity along ``u_o ∝ L⁻¹ Σ_i w_io M_iᵀ``, the features of
the samples in doubt. One number an output, ``γ_o = u_oᵀ L⁻¹ A_o L⁻ᵀ u_o``, mends that: coordinates are stretched along
``u_o`` by ``√γ_o``. L-BFGS finds the rest.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.program.atoms import Atoms
from convexhead.program.problem import Problem

GROUP = 2048
"""Largest number of rows of a matrix that is factored; atoms of a block share one within this limit. Chosen by hand."""


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
        w = curvatures(problem, f)
        h = mean_curvature(problem, w)
        self.root_h = math.sqrt(h) or 1.0
        most = max(1, GROUP // problem.head.value_rows)
        blocks = [(atoms.block == j).nonzero().squeeze(1) for j in torch.unique(atoms.block).tolist()]
        self.groups = [group for of_block in blocks for group in of_block.split(most)]
        self.roots = [_root(h * gram, beta) for gram in problem.operator.value_grams(atoms, self.groups)]
        self.along, self.stretch = torch.zeros_like(atoms.V), torch.zeros_like(atoms.intercept)
        if w is not None:
            self._stretch(problem, atoms, w, beta)

    def _stretch(self, problem: Problem, atoms: Atoms, w: Float[Tensor, "n r c"], beta: float) -> None:
        """Find ``u_o`` and ``√γ_o − 1``."""
        u = self._solve(problem.operator.adjoint_times_mixing(w, atoms.U, atoms.block))
        self.along = u / torch.linalg.vector_norm(u, dim=(0, 1)).clamp_min(torch.finfo(u.dtype).tiny)
        V = self._solve_transposed(self.along)
        along = problem.outputs(replace(atoms, V=V, intercept=torch.zeros_like(atoms.intercept)))
        curvature = problem.total_of(lambda _, w, along: (w * along.square()).sum((0, 1)), w, along)
        gamma = curvature / problem.n + beta * V.square().sum((0, 1))
        self.stretch = gamma.clamp_min(1.0).sqrt() - 1

    def whiten(self, atoms: Atoms) -> Atoms:
        """Map weights to coordinates."""
        V = self._by_group(atoms.V, lambda L, V: L.T @ V)
        V = self._stretched(V, self.stretch)
        return replace(atoms, U=self.root_beta * atoms.U, V=V, intercept=self.root_h * atoms.intercept)

    def weights(self, atoms: Atoms) -> Atoms:
        """Inverse of `whiten`."""
        V = self._solve_transposed(self._stretched(atoms.V, 1 / (1 + self.stretch) - 1))
        return replace(atoms, U=atoms.U / self.root_beta, V=V, intercept=atoms.intercept / self.root_h)

    def pull(self, gradient: Atoms) -> Atoms:
        """The gradient in the coordinates, from that in the weights."""
        V = self._stretched(self._solve(gradient.V), 1 / (1 + self.stretch) - 1)
        return replace(gradient, U=gradient.U / self.root_beta, V=V, intercept=gradient.intercept / self.root_h)

    def _stretched(self, V: Float[Tensor, "k e c"], more: Float[Tensor, " c"]) -> Float[Tensor, "k e c"]:
        """``V_o + more_o u_o ⟨u_o, V_o⟩``."""
        return V + self.along * (more * (self.along * V).sum((0, 1)))

    def _solve(self, V: Float[Tensor, "k e c"]) -> Float[Tensor, "k e c"]:
        """``L⁻¹ V``."""
        return self._by_group(V, lambda L, V: torch.linalg.solve_triangular(L, V, upper=False))

    def _solve_transposed(self, V: Float[Tensor, "k e c"]) -> Float[Tensor, "k e c"]:
        """``L⁻ᵀ V``."""
        return self._by_group(V, lambda L, V: torch.linalg.solve_triangular(L.T, V, upper=True))

    def _by_group(self, V: Float[Tensor, "k e c"], change) -> Float[Tensor, "k e c"]:  # type: ignore[no-untyped-def]
        out = torch.empty_like(V)
        for group, L in zip(self.groups, self.roots, strict=True):
            out[group] = change(L, V[group].flatten(0, 1)).view(len(group), *V.shape[1:])
        return out


def curvatures(problem: Problem, f: Float[Tensor, "n r c"]) -> Float[Tensor, "n r c"] | None:
    """``w``: a draw whose mean is the diagonal of the loss's Hessian at ``f``; None where that is not known."""
    signs = probes(problem, f, torch.Generator().manual_seed(0))
    return None if signs is None else signs.square_()


def mean_curvature(problem: Problem, w: Float[Tensor, "n r c"] | None) -> float:
    """``h``: the mean of `curvatures`; 0 where they are not known."""
    return 0.0 if w is None else problem.mean(w.mean((1, 2)))


def probes(problem: Problem, f: Float[Tensor, "n r c"], generator: torch.Generator) -> Float[Tensor, "n r c"] | None:
    """Draws whose covariance is the loss's Hessian at ``f``; None where the loss does not say."""
    # Processes have different numbers of samples, and must still agree on the generator afterwards.
    seed = int(torch.randint(2**31, (1,), generator=generator)) + problem.ranks.rank
    own = torch.Generator().manual_seed(seed)
    drawn, signs = torch.empty_like(f), torch.randint(0, 2, f.shape, generator=own, dtype=torch.int8)
    for rows in problem.rows:
        root = problem.losses.at(rows).hessian_root(f[rows], signs[rows].to(f.device, f.dtype) * 2 - 1)
        if root is None:
            return None
        drawn[rows] = root
    return drawn


def _root(C: Float[Tensor, "m m"], beta: float) -> Float[Tensor, "m m"]:
    """Lower triangular ``L`` with ``L Lᵀ = C + βI``; as much more as rounding asks for is added to the diagonal.

    A ``C`` that left the range of floating point counts as zero.
    """
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    if not bool(C.isfinite().all()):
        return math.sqrt(beta) * eye
    more = beta
    while True:
        L, failed = torch.linalg.cholesky_ex(C + more * eye)
        if not failed:
            return L
        more *= 4
