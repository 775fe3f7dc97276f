"""Second moments of the linear head's features, and roots of what a Hessian of them is about.

    S = ΦᵀΦ / (n r),    M = h S + β,    G Gᵀ = M⁻¹

with ``h`` the mean curvature. ``M`` is another one at every ``β`` and every model, ``S`` is not. One root is that of a
Cholesky factor ``L Lᵀ = M``: ``G = L⁻ᵀ``. The other is made of the eigenvectors ``Q`` of the features' covariance ``C``
and of their mean ``m``, once for all ``M``:

    G = E D^(−1/2),    E = ⎡  Q    0 ⎤,    D = h diag(C's eigenvalues, 1) + β,  without β for the intercept
                           ⎣ −mᵀQ  1 ⎦

The eigenvectors cost as much as some fifteen factors, and products with ``E`` are twice as fast as solves with ``L``.
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

NUDGE = 1e-6
"""What the intercept, which has no β, gets in units of its curvature and of β. Chosen by hand: there must be a root."""
MANY = 20
"""Problems with the same features from which eigenvectors pay. Derived: a path takes a factor or less for each."""


class Triangular:
    """A root ``G = L⁻ᵀ``, for ``L (d + 1, d + 1)``."""

    def __init__(self, L: Float[Tensor, "d1 d1"]) -> None:
        self.L = L

    def half(self, r: Float[Tensor, "d1 m"]) -> Float[Tensor, "d1 m"]:
        """``Gᵀ r = L⁻¹ r``."""
        return torch.linalg.solve_triangular(self.L, r, upper=False)

    def whole(self, u: Float[Tensor, "d1 m"]) -> Float[Tensor, "d1 m"]:
        """``G u = L⁻ᵀ u``."""
        return torch.linalg.solve_triangular(self.L.T, u, upper=True)


class InBasis:
    """A root ``G = E diag(1 / scale)``, where ``E`` is the identity if it is None; ``scale (d + 1, 1)``."""

    def __init__(self, E: Float[Tensor, "d1 d1"] | None, scale: Float[Tensor, "d1 1"]) -> None:
        self.E, self.scale = E, scale

    def half(self, r: Float[Tensor, "d1 m"]) -> Float[Tensor, "d1 m"]:
        """``Gᵀ r = Eᵀ r / scale``."""
        return (r if self.E is None else self.E.T @ r) / self.scale

    def whole(self, u: Float[Tensor, "d1 m"]) -> Float[Tensor, "d1 m"]:
        """``G u = E (u / scale)``."""
        u = u / self.scale
        return u if self.E is None else self.E @ u


class Moments:
    """``S`` of some features.

    Parameters
    ----------
    second : Tensor (d + 1, d + 1) or (d + 1,)
        ``S``, or its diagonal, in float64.
    intercept : bool
        Whether there is one; else its rows of ``M`` are those of the identity.

    Attributes
    ----------
    squares : float
        The mean of ``‖x‖²``.
    of_mean : float
        ``‖m‖²``; of a diagonal the most that it can be.
    """

    def __init__(self, second: Tensor, *, intercept: bool) -> None:
        self.second, self.intercept = second, intercept
        self._in: dict[torch.dtype, Tensor] = {}
        whole = second.ndim == 2
        self.squares = float((second.diagonal() if whole else second)[:-1].sum())
        self.of_mean = float(second[-1, :-1].square().sum()) if whole else self.squares

    def root(self, h: float, beta: float, dtype: torch.dtype, *, many: bool) -> Triangular | InBasis:
        """``G`` for curvature ``h``; ``many``: whether as many as `MANY` problems have these features."""
        h = h if h < float("inf") else 0.0
        if self.second.ndim == 2 and not many:
            return Triangular(factor(h * self.second, beta, intercept=self.intercept).to(dtype))
        D = h * (self.second if self.second.ndim == 1 else self._eigen[0])
        with_penalty(D, beta, intercept=self.intercept)
        return InBasis(None if self.second.ndim == 1 else self._basis(dtype), D.sqrt().to(dtype).unsqueeze(1))

    def _basis(self, dtype: torch.dtype) -> Float[Tensor, "d1 d1"]:
        """``E``."""
        if dtype not in self._in:
            self._in[dtype] = self._eigen[1].to(dtype)
        return self._in[dtype]

    @cached_property
    def _eigen(self) -> tuple[Float[Tensor, " d1"], Float[Tensor, "d1 d1"]]:
        """Eigenvalues of the covariance, and a 1 for the intercept; ``E``."""
        m = self.second[-1, :-1] if self.intercept else torch.zeros_like(self.second[-1, :-1])
        values, Q = torch.linalg.eigh(self.second[:-1, :-1] - torch.outer(m, m))
        E = torch.zeros_like(self.second)
        E[:-1, :-1], E[-1, :-1], E[-1, -1] = Q, -(m @ Q), 1.0
        return torch.cat([values.clamp_min(0), torch.ones_like(values[:1])]), E


def with_penalty(diagonal: Float[Tensor, " d1"], beta: float, *, intercept: bool) -> None:
    """Add β to a diagonal in place, but for the intercept's, which becomes 1 where there is none."""
    diagonal[:-1] += beta
    diagonal[-1] = diagonal[-1] + NUDGE * (float(diagonal[-1]) + beta) if intercept else 1.0


def factor(A: Float[Tensor, "d1 d1"], beta: float, *, intercept: bool) -> Float[Tensor, "d1 d1"]:
    """``L`` with ``L Lᵀ = A + β`` in float64, of an ``A`` that is used up."""
    if not intercept:
        A[-1], A[:, -1] = 0.0, 0.0
    with_penalty(diagonal := A.diagonal(), beta, intercept=intercept)
    L, failed = torch.linalg.cholesky_ex(A)
    while failed and bool(A.isfinite().all()):
        diagonal += 1e-6 * diagonal.max()
        L, failed = torch.linalg.cholesky_ex(A)
    return L
