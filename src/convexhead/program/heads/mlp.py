"""MLP (channel mixing): every token is projected by itself; tokens meet only in the pooling.

    mix(X, u) = σ(X u)        u (d,),  v (1, c)

The convex program lives on ``Z (d, c)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convexhead.program.heads.base import Data, Head

FEW_TOKENS = 8
"""Largest number of tokens of a sample for which a gate is a mask and not a mean. Chosen by hand."""


class MLP(Head):
    """``u (d,)``, ``v (1, c)``; scores ``q = 1``."""

    name = "mlp"
    any_length = True

    def __init__(self, n_tokens: int, n_channels: int, **options: object) -> None:
        super().__init__(n_tokens, n_channels, **options)  # type: ignore[arg-type]
        self.mixing_shape = (self.d,)
        self.value_rows = 1

    @property
    def score_width(self) -> int:
        return 1

    def prepare_linear(self, X: Tensor, *, reuse: bool) -> Data:
        return {"queries": self.pool_tokens(X)}

    def linear_mix(self, data: Data, U: Tensor, group: Tensor) -> Tensor:
        return (data["queries"] @ U.T).unsqueeze(-1)

    def linear_mix_adjoint(self, data: Data, T: Tensor, group: Tensor) -> Tensor:
        return torch.einsum("brk,brd->kd", T.squeeze(-1), data["queries"])

    def preactivation(self, data: Data, U: Tensor, group: Tensor) -> Tensor:
        return (data["X"][:, self.rows] @ U.T).transpose(1, 2).unsqueeze(-1)

    def preactivation_adjoint(self, data: Data, A: Tensor, group: Tensor) -> Tensor:
        return torch.einsum("bkp,bpd->kd", A.squeeze(-1), data["X"][:, self.rows])

    # With one pooled output a gate sees the mean of the tokens that it lets pass, y = Σ_p P_p D_p x_p: M = yᵀu. Few
    # tokens are cheaper to project than such means of every gate are to read; then, and without pooling, masks do.
    @property
    def keeps_gated(self) -> bool:
        return self.r == 1

    @property
    def _gates_means(self) -> bool:
        return self.r == 1 and self.p > FEW_TOKENS

    def gate(self, data: Data, masks: Tensor) -> Tensor:
        weights = masks.squeeze(-1) / self.s if self.pool == "mean" else masks.squeeze(-1)  # (b, j, p)
        return weights @ data["X"][:, self.rows] if self._gates_means else weights

    def gated_mix(self, data: Data, U: Tensor, group: Tensor, gated: Tensor, which: Tensor) -> Tensor:
        if not self._gates_means:
            A = (data["X"][:, self.rows] @ U.T).mul_(_of_atoms(gated, which).mT)  # (b, p, k)
            return (A.sum(1, keepdim=True) if self.p > self.r else A).unsqueeze(-1)
        place = _places(which)
        of_gate = U.new_zeros(gated.shape[1], int(place.max()) + 1, self.d)
        of_gate[which, place] = U
        return torch.bmm(of_gate, gated.permute(1, 2, 0))[which, place].T[:, None, :, None]

    def gated_mix_adjoint(self, data: Data, T: Tensor, group: Tensor, gated: Tensor, which: Tensor) -> Tensor:
        if not self._gates_means:
            A = _of_atoms(gated, which).mT * T.squeeze(-1)
            return A.flatten(0, 1).T @ data["X"][:, self.rows].flatten(0, 1)
        place = _places(which)
        of_gate = T.new_zeros(gated.shape[1], int(place.max()) + 1, len(T))
        of_gate[which, place] = T[:, 0, :, 0].T
        return torch.bmm(of_gate, gated.transpose(0, 1))[which, place]

    def gated_workspace(self, k: int, gates: int) -> int:
        return k + gates * self.d // 4 if self._gates_means else k * self.p


def _of_atoms(gated: Tensor, which: Tensor) -> Tensor:
    """The gate of each atom ``(b, k, p)``; nothing is copied where every gate has one atom."""
    if torch.equal(which, torch.arange(gated.shape[1], device=which.device)):
        return gated
    return gated.index_select(1, which)


def _places(which: Tensor) -> Tensor:
    """The number of each atom among those of its gate."""
    mine = which.unsqueeze(0) == which.unsqueeze(1)
    return mine.tril(-1).sum(1)
