"""The Hessian of the linear head, near enough to precondition conjugate gradients.

The Hessian is ``(1/n) Σ_i Λ_i ⊗ φ_i φ_iᵀ + β``, with ``Λ_i (c, c)`` the second derivative of a row's loss and
``φ_i = (x_i, 1)``. Most of it is small and about alike in all outputs. Some rows, those that the head is in doubt
about, have much of it, in few directions ``l`` of the outputs: one, where the doubt is between two classes. So with
``m`` of these, ``Λ_i ≈ Σ_a l_a l_aᵀ``, and ``h`` the mean of the curvature that is left

    M = h I ⊗ ΦᵀΦ/n + β + (1/n) Σ_a (l_a l_aᵀ) ⊗ (φ_a φ_aᵀ)

One root ``G Gᵀ = (h ΦᵀΦ/n + β)⁻¹`` serves all outputs. With ``φ̃_a = Gᵀ φ_a/√n`` and ``Ã`` the rows ``l_a ⊗ φ̃_a``

    M⁻¹ = G (I − Ãᵀ K⁻¹ Ã) Gᵀ,    K = I + Ã Ãᵀ,    K_ab = δ_ab + (l_aᵀ l_b) (φ̃_aᵀ φ̃_b)

so that ``K`` costs two small products, whatever the number of outputs.

Where many rows are in doubt, this is not enough. `BlockCurvature` has the Hessian's block of each output instead, as it
is, and nothing between outputs. Forming it costs as much as ``d/2`` products.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexhead.program.heads.base import Data
from convexhead.program.linear_passes import LinearPasses, Weights
from convexhead.program.moments import MANY, Moments, factor
from convexhead.program.sample_losses import SampleLosses

MOST_DIRECTIONS = 512
"""Largest ``m``. Chosen by hand: ``K`` is factored in float64, and more of them save few products."""
OF_A_ROW = 3
"""Directions of one row of outputs that are looked at. Chosen by hand: doubt is between few classes."""
ORDINARY = 10.0
"""Largest ``c d ‖l‖² / Σ_i tr Λ_i``, about what a direction adds to ``K_aa``, with which ``m = 0``. Chosen by hand: so
few products are needed there that the directions do not pay."""
MOST_IN_BLOCKS = 1 << 24
"""Largest size ``c (d + 1)²`` of blocks. Chosen by hand: 64 MB in float32."""
FLOOR = 10.0
"""Smallest eigenvalue of ``I − ÃᵀK⁻¹Ã``, in units of rounding. Derived: products leave it positive."""


class LinearCurvature:
    """``M`` at outputs ``f``.

    Parameters
    ----------
    passes : LinearPasses
    moments : Moments
        ``ΦᵀΦ / (n r)``, or its diagonal, which is then all that ``G`` knows.
    f : Tensor (n, r, c)
    beta : float

    Attributes
    ----------
    spread : float
        The largest ``K_aa``: about the condition number of the Hessian.
    mean : float
        The mean of all curvature, which an intercept's own is about.
    """

    def __init__(self, passes: LinearPasses, moments: Moments, f: Float[Tensor, "n r c"], beta: float) -> None:
        problem = passes.problem
        rows, c = problem.n * problem.head.r, problem.c
        rank, size = problem.ranks.rank, problem.ranks.size
        m = min(rows // 2, c * (passes.d + 1) // 2, MOST_DIRECTIONS)
        first, stop = m * rank // size, m * (rank + 1) // size  # those of this process
        total, directions, index = _most_in_doubt(passes, f, stop - first)
        sizes = directions.square().sum(1, dtype=torch.float64)
        (largest,) = problem.ranks.largest(float(sizes[:1].sum()))
        whole, taken = map(float, problem.sum(sizes.new_tensor(total), sizes.sum()))
        if largest * (passes.d + 1) * c <= ORDINARY * whole:
            m, taken = 0, 0.0
        h = problem.head.r * max(whole - taken, 0.0) / (c * rows)
        self.mean = problem.head.r * whole / (c * rows)
        self._root = moments.root(h, beta, problem.dtype, many=problem.operator.samples.problems >= MANY)
        self._L: Tensor | None = None
        self.spread = 1.0
        if m:
            here = slice(first, first + len(index))
            L, phi = f.new_zeros(m, c), f.new_zeros(m, passes.d + 1)
            L[here] = directions / problem.n**0.5
            passes.take(index, into=phi[here])
            L, phi = problem.sum(L, phi)
            self._phi = self._root.half(phi.T)
            # Of the numbers that `solve` multiplies by, so that M is positive definite however they are rounded.
            phi, L64 = self._phi.double(), L.double()
            K = (L64 @ L64.T).mul_(phi.T @ phi)
            K.diagonal().add_(1.0)
            self.spread = float(K.diagonal().max())
            self._K, failed = torch.linalg.cholesky_ex(K)
            if not failed and bool(self._phi.isfinite().all()):
                self._L = L

    def solve(self, r: Weights) -> Weights:
        """``M⁻¹ r``."""
        u = self._root.half(r.T)
        if self._L is not None:
            inside = ((self._phi.T @ u) * self._L).sum(1, keepdim=True)
            inside = torch.cholesky_solve(inside.double(), self._K).to(u.dtype)
            u = torch.addmm(u, self._phi, self._L * inside, alpha=FLOOR * torch.finfo(u.dtype).eps - 1)
        return self._root.whole(u).T


class BlockCurvature:
    """The Hessian's blocks ``(1/n) Σ_i Λ_ikk φ_i φ_iᵀ + β`` of the outputs ``k``, at outputs ``f``.

    Parameters and attributes are those of `LinearCurvature`; the condition number is taken to be large.
    """

    spread = float("inf")

    def __init__(self, passes: LinearPasses, f: Float[Tensor, "n r c"], beta: float) -> None:
        problem, d1 = passes.problem, passes.d + 1
        blocks = torch.zeros(problem.c, d1, d1, dtype=f.dtype, device=f.device)

        def add(rows: slice, data: Data) -> tuple[Tensor, ...]:
            X = data["queries"].flatten(0, 1)
            X = torch.cat([X, torch.full_like(X[:, :1], float(problem.fit_intercept))], dim=1)
            weights = problem.losses.at(rows).curvature(f[rows]).clamp_min(0).flatten(0, 1)
            return (torch.stack([(X * weight.unsqueeze(1)).T @ X for weight in weights.unbind(1)]),)

        problem.operator.over_batches(1, add, blocks)
        (self._inverse,) = problem.sum(blocks)
        self.mean = float(self._inverse[:, -1, -1].mean()) / problem.n
        for block in self._inverse:
            root = factor(block.double() / problem.n, beta, intercept=problem.fit_intercept)
            block.copy_(torch.cholesky_inverse(root))

    @staticmethod
    def pays(passes: LinearPasses, products: int) -> bool:
        """Whether to form them for a problem that has needed so many products for one system."""
        return products > passes.d / 2 and passes.problem.c * (passes.d + 1) ** 2 <= MOST_IN_BLOCKS

    def solve(self, r: Weights) -> Weights:
        """``M⁻¹ r``."""
        return torch.bmm(self._inverse, r.unsqueeze(2)).squeeze(2)


def _most_in_doubt(
    passes: LinearPasses, f: Float[Tensor, "n r c"], m: int
) -> tuple[float, Float[Tensor, "q c"], Int[Tensor, " q"]]:
    """The trace of all ``Λ_i``, the ``m`` largest directions, or all there are, and their rows, in this process."""
    total, r = 0.0, f.shape[1]
    directions, index = f.new_zeros(0, f.shape[2]), torch.zeros(0, dtype=torch.int64, device=f.device)
    for part in passes.problem.rows:
        losses, here = passes.problem.losses.at(part), f[part]
        curvature = losses.curvature(here).clamp_min(0)  # a loss by automatic differentiation may round below
        total += float(curvature.sum(dtype=torch.float64))
        if passes.problem.loss.separates == "entries":
            size, entry = curvature.reshape(-1).topk(min(m, curvature.numel()))
            row, found = entry // f.shape[2], f.new_zeros(len(entry), f.shape[2])
            found.scatter_(1, (entry % f.shape[2]).unsqueeze(1), size.sqrt().unsqueeze(1))
        else:
            split = torch.stack(_split(losses, here, curvature)).flatten(1, 2)
            size, which = split.square().sum(2).flatten().topk(min(m, split[..., 0].numel()))
            row, found = which % split.shape[1], split.flatten(0, 1)[which]
        directions, index = torch.cat([directions, found]), torch.cat([index, row + part.start * r])
        kept = directions.square().sum(1).topk(min(m, len(index))).indices
        directions, index = directions[kept], index[kept]
    return total, directions, index


def _split(losses: SampleLosses, f: Float[Tensor, "b r c"], curvature: Float[Tensor, "b r c"]) -> list[Tensor]:
    """Columns ``l`` of a Cholesky factor of every ``Λ_i``, the largest of its diagonal first."""
    found: list[Tensor] = []
    left = curvature
    for _ in range(min(OF_A_ROW, f.shape[2])):
        most, k = left.max(2, keepdim=True)
        column = losses.hessian_times(f, torch.zeros_like(f).scatter_(2, k, 1.0))
        for before in found:
            column = column - before * before.gather(2, k)
        column = torch.where(most > 0, column / most.clamp_min(torch.finfo(f.dtype).tiny).sqrt(), 0.0)
        left = (left - column.square()).clamp_min(0)
        found.append(column)
    return found
