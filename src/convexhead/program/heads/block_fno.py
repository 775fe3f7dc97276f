"""Block-FNO: a Fourier neural operator on each of ``B`` channel groups (the block-diagonal weights of AFNO).

    mix(X, U) = σ(circ(X^(b)) vec(U)),   X^(b) the d/B channels of group b        U (s, d/B)

With ``grouped`` outputs (the published form) group ``b`` writes only output group ``b``, ``v (1, c/B)``; with
``shared`` outputs every group writes all ``c`` outputs and the groups are summed, ``v (1, c)``. Internally a grouped
value is held with ``c`` columns that are zero outside its group. Each group has a nuclear norm of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from convexhead.errors import InputError, choose
from convexhead.program.heads.base import Data, Head
from convexhead.program.heads.fno import FNO

OUTPUTS = ("shared", "grouped")


class BlockFNO(Head):
    """``U (s, d/B)``, ``v (1, c)`` or ``(1, c/B)``; scores ``q = 1``."""

    name = "block-fno"
    reads_grid = True
    kept_gates = FNO.kept_gates
    least_batch = FNO.least_batch

    def __init__(
        self, n_tokens: int, n_channels: int, *, n_blocks: int = 4, outputs: str = "shared", **options: object
    ) -> None:
        super().__init__(n_tokens, n_channels, **options)  # type: ignore[arg-type]
        self.outputs = choose("outputs", outputs, OUTPUTS)
        if not isinstance(n_blocks, int) or n_blocks < 1 or n_channels % n_blocks:
            raise InputError(f"n_blocks={n_blocks} must be a positive divisor of the {n_channels} channels")
        self.n_groups = n_blocks
        self.width = n_channels // n_blocks
        self.mixing_shape = (self.s, self.width)
        self.value_rows = 1
        self._fno = FNO(n_tokens, self.width, **options)
        self._whole = FNO(n_tokens, n_channels, **options)

    def mix_bound(self, norms: Tensor) -> Tensor:
        return self._fno.mix_bound(norms)

    def channels_of(self, group: int) -> slice:
        return slice(group * self.width, (group + 1) * self.width)

    @property
    def score_width(self) -> int:
        return 1

    def output_mask(self, n_outputs: int) -> Tensor | None:
        if self.outputs == "shared":
            return None
        if n_outputs % self.n_groups:
            raise InputError(
                f"outputs='grouped' needs a number of outputs divisible by n_blocks={self.n_groups}, "
                f"got {n_outputs}: choose another n_blocks or outputs='shared'"
            )
        return torch.eye(self.n_groups).repeat_interleave(n_outputs // self.n_groups, dim=1) > 0

    def prepare_linear(self, X: Tensor, *, reuse: bool) -> Data:
        return self.prepare(X) if self.pool == "none" else self._fno.prepare_linear(X, reuse=reuse)

    def prepare(self, X: Tensor) -> Data:
        spectrum = self._fno.prepare(X)["spectrum"].unflatten(-1, (self.n_groups, self.width))
        return {"spectrum": spectrum.transpose(1, 2).contiguous()}  # (b, B, f, d/B): a group's numbers lie together

    def linear_mix(self, data: Data, U: Tensor, group: Tensor) -> Tensor:
        return self._to_groups(self._fno.linear_mix, data, U, group, atom_dim=2)

    def linear_mix_adjoint(self, data: Data, T: Tensor, group: Tensor) -> Tensor:
        return self._from_groups(self._fno.linear_mix_adjoint, data, T, group, atom_dim=2)

    def preactivation(self, data: Data, U: Tensor, group: Tensor) -> Tensor:
        return self._to_groups(self._fno.preactivation, data, U, group, atom_dim=1)

    def preactivation_adjoint(self, data: Data, A: Tensor, group: Tensor) -> Tensor:
        return self._from_groups(self._fno.preactivation_adjoint, data, A, group, atom_dim=1)

    def gated_features(self, data: Data, masks: Tensor) -> Tensor | None:
        parts = [
            self._fno.gated_features(self._channels(data, g), masks[:, g :: self.n_groups])
            for g in range(self.n_groups)
        ]
        kept = [part for part in parts if part is not None]
        return torch.stack(kept, dim=2).flatten(1, 2) if kept else None

    def gate(self, data: Data, masks: Tensor) -> Tensor:
        return self._fno.gate(data, masks)

    def gated_mix(self, data: Data, U: Tensor, group: Tensor, gated: Tensor, which: Tensor) -> Tensor:
        def mix(data: Data, U: Tensor, mine: Tensor) -> Tensor:
            return self._fno.gated_mix(data, U, mine, gated, which[mine])

        return self._to_groups(mix, data, U, group, atom_dim=2)

    def gated_mix_adjoint(self, data: Data, T: Tensor, group: Tensor, gated: Tensor, which: Tensor) -> Tensor:
        def adjoint(data: Data, T: Tensor, mine: Tensor) -> Tensor:
            return self._fno.gated_mix_adjoint(data, T, mine, gated, which[mine])

        return self._from_groups(adjoint, data, T, group, atom_dim=2)

    def workspace(self, k: int) -> int:
        return math.ceil(self._fno.workspace(k) / self.n_groups)  # a group at a time

    # A group's weights are those of an FNO over all channels that are 0 in the others.
    def network_linear_mix(self, X: Tensor, U: Tensor, group: Tensor) -> Tensor:
        return self._whole.network_linear_mix(X, self._spread(U, group), group)

    def network_preactivation(self, X: Tensor, U: Tensor, group: Tensor) -> Tensor:
        return self._whole.network_preactivation(X, self._spread(U, group), group)

    def _spread(self, U: Tensor, group: Tensor) -> Tensor:
        """``(k, s, d)`` with the weights of each atom in the channels of its group."""
        mine = torch.eye(self.n_groups, dtype=U.dtype, device=U.device)[group]  # (k, B)
        return (mine[:, None, :, None] * U.unsqueeze(2)).flatten(2)

    def _channels(self, data: Data, g: int) -> Data:
        """What an FNO of channel group ``g`` would prepare."""
        if "spectrum" in data:
            return {"spectrum": data["spectrum"][:, g]}
        return {key: value[..., self.channels_of(g)] for key, value in data.items()}

    def _to_groups(self, mix: Callable[..., Tensor], data: Data, U: Tensor, group: Tensor, *, atom_dim: int) -> Tensor:
        """``mix(data, U, atoms)`` of the data and the ``atoms`` of each channel group, in the atoms' order."""
        groups = [(g, (group == g).nonzero().squeeze(1)) for g in torch.unique(group).tolist()]
        parts = [mix(self._channels(data, g), U[atoms], atoms) for g, atoms in groups]
        order = torch.cat([atoms for _, atoms in groups])
        return torch.cat(parts, atom_dim).index_select(atom_dim, torch.argsort(order))

    def _from_groups(
        self, adjoint: Callable[..., Tensor], data: Data, T: Tensor, group: Tensor, *, atom_dim: int
    ) -> Tensor:
        """The same for an adjoint, which takes the atoms' share of ``T``."""
        U = T.new_zeros(len(group), *self.mixing_shape)
        for g in torch.unique(group).tolist():
            atoms = (group == g).nonzero().squeeze(1)
            U[atoms] = adjoint(self._channels(data, g), T.index_select(atom_dim, atoms), atoms)
        return U
