"""MLP-Mixer (token mixing): tokens are mixed by learned weights that are the same for every sample.

    mix(X, U) = σ(U X)        U (s, s),  V (d, c)

The convex program lives on ``Z (s², d·c)``. With mean pooling and a linear activation only the mean row of ``U``
acts: one weight a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.program.heads.base import Data, GradientCost, Head, atoms_by_gate


class MLPMixer(Head):
    """``U (s, s)``, ``V (d, c)``; scores ``q = d``."""

    name = "mlp-mixer"

    def __init__(self, n_tokens: int, n_channels: int, **options: object) -> None:
        super().__init__(n_tokens, n_channels, **options)  # type: ignore[arg-type]
        self.mixing_shape = (self.s, self.s)
        self.value_rows = self.d

    @property
    def score_width(self) -> int:
        return self.d

    def mixing_span(self) -> Tensor | None:
        # Under a mean the rows of U do the same work: ‖Σ_p g(U_p)‖ ≤ Σ_p ‖U_p‖ max ‖g‖ is largest with equal rows.
        if self.pool != "mean":
            return None
        return torch.eye(self.s, dtype=torch.float64).repeat(1, self.s) / self.s**0.5

    def prepare_linear(self, X: Tensor, *, reuse: bool) -> Data:
        return self.prepare(X)

    def linear_mix(self, data: Data, U: Tensor, group: Tensor) -> Tensor:
        PU = self.pool_tokens(U)  # (k, r, s): pooling the rows of U is pooling the rows of U X
        M = PU.reshape(-1, self.s) @ data["X"]
        return M.view(M.shape[0], len(U), self.r, self.d).transpose(1, 2)

    def linear_mix_adjoint(self, data: Data, T: Tensor, group: Tensor) -> Tensor:
        PU = torch.einsum("brkd,btd->krt", T, data["X"])
        if self.pool == "mean":
            return (PU / self.s).expand(-1, self.s, -1)
        U = PU.new_zeros(len(PU), self.s, self.s)
        U[:, self.rows] = PU
        return U

    # E = I and K = X: a column of values needs s·d products to meet the tokens and s² to be mixed.
    def values_first(self, c: int) -> bool:
        return c < min(self.r, self.d)

    @property
    def terms(self) -> int:
        return max(self.s, self.d)

    def keys_times(self, data: Data, V: Tensor) -> Tensor:
        return (data["X"].flatten(0, 1) @ V).unflatten(0, data["X"].shape[:2])

    def keys_adjoint(self, data: Data, H: Tensor) -> Tensor:
        return data["X"].flatten(0, 1).T @ H.flatten(0, 1)

    def read_rows(self, data: Data, W: Tensor) -> Tensor:
        return W

    def read_rows_adjoint(self, data: Data, R: Tensor) -> Tensor:
        return R

    # All samples side by side, (s, b·d): one large product instead of one small one a sample.
    def preactivation(self, data: Data, U: Tensor, group: Tensor) -> Tensor:
        X = data["X"]
        A = U[:, self.rows].reshape(-1, self.s) @ X.transpose(0, 1).reshape(self.s, -1)
        return A.view(len(U), self.p, X.shape[0], self.d).permute(2, 0, 1, 3)

    def preactivation_adjoint(self, data: Data, A: Tensor, group: Tensor) -> Tensor:
        k = A.shape[1]
        U = A.new_zeros(k, self.s, self.s)
        side_by_side = A.permute(1, 2, 0, 3).reshape(k * self.p, -1)
        product = side_by_side @ data["X"].transpose(0, 1).reshape(self.s, -1).T
        U[:, self.rows] = product.view(k, self.p, self.s)
        return U

    # Gate by gate, so that what is masked is still in the cache.
    def gated_mix(self, data: Data, U: Tensor, group: Tensor, gated: Tensor, which: Tensor) -> Tensor:
        X = data["X"]
        M = X.new_empty(len(X), self.r, len(U), self.d)
        for D, mine in zip(gated.unbind(1), atoms_by_gate(which), strict=True):
            rows = U[mine, self.rows].reshape(-1, self.s)
            A = torch.bmm(rows.expand(len(X), -1, -1), X).view(len(X), len(mine), self.p, self.d)
            M[:, :, mine] = self.pool_rows(A * D.unsqueeze(1)).transpose(1, 2)
        return M

    def gated_mix_adjoint(self, data: Data, T: Tensor, group: Tensor, gated: Tensor, which: Tensor) -> Tensor:
        X = data["X"]
        U = T.new_zeros(T.shape[2], self.s, self.s)
        for D, mine in zip(gated.unbind(1), atoms_by_gate(which), strict=True):
            A = self.pool_rows_adjoint(T[:, :, mine].transpose(1, 2)) * D.unsqueeze(1)
            rows = _sum_of_products(A.flatten(1, 2), X)
            U[mine, self.rows] = rows.view(-1, self.p, self.s).to(U.dtype)
        return U

    def gated_workspace(self, k: int, gates: int) -> int:
        return (gates + math.ceil(k / gates)) * self.p * self.d + k * self.r * self.d

    # Entry (p, t; e, o) is Σ_i D_pe X_te R_o / s: for every channel e one product, which all gates share.
    # Masks are read once, in order: they may lie outside of the caches, and an eighth of them is counted.
    # With an output for every token and no gates it is Σ_i X_te R_po: one product.
    def gradient_cost(self, c: int, *, gates: int) -> GradientCost | None:
        if not gates and self.values_first(c):
            return GradientCost(self.s * self.d / (self.s + self.d), self.s * (self.d + c))
        return GradientCost(c, self.s * c + gates * self.p * self.d // 8) if gates and self.r == 1 else None

    def gradient(self, batches: Iterable[tuple[Data, Tensor]], group: Tensor) -> Tensor:
        total: Tensor | None = None
        for data, R in batches:
            X, R = data["X"].flatten(1), R.flatten(1)
            total = R.T @ X if total is None else total.addmm_(R.T, X)
        assert total is not None
        entries = total.view(self.s, -1, self.s, self.d).permute(0, 2, 3, 1)  # (p, t, e, o)
        return entries.flatten(2).flatten(0, 1).unsqueeze(0)

    def gated_gradient(self, batches: Iterable[tuple[Data, Tensor, Tensor]]) -> Tensor:
        total: Tensor | None = None
        for data, R, gated in batches:
            outputs = R[:, 0]
            masks = gated.permute(3, 1, 2, 0).contiguous().flatten(1, 2)  # (d, j·p, n)
            if total is None:
                total = R.new_zeros(*masks.shape[:2], self.s * R.shape[2])
            for of_channel, D, x in zip(total, masks, data["X"].unbind(2), strict=True):
                weighted = x.unsqueeze(2) * outputs.unsqueeze(1)  # (n, s, c)
                of_channel.addmm_(D, weighted.flatten(1))
        assert total is not None
        entries = total.view(self.d, -1, self.p, self.s, total.shape[2] // self.s).permute(1, 2, 3, 0, 4)
        G = total.new_zeros(len(entries), self.s, *entries.shape[2:])
        G[:, self.rows] = entries / (self.s if self.pool == "mean" else 1)
        return G.flatten(3).flatten(1, 2)


def _sum_of_products(A: Float[Tensor, "b x d"], B: Float[Tensor, "b t d"]) -> Float[Tensor, "x t"]:
    """``Σ_i A_i B_iᵀ``."""
    if A.is_cuda:  # one large product
        return torch.einsum("bxd,btd->xt", A, B)
    return A.new_zeros(A.shape[1], B.shape[1]).addbmm(A, B.mT)  # one after another, each in the cache
