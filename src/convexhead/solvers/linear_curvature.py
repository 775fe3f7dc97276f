"""The Hessian of the linear head, near enough to precondition conjugate gradients.

Of output ``k`` the Hessian's block is ``H_k = (1/n) Σ_i w_ik φ_i φ_iᵀ + β``, with ``w_ik`` the loss's second derivative
and ``φ_i = (x_i, 1)``. Most of ``w`` is small and about alike; a few samples of every output, those that it is in doubt
about, have much of it. So with ``S_k`` the ``m`` samples of largest ``w_ik`` and ``h`` the mean of all others

    M_k = h ΦᵀΦ/n + β + A_kᵀ A_k,    A_k the rows √(w_ik/n) φ_i, i ∈ S_k

One factor ``L Lᵀ = h ΦᵀΦ/n + β`` serves all outputs, and with ``Ã_k = A_k L⁻ᵀ``

    M_k⁻¹ = L⁻ᵀ (I − E_kᵀ E_k) L⁻¹,    E_k = C_k⁻¹ Ã_k,    C_k C_kᵀ = I + Ã_k Ã_kᵀ
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.solvers.linear_passes import LinearPasses, Weights

MOST_SAMPLES = 128
"""Largest ``m``. Chosen by hand: they are kept beside the features, and more of them save few products."""
AT_ONCE = 10
"""Outputs whose samples are factored together. Chosen by hand: little memory beside that of all."""
FLOOR = 1e-5
"""Smallest eigenvalue of ``I − EᵀE``. Derived: products in float32 leave it positive."""


class LinearCurvature:
    """``M`` at outputs ``f``.

    Parameters
    ----------
    passes : LinearPasses
    moments : Tensor (d + 1, d + 1) or (d + 1,)
        ``ΦᵀΦ / (n r)``, or its diagonal, which is then all that ``M`` has.
    f : Tensor (n, r, c)
    beta : float
    in_doubt : bool
        Whether samples in doubt count one by one; else ``m = 0``.
    """

    def __init__(
        self, passes: LinearPasses, moments: Tensor, f: Float[Tensor, "n r c"], beta: float, *, in_doubt: bool
    ) -> None:
        problem = passes.problem
        rows, c = problem.n * problem.head.r, problem.c
        w = torch.empty_like(f)
        for part in problem.rows:
            w[part] = problem.losses.at(part).curvature(f[part])
        w = w.flatten(0, 1)
        m = min(rows // c, 3 * passes.d // 4, MOST_SAMPLES) if in_doubt and moments.ndim == 2 else 0
        rank, size = problem.ranks.rank, problem.ranks.size
        first, stop = m * rank // size, m * (rank + 1) // size  # of each output, those of this process
        largest, index = w.topk(min(stop - first, len(w)), dim=0)
        total = problem.sum(w.sum(dtype=torch.float64) - largest.sum(dtype=torch.float64))[0]
        h = problem.head.r * float(total) / (c * max(rows - m, 1))
        self._root = _factor(h, moments, beta, problem.fit_intercept).to(problem.dtype)
        self.E: Tensor | None = None
        if m:
            samples = w.new_zeros(c, m, passes.d + 1)
            passes.take(index.T, into=samples[:, first : first + len(index)])
            samples[:, first : first + len(index)] *= (largest.T / problem.n).sqrt().unsqueeze(2)
            (self.E,) = problem.sum(samples)
            for of_output in self.E.split(AT_ONCE):
                of_output.copy_(self._in_doubt(of_output))

    def solve(self, r: Weights) -> Weights:
        """``M⁻¹ r``."""
        if self._root.ndim == 1:
            return r / self._root
        if self.E is None:
            return torch.cholesky_solve(r.T, self._root).T
        u = torch.linalg.solve_triangular(self._root, r.T, upper=False).T
        inside = torch.bmm(self.E, u.unsqueeze(2))
        u = u - (1 - FLOOR) * torch.bmm(self.E.mT, inside).squeeze(2)
        return torch.linalg.solve_triangular(self._root.T, u.T, upper=True).T

    def _in_doubt(self, A: Float[Tensor, "c m d1"]) -> Float[Tensor, "c m d1"]:
        """``E``, in float64 where matrices are small."""
        A = torch.linalg.solve_triangular(self._root, A.flatten(0, 1).T, upper=False).T.reshape(A.shape)
        K = torch.bmm(A, A.mT).double()
        K.diagonal(dim1=1, dim2=2).add_(1.0)
        C, failed = torch.linalg.cholesky_ex(K)
        E = torch.linalg.solve_triangular(C.to(A.dtype), A, upper=False)
        usable = (failed == 0) & E.isfinite().all(2).all(1)
        return torch.where(usable[:, None, None], E, 0.0)


def _factor(h: float, moments: Tensor, beta: float, fit_intercept: bool) -> Tensor:
    """``L`` in float64; of a diagonal the diagonal itself."""
    A = (h if 0 <= h < float("inf") else 0.0) * moments
    diagonal = A if A.ndim == 1 else A.diagonal()
    diagonal[:-1] += beta
    if fit_intercept:  # it has no β: a little of both, or there may be no factor
        diagonal[-1] += 1e-6 * (float(diagonal[-1]) + beta)
    else:
        if A.ndim == 2:
            A[-1], A[:, -1] = 0.0, 0.0
        diagonal[-1] = 1.0
    if A.ndim == 1:
        return A
    L, failed = torch.linalg.cholesky_ex(A)
    while failed and bool(A.isfinite().all()):
        diagonal += 1e-6 * diagonal.max()
        L, failed = torch.linalg.cholesky_ex(A)
    return L
