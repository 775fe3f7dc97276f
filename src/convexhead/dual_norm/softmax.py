"""What softmax queries read under a residual, and a bound on it over a box of queries.

    M(z) = Σ_i φ_z(X_i) R_iᵀ  (d, c),      φ_z(X) = Xᵀ w,      w = softmax(X E z + π)

On the box ``z₀ + Σ_a ε_a F_a``, ``|ε_a| ≤ 1``, let ``w`` be the weights at ``z₀``, ``x'_p = x_p − Σ_q w_q x_q`` a token
less what is read at ``z₀``, and ``t_pa`` the change of its score along side ``a``, less the same mean. With
``t_p = Σ_a ε_a t_pa`` and averages ``⟨·⟩`` by ``w``,

    φ = φ_{z₀} + N/D,     N = ⟨x' e^t⟩,     D = ⟨e^t⟩ = 1 + ⟨e^t − 1 − t⟩ ≥ 1

and the parts of first and second order are ``⟨x' t⟩ + ½⟨x' t²⟩``: third central moments are second derivatives of a
softmax. What is left is at most, for each sample,

    ⟨‖x'‖ g₃(|t|)⟩ + ⟨‖x'‖ g₁(|t|)⟩ (1 − 1/(1 + ⟨g₂(|t|)⟩)),     g_m(t) = e^t − Σ_{j<m} tʲ/j!                      (2)

Each average is convex in ``ε``, hence largest at a corner of the box. Where tokens compete and the box is large, the
expansion is useless, and the sample keeps its value at ``z₀`` only, up to

    max_ε Σ_p w_p e^{t_p} ‖x'_p‖ / Σ_p w_p e^{t_p}                                                                  (0)

with scores anywhere in their intervals ``|t_p| ≤ τ_p``. At the maximum ``λ`` the terms ``w_p e^{t_p} (‖x'_p‖ − λ)`` are
each as large as they can be: ``t_p = τ_p`` where ``‖x'_p‖ > λ`` and ``−τ_p`` elsewhere. So it is the best of ``s``
thresholds in the sorted ``‖x'_p‖``. Each sample takes the smaller of (0) and (2).

Summed over samples that expand, ``M = A + Σ_a ε_a A_a + ½ Σ_ab ε_a ε_b A_ab`` up to what is left. With
``ε_a² = ½ + ½ η_a``, ``|η_a| ≤ 1``, and since a norm is convex,

    ‖M‖ ≤ max_{ε = ±1} ‖A + ¼ Σ_a A_aa + Σ_a ε_a A_a‖ + ¼ Σ_a ‖A_aa‖ + Σ_{a<b} ‖A_ab‖ + rest

The rest is a sum ``Σ_i p_i R_iᵀ`` with ``‖p_i‖ ≤ ρ_i``. It is at most ``Σ_i ‖R_i‖ ρ_i`` and, as a product of matrices,
at most ``‖diag(‖R_i‖^{−½}) R‖₂ (Σ_i ‖R_i‖ ρ_i²)^{½}``: residuals that point to different classes cannot all add up.

Rounding only ever raises a bound. Scores are computed to within ``η_i``, which changes weights by ``e^{±2η_i}``; sums
lose ``K u`` of the sum of absolute values. Tokens and residuals are scaled by powers of 2 first, so that squares stay
in the range of float64.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.program.patterns import EPSILON

ROUNDING = 1e-9
"""Relative amount by which a norm is raised to cover rounding in its decomposition. Derived: ``u`` times the order of
a matrix, squared."""
NUMBERS = 4_000_000
"""Float64 numbers of workspace that a batch of boxes may take. Chosen by hand: 32 MB."""
LEAST = 1e-290
"""Weight that a token has at least, relative to the largest: what underflows is not lost."""


@dataclass(frozen=True)
class Reads:
    """Tokens and residuals of one map of positions, scaled; build it by `of`.

    Attributes
    ----------
    X : Tensor (n, s, d)
        Tokens less the mean of their sample; zero where masked.
    T : Tensor (n, s, k)
        Keys ``X E``.
    log_weights : Tensor (n, s)
        ``π``; −∞ where masked.
    R : Tensor (n, c)
    r : Tensor (n,)
        ``‖R_i‖``.
    sizes : Tensor (n,)
        The largest ``‖x_p‖`` of a sample.
    constant : Tensor (d, c)
        ``Σ_i m_i R_iᵀ`` of the means ``m_i``.
    rho : float
        The ball's radius.
    scale : float
        By which every norm is to be multiplied.
    unit : float
        By which every ``z`` is to be multiplied.
    neglected : float
        What rounding may have lost of ``M(z)``, for any ``z`` of the ball; scaled.
    spectral : float
        ``‖diag(‖R_i‖^{−½}) R‖₂``.
    lost : float
        ``K u``.
    """

    X: Float[Tensor, "n s d"]
    T: Float[Tensor, "n s k"]
    log_weights: Float[Tensor, "n s"]
    R: Float[Tensor, "n c"]
    r: Float[Tensor, " n"]
    sizes: Float[Tensor, " n"]
    constant: Float[Tensor, "d c"]
    rho: float
    scale: float
    unit: float
    neglected: float
    spectral: float
    lost: float

    @classmethod
    def of(
        cls,
        X: Float[Tensor, "n s d"],
        R: Float[Tensor, "n c"],
        E: Float[Tensor, "d k"],
        rho: float,
        log_weights: Float[Tensor, "#n s"] | None = None,
    ) -> Reads:
        """Prepare tokens and residuals.

        Parameters
        ----------
        X, R : Tensor (n, s, d), (n, c)
        E : Tensor (d, k)
            Queries are ``E z``; any matrix.
        rho : float
            ``‖z‖ ≤ rho``.
        log_weights : Tensor (n, s) or (1, s), or None
            ``π``: −∞ takes a token out; a sample keeps at least one.
        """
        X, R, E = X.double(), R.double(), E.double()
        n, s, d = X.shape
        pi = X.new_zeros(1, s) if log_weights is None else log_weights.double()
        pi = pi.expand(n, s)
        there = pi > -math.inf
        X = torch.where(there.unsqueeze(2), X, 0.0)
        unit, scale = _power_of_two(X), _power_of_two(R)
        X, R, rho = X / unit, R / scale, rho * unit
        means = X.sum(1) / there.sum(1, keepdim=True)
        sizes = X.norm(dim=2).amax(1)
        X = torch.where(there.unsqueeze(2), X - means.unsqueeze(1), 0.0)
        spread = X.norm(dim=2).amax(1) * (1 + ROUNDING)
        r = R.norm(dim=1)
        key = float(torch.linalg.matrix_norm(E, 2)) * (1 + ROUNDING)
        largest = torch.where(there, pi.abs(), 0.0).amax(1)
        k = E.shape[1]
        eta = EPSILON * (2 * (d + 4 * k + 40) * rho * key * spread + 8 * largest)
        lost = EPSILON * (n + s + d + 2 * R.shape[1] + 64)
        per_sample = spread * (2 * torch.expm1(2 * eta)).clamp_max(2.0) + lost * (spread + 2 * sizes)
        root = r.sqrt().clamp_min(torch.finfo(r.dtype).tiny)
        return cls(
            X=X,
            T=X @ E,
            log_weights=pi,
            R=R,
            constant=means.T @ R,
            rho=rho,
            scale=scale * unit,
            unit=1 / unit,
            neglected=float((r * per_sample).sum()) * (1 + ROUNDING),
            sizes=spread,
            r=r,
            spectral=float(torch.linalg.matrix_norm(R / root.unsqueeze(1), 2)) * (1 + ROUNDING),
            lost=lost,
        )

    @property
    def k(self) -> int:
        """Dimension of ``z``."""
        return self.T.shape[2]

    def weights(self, z: Float[Tensor, "b k"]) -> Float[Tensor, "n b s"]:
        """``log w``."""
        scores = torch.einsum("nsk,bk->nbs", self.T, z) + self.log_weights.unsqueeze(1)
        return scores.log_softmax(2)

    def _sum(self, w: Float[Tensor, "n b s"]) -> Float[Tensor, "b d c"]:
        """``Σ_i Σ_p w_ip x_ip R_iᵀ``."""
        read = w @ self.X
        return (read.permute(1, 2, 0).reshape(-1, len(self.R)) @ self.R).view(w.shape[1], self.X.shape[2], -1)

    def batch(self) -> int:
        """Boxes that fit into the workspace."""
        n, s, d = self.X.shape
        quadratic = (self.k + 1) * (self.k + 2) // 2
        each = n * (s * (6 + self.k) + d * quadratic) + quadratic * d * self.R.shape[1]
        return max(1, NUMBERS // each)

    def value_and_slope(self, z: Float[Tensor, "b k"]) -> tuple[Float[Tensor, " b"], Float[Tensor, "b k"]]:
        """``‖M(z)‖₂`` and its gradient, scaled, for a few ``z``."""
        w = self.weights(z).exp()
        M = self._sum(w) + self.constant
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        y = torch.einsum("nsd,bd->nbs", self.X, U[:, :, 0])
        y = w * (y - (w * y).sum(2, keepdim=True)) * (self.R @ Vh[:, 0].T).unsqueeze(2)
        return S[:, 0], torch.einsum("nbs,nsk->bk", y, self.T)

    def bound(
        self, z0: Float[Tensor, "b k"], F: Float[Tensor, "b k k"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """``‖M(z₀)‖₂``, and a bound on ``‖M‖₂`` over boxes ``z₀ + Σ_a ε_a F_a``, scaled.

        Rounding is charged but for `neglected`.
        """
        log_w = self.weights(z0)
        w = log_w.exp()
        read = w @ self.X  # (n, b, d)
        k, X = self.k, self.X
        away = X.square().sum(2).unsqueeze(1) - 2 * (read @ X.transpose(1, 2)) + read.square().sum(2, keepdim=True)
        size = self.sizes.view(-1, 1, 1)
        g = (away.clamp_min(0) + 8 * self.lost * size.square()).sqrt()  # ‖x'‖
        t = torch.einsum("nsk,bak->anbs", self.T, F)
        t = t - (w * t).sum(3, keepdim=True)
        g = torch.where(self.log_weights.unsqueeze(1) > -math.inf, g, 0.0)
        constant, expanded = _by_thresholds(g, log_w, t.abs().sum(0)), self._beyond_second_order(g, log_w, t)
        # Rounding of the coefficients below, whose slopes may be large where weights are small.
        theta = 2 * self.T.norm(dim=2).amax(1).unsqueeze(1) * F.norm(dim=2).sum(1)
        expanded = expanded + self.lost * self.sizes.unsqueeze(1) * (3 * theta + 5 * theta.square())
        expands = expanded < constant
        rest = torch.where(expands, expanded, constant)
        A = self._sum(w) + self.constant
        values = spectral_norm(A)
        v = w * expands.unsqueeze(2)
        slopes = torch.stack([self._sum(v * t[a]) for a in range(k)], 1)  # (b, k, d, c)
        bent = A.new_zeros(len(z0))
        for a, b in itertools.combinations_with_replacement(range(k), 2):
            both = t[a] * t[b]
            A_ab = self._sum(v * (both - (w * both).sum(2, keepdim=True)))
            if a == b:
                A = A + A_ab / 4
            bent = bent + spectral_norm(A_ab) * (0.25 if a == b else 1.0)
        signs = A.new_tensor(list(itertools.product((1.0, -1.0), repeat=k)))
        corners = A.unsqueeze(1) + torch.einsum("va,badc->bvdc", signs, slopes)
        left = (rest * self.r.unsqueeze(1)).sum(0)
        left = torch.minimum(left, self.spectral * (self.r.unsqueeze(1) * rest.square()).sum(0).sqrt())
        return values, (spectral_norm(corners).amax(1) + bent + left) * (1 + ROUNDING)

    def _beyond_second_order(
        self, g: Float[Tensor, "n b s"], log_w: Float[Tensor, "n b s"], t: Float[Tensor, "k n b s"]
    ) -> Float[Tensor, "n b"]:
        """(2) of the module's text."""
        third = first = second = g.new_zeros(())
        for signs in itertools.product((1.0, -1.0), repeat=self.k - 1):
            along = t[0] + sum((sign * t[a + 1] for a, sign in enumerate(signs)), 0.0)
            tau = along.abs()
            u = (log_w + tau).exp()
            g1, g2, g3 = _rests(tau)
            third = torch.maximum(third, (u * g * g3).sum(2))
            first = torch.maximum(first, (u * g * g1).sum(2))
            second = torch.maximum(second, (u * g2).sum(2))
        return (third + first * (second / (1 + second)).nan_to_num(nan=1.0)).nan_to_num(nan=math.inf)


def _rests(tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``e^{−τ} g_m(τ)`` for ``m = 1, 2, 3``, or a little more."""
    e = (-tau).exp()
    g1 = -torch.expm1(-tau)
    # Near 0 differences cancel: g_m ≤ τ^m/m! (1 + τ/(m + 1) e^τ).
    near = tau < 0.5
    g2 = torch.where(near, tau.square() / 2 * (e + tau / 3), 1 - e * (1 + tau))
    g3 = torch.where(near, tau.pow(3) / 6 * (e + tau / 4), 1 - e * (1 + tau + tau.square() / 2))
    return g1, g2, g3


def _by_thresholds(
    g: Float[Tensor, "n b s"], log_w: Float[Tensor, "n b s"], tau: Float[Tensor, "n b s"]
) -> Float[Tensor, "n b"]:
    """(0) of the module's text."""
    top = (log_w + tau).amax(2, keepdim=True)
    least = torch.where(log_w > -math.inf, LEAST, 0.0)
    high = torch.maximum((log_w + tau - top).exp(), least)
    low = (log_w - tau - top).exp()
    g, order = g.sort(2, descending=True)
    high, low = high.gather(2, order), low.gather(2, order)
    # Threshold after the j-th: its token and those before have their highest weights, those after their lowest.
    above, below = high.cumsum(2), low.flip(2).cumsum(2).flip(2) - low
    number = (high * g).cumsum(2) + ((low * g).flip(2).cumsum(2).flip(2) - low * g)
    best = (number / (above + below.clamp_min(0))).amax(2)
    return torch.fmin(best * (1 + ROUNDING), g[:, :, 0])


def spectral_norm(A: Float[Tensor, "*b d c"]) -> Float[Tensor, "*b"]:
    """The largest singular value, from the smaller Gram matrix; infinite where it is no number."""
    if A.shape[-2] < A.shape[-1]:
        A = A.transpose(-2, -1)
    gram = A.transpose(-2, -1) @ A
    finite = gram.isfinite().flatten(-2).all(-1)
    if not bool(finite.all()):
        gram = torch.where(finite[..., None, None], gram, 0.0)
    top = torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0).sqrt()
    return torch.where(finite, top, math.inf)


def _power_of_two(x: Tensor) -> float:
    """A power of 2 near the largest entry; 1 where all are 0."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    return 2.0 ** math.frexp(largest)[1] if largest > 0 else 1.0
