"""The linear probe: ``f = P X W`` with the penalty ``β/2 ‖W‖_F²``; nothing is mixed but by pooling.

As a head it is the single atom ``mix(X) = X`` with the value weight ``V = W (d, c)``; its mixing weight is the
scalar 1 and is not learned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convexhead.errors import InputError
from convexhead.program.heads.base import Data, Head


class Linear(Head):
    """``mixing_shape ()``, ``V = W (d, c)``."""

    name = "linear"
    any_length = True
    learns_mixing = False
    takes_masks = False

    def __init__(self, n_tokens: int, n_channels: int, **options: object) -> None:
        super().__init__(n_tokens, n_channels, **options)  # type: ignore[arg-type]
        self.mixing_shape = ()
        self.value_rows = self.d

    @property
    def score_width(self) -> int:
        return self.d

    def prepare_linear(self, X: Tensor, *, reuse: bool) -> Data:
        return {"queries": self.pool_tokens(X)}

    def linear_mix(self, data: Data, U: Tensor, group: Tensor) -> Tensor:
        return data["queries"].unsqueeze(2) * U.view(-1, 1)

    def linear_mix_adjoint(self, data: Data, T: Tensor, group: Tensor) -> Tensor:
        return torch.einsum("brkd,brd->k", T, data["queries"])

    def preactivation(self, data: Data, U: Tensor, group: Tensor) -> Tensor:
        raise InputError("the linear head takes activation='linear' only; use head='mlp' for a gated one")

    def preactivation_adjoint(self, data: Data, A: Tensor, group: Tensor) -> Tensor:
        raise InputError("the linear head takes activation='linear' only; use head='mlp' for a gated one")
