"""Self-attention: tokens are mixed by their similarity under a learned bilinear form.

    mix(X, U) = (1/s) σ(X U Xᵀ) X        U (d, d) joins query and key weights,  V (d, c)

The convex program lives on ``Z = Σ_k vec(U_k) vec(V_k)ᵀ``, ``(d², d·c)``, with the nuclear norm: low rank across
token correlations (left) and across latent feature/class directions (right).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from convexhead.program.heads.base import Data, GradientCost, Head, atoms_by_gate


class SelfAttention(Head):
    """``U (d, d)``, ``V (d, c)``; scores ``q = s``."""

    name = "self-attention"
    reads_tokens = True
    any_length = True
    kept_gates = 8  # each takes the memory of the tokens

    def __init__(self, n_tokens: int, n_channels: int, **options: object) -> None:
        super().__init__(n_tokens, n_channels, **options)  # type: ignore[arg-type]
        self.mixing_shape = (self.d, self.d)
        self.value_rows = self.d

    def mix_bound(self, norms: Tensor) -> Tensor:
        return super().mix_bound(norms / self.s * norms * norms)

    @property
    def divisions(self) -> int:
        return int(self.pool == "mean") + 1  # torch.compile does not follow the property of a super class

    @property
    def score_width(self) -> int:
        return self.s

    def prepare_linear(self, X: Tensor, *, reuse: bool) -> Data:
        # A row of P X U costs d² to take through the Gram matrix XᵀX and 2·s·d through the tokens.
        keys = {"gram": X.mT @ X} if reuse and self.d < 2 * self.s else {"X": X}
        return {"queries": self.pool_tokens(X) / self.s, **keys}

    def linear_mix(self, data: Data, U: Tensor, group: Tensor) -> Tensor:
        Q = data["queries"]
        b, r, d = Q.shape
        QU = (Q.reshape(b * r, d) @ U.permute(1, 0, 2).reshape(d, -1)).view(b, r * len(U), d)
        return self._through_keys(data, QU).view(b, r, len(U), d)

    def linear_mix_adjoint(self, data: Data, T: Tensor, group: Tensor) -> Tensor:
        Q = data["queries"]
        b, r, k, d = T.shape
        TG = self._through_keys(data, T.reshape(b, r * k, d))
        return (Q.reshape(b * r, d).T @ TG.view(b * r, k * d)).view(d, k, d).transpose(0, 1)

    def _through_keys(self, data: Data, rows: Tensor) -> Tensor:
        """``rows (b, ·, d) -> rows XᵀX``."""
        if "gram" in data:
            return rows @ data["gram"]
        return (rows @ data["X"].mT) @ data["X"]

    # E = P X / s and K = XᵀX.
    def values_first(self, c: int) -> bool:
        return c < self.r

    def keys_times(self, data: Data, V: Tensor) -> Tensor:
        if "gram" in data:
            return (data["gram"].flatten(0, 1) @ V).unflatten(0, data["gram"].shape[:2])
        X = data["X"]
        return X.mT @ (X.flatten(0, 1) @ V).unflatten(0, X.shape[:2])

    def keys_adjoint(self, data: Data, H: Tensor) -> Tensor:
        if "gram" in data:  # it is symmetric
            return data["gram"].flatten(0, 1).T @ H.flatten(0, 1)
        X = data["X"]
        return X.flatten(0, 1).T @ (X @ H).flatten(0, 1)

    def read_rows(self, data: Data, W: Tensor) -> Tensor:
        return data["queries"] @ W

    def read_rows_adjoint(self, data: Data, R: Tensor) -> Tensor:
        return data["queries"].mT @ R

    def preactivation(self, data: Data, U: Tensor, group: Tensor) -> Tensor:
        X = data["X"]
        queries = X[:, self.rows]
        QU = torch.einsum("bpd,kde->bkpe", queries, U)
        return (QU.flatten(1, 2) @ X.mT).view(X.shape[0], len(U), self.p, self.s)

    def workspace(self, k: int) -> int:
        return k * self.p * max(self.s, self.d)

    def preactivation_adjoint(self, data: Data, A: Tensor, group: Tensor) -> Tensor:
        X = data["X"]
        AX = (A.reshape(len(X), -1, self.s) @ X).view(*A.shape[:3], self.d)
        return torch.einsum("bpd,bkpe->kde", X[:, self.rows], AX)

    # With one pooled output, masks and pooling join into gated queries: Σ_p P_p D[p,q] x_pᵀ U x_q = y_qᵀ U x_q with
    # y_q = Σ_p P_p D[p,q] x_p, which the atoms of a gate share.
    @property
    def keeps_gated(self) -> bool:
        return self.r == 1

    def gate(self, data: Data, masks: Tensor) -> Tensor:
        if self.r > 1:
            return masks
        X = data["X"]
        queries = X / self.s if self.pool == "mean" else X[:, self.rows]
        return torch.stack([D.mT @ queries for D in masks.unbind(1)], dim=1)  # (b, j, s, d)

    def gated_mix(self, data: Data, U: Tensor, group: Tensor, gated: Tensor, which: Tensor) -> Tensor:
        if self.r > 1:
            return super().gated_mix(data, U, group, gated, which)
        X = data["X"]
        S = X.new_empty(len(X), len(U), 1, self.s)
        keys = X.reshape(-1, 1, self.d)
        for Y, mine in zip(gated.unbind(1), atoms_by_gate(which), strict=True):
            YU = Y.reshape(-1, self.d) @ U[mine].transpose(0, 1).reshape(self.d, -1)
            YUX = (YU.view(-1, len(mine), self.d) * keys).sum(2)  # faster than many small products
            S[:, mine, 0] = YUX.view(len(X), self.s, -1).transpose(1, 2).to(S.dtype)  # a GPU sums in float32
        return self.read(data, S)

    def gated_mix_adjoint(self, data: Data, T: Tensor, group: Tensor, gated: Tensor, which: Tensor) -> Tensor:
        if self.r > 1:
            return super().gated_mix_adjoint(data, T, group, gated, which)
        X = data["X"]
        S = self.read_adjoint(data, T).squeeze(2).transpose(1, 2)  # (b, s, k)
        U = T.new_empty(T.shape[2], *self.mixing_shape)
        for Y, mine in zip(gated.unbind(1), atoms_by_gate(which), strict=True):
            weighted = (S[:, :, mine].unsqueeze(-1) * X.unsqueeze(2)).reshape(-1, len(mine) * self.d)
            U[mine] = (Y.reshape(-1, self.d).T @ weighted).view(self.d, -1, self.d).transpose(0, 1).to(U.dtype)
        return U

    def gated_workspace(self, k: int, gates: int) -> int:
        if self.r > 1:
            return super().gated_workspace(k, gates)
        return (gates + math.ceil(k / gates)) * self.s * self.d

    # Entry (a, b; e, o) is Σ_i q_a K_be R_o with the pooled query q over s and the Gram matrix K = XᵀX, or with gates
    # Σ_i Σ_q Y_qa X_qb X_qe R_o / s: symmetric in b and e, so that b ≤ e will do.
    def gradient_cost(self, c: int, *, gates: int) -> GradientCost | None:
        d, pairs = self.d, self.d * (self.d + 1) // 2
        if self.r > 1:
            return None if gates or not self.values_first(c) else GradientCost(pairs / (2 * d), d * d + d * c)
        if gates:
            return GradientCost((self.s + c) * pairs / (self.s * d), 2 * self.s * d + d * d)
        return GradientCost(pairs * c / (2 * d + c), d * d + d * c)

    def gradient(self, batches: Iterable[tuple[Data, Tensor]], group: Tensor) -> Tensor:
        total: Tensor | None = None
        for data, R in batches:
            if total is None:
                total = R.new_zeros(self.d, self.d, self.d * R.shape[2])
            gram = data["gram"] if "gram" in data else data["X"].mT @ data["X"]
            weighted = (data["queries"].mT @ R).flatten(1)
            for b, row in enumerate(total):
                row[b:].addmm_(gram[:, b, b:].T, weighted)
        assert total is not None
        return self._matrices(total.view(self.d, self.d, 1, self.d, -1))

    def gated_gradient(self, batches: Iterable[tuple[Data, Tensor, Tensor]]) -> Tensor:
        total: Tensor | None = None
        for data, R, gated in batches:
            if total is None:
                total = R.new_zeros(self.d, self.d, gated.shape[1] * self.d, R.shape[2])
            Xt, Y = data["X"].mT.contiguous(), gated.transpose(1, 2).flatten(2)  # (n, d, s), (n, s, j·d)
            outputs = R[:, 0] / self.s
            for b, row in enumerate(total):
                triples = torch.bmm(Xt[:, b : b + 1] * Xt[:, b:], Y)  # (n, e, j·a)
                row[b:].view(-1, R.shape[2]).addmm_(triples.flatten(1).T, outputs)
        assert total is not None
        return self._matrices(total.unflatten(2, (-1, self.d)))

    def _matrices(self, total: Tensor) -> Tensor:
        """``(j, a·b, e·c)`` from the entries ``b ≤ e`` of ``(b, e, j, a, c)``."""
        e, b = torch.tril_indices(self.d, self.d, -1, device=total.device)
        total[e, b] = total[b, e]
        j, c = total.shape[2], total.shape[4]
        return total.permute(2, 3, 0, 1, 4).reshape(j, self.d * self.d, self.d * c)

    def read(self, data: Data, S: Tensor) -> Tensor:
        X = data["X"]
        k = S.shape[1]
        return (S.transpose(1, 2).reshape(X.shape[0], -1, self.s) @ X / self.s).view(X.shape[0], self.r, k, self.d)

    def read_adjoint(self, data: Data, T: Tensor) -> Tensor:
        X = data["X"]
        S = T.reshape(len(X), -1, self.d) @ X.mT / self.s
        return S.view(len(X), self.r, -1, self.s).transpose(1, 2)
