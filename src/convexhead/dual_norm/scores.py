"""The scores of a small problem written out: every pre-activation as a linear function of the mixing weights.

With ``K`` the rows of pre-activations (`patterns.preactivation_rows`) and ``C (N, e·c)`` what each activated score is
worth under the residuals ``R``,

    Σ_i (P mix(X_i, u))ᵀ R_i = Σ_ρ C_ρ max(K_ρ u, 0)                     (e·c,)

Parallel rows are one hyperplane ``k_h`` (unit, `patterns.hyperplanes`). Those that point the other way are turned round
by ``max(−t, 0) = max(t, 0) − t``, which leaves a linear part:

    Σ_ρ C_ρ max(K_ρ u, 0) = Lᵀ u + Σ_h c_h max(k_hᵀ u, 0) + δ(u)

Mixing directions that no row sees, and those that a head can do without (`Head.mixing_span`), are dropped:
``u = wᵀ basis``. Rows are parallel, and directions unseen, up to rounding only: where ``e_ρ`` is what a row loses,

    ‖δ(u)‖ ≤ Σ_ρ (‖e_ρ‖ + γ ‖K_ρ‖) ‖C_ρ‖      for unit u,

as a ReLU is 1-Lipschitz. ``γ`` covers the rounding of all sums over rows and directions, in any order. Rows keep their
own scale: directions are sought among *unit* rows, so that one large row hides none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexhead.program.operator import Operator
from convexhead.program.patterns import EPSILON, hyperplanes_of, preactivation_rows
from convexhead.runtime.stored_tokens import AllTokens

TINY = torch.finfo(torch.float64).tiny
UNDERFLOW = 2 * math.sqrt(TINY)
"""Error of a norm by entries whose squares underflow, for each root of their number. Derived."""


@dataclass(frozen=True)
class Scores:
    """The scores of one channel group.

    Attributes
    ----------
    group : int
        The channel group, which is the block of a ReLU atom.
    basis : Tensor (w, p)
        Orthonormal rows that span the directions seen by the data.
    spread : Tensor (w,)
        How strongly it sees each: singular values of the rows scaled to unit norm.
    planes : Tensor (h, w)
        Distinct hyperplanes as unit rows, in these coordinates.
    plane : Tensor (N,)
        The hyperplane of each row; rows that vanish have scale 0.
    scale : Tensor (N,)
        ``K_ρ ≈ scale_ρ · planes[plane_ρ]``.
    lost : Tensor (N,)
        ``‖e_ρ‖ + γ ‖K_ρ‖``: by how much a row's activation may differ from that of its plane, rounding included.
    """

    group: int
    basis: Float[Tensor, "w p"]
    spread: Float[Tensor, " w"]
    planes: Float[Tensor, "h w"]
    plane: Int[Tensor, " N"]
    scale: Float[Tensor, " N"]
    lost: Float[Tensor, " N"]

    @property
    def dimension(self) -> int:
        """``w``, the mixing dimension that the data sees."""
        return len(self.basis)

    def weights(self, operator: Operator, R: Float[Tensor, "n r c"]) -> Form:
        """Return the function of ``u`` whose largest norm on the sphere is the dual norm of ``R``."""
        C = score_weights(operator, R, self.group)
        scaled = C * self.scale.abs().unsqueeze(1)
        towards = (self.scale > 0).unsqueeze(1)
        c = scaled.new_zeros(len(self.planes), C.shape[1]).index_add_(0, self.plane, scaled)
        away = torch.zeros_like(c).index_add_(0, self.plane, scaled * ~towards)
        return Form(-self.planes.T @ away, self.planes, c, float(self.lost @ C.norm(dim=1)))


@dataclass(frozen=True)
class Form:
    """``g(u) = Lᵀ u + Σ_h c_h max(k_hᵀ u, 0)``.

    Attributes
    ----------
    L : Tensor (w, q)
    K : Tensor (h, w)
        Unit rows.
    c : Tensor (h, q)
    neglected : float
        Bound on the norm of ``δ(u)`` for unit ``u``: what was dropped, merged and rounded.
    """

    L: Float[Tensor, "w q"]
    K: Float[Tensor, "h w"]
    c: Float[Tensor, "h q"]
    neglected: float = 0.0

    @property
    def size(self) -> float:
        """``‖L‖ + Σ_h ‖c_h‖``, a Lipschitz constant."""
        return float(self.L.norm() + self.c.norm(dim=1).sum())

    def narrow(self) -> Form:
        """Return ``g`` in coordinates of the span of its values, where there are more values than rows.

        What a QR decomposition rounds is charged.
        """
        rows = torch.cat([self.L, self.c])
        m, q = rows.shape
        if q <= m or not bool(rows.isfinite().all()):
            return self
        T = torch.linalg.qr(rows.T, mode="r").R.T
        return Form(T[: len(self.L)], self.K, T[len(self.L) :], self.neglected + 4 * EPSILON * m * q * self.size)

    def __call__(self, u: Float[Tensor, "b w"]) -> Float[Tensor, "b q"]:
        return u @ self.L + (u @ self.K.T).clamp_min(0) @ self.c


def all_tokens(operator: Operator) -> AllTokens:
    """Return the tokens of all processes: for small problems, and for a few samples of large ones."""
    return AllTokens(operator.X, operator.ranks, operator.n)


def scores_of(operator: Operator) -> list[Scores]:
    """Return the scores of every channel group on all samples, those of other processes too, in float64."""
    found, X = [], all_tokens(operator)[:].double()
    for group in range(operator.head.n_groups):
        rows = preactivation_rows(operator.head, X, group)
        enough = operator.head.mixing_span()
        if enough is not None:
            rows = rows @ enough.to(rows).T
        basis, spread, planes, plane, scale, lost = _written_as_planes(rows)
        if enough is not None:
            basis = basis @ enough.to(rows)
        found.append(Scores(group, basis, spread, planes, plane, scale, lost))
    return found


def _written_as_planes(K: Float[Tensor, "N p"]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(basis, spread, planes, plane, scale, lost)`` as of `Scores`."""
    largest = math.frexp(float(K.abs().max()) if K.numel() else 0.0)[1] - 1
    K = torch.ldexp(K, torch.tensor(-largest))  # exact: squares must not leave float64
    size = K.norm(dim=1)
    _, sigma, span = torch.linalg.svd(K / size.clamp_min(TINY).unsqueeze(1), full_matrices=False)
    seen = sigma > EPSILON * max(K.shape) * sigma[:1]
    basis = span[seen]
    planes, plane, scale = hyperplanes_of(K @ basis.T)
    kept = scale.unsqueeze(1) * planes[plane] @ basis if len(planes) else torch.zeros_like(K)
    gamma = EPSILON * (len(K) / 2 + 2 * K.shape[1] + 16)
    underflow = UNDERFLOW * math.sqrt(K.shape[1]) * (K != 0).any(1).to(K)
    lost = (K - kept).norm(dim=1) + gamma * size + underflow
    scale, lost = (torch.ldexp(part, torch.tensor(largest)) for part in (scale, lost))
    return basis, sigma[seen], planes, plane, scale, lost


def score_weights(operator: Operator, R: Float[Tensor, "n r c"], group: int) -> Float[Tensor, "N q"]:
    """Return ``C (N, e·c)``: what a unit of each activated score adds to ``Σ_i (P mix(X_i, u))ᵀ R_i``."""
    head, e, c = operator.head, operator.head.value_rows, R.shape[-1]
    basis = torch.eye(e * c, dtype=torch.float64, device=operator.device).view(-1, e, c)
    block = torch.full((e * c,), group, device=operator.device)
    V = head.mask_values(basis, block)
    R = operator.ranks.join(R, operator.n)
    T = (R @ V.flatten(0, 1).T).unflatten(-1, V.shape[:2])
    data = head.prepare(all_tokens(operator)[:].double())
    return head.pool_rows_adjoint(head.read_adjoint(data, T)).movedim(1, -1).flatten(0, -2)
