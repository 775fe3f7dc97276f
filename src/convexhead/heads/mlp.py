"""MLP (channel mixing): every token is projected by itself; tokens meet only in the pooling.

    mix(X, u) = σ(X u)        u (d,),  v (1, c)

The convex program lives on ``Z (d, c)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convexhead.heads.base import Data, Head


class MLP(Head):
    """``u (d,)``, ``v (1, c)``; scores ``q = 1``."""

    name = "mlp"

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
