"""The order in which the two weights of an atom meet the tokens.

An atom ``P mix(X, U_k) V_k`` is a product of several matrices, which may be made from either end:

    mix first       M_k = P mix(X, U_k),  f = Σ_k M_k V_k             any activation
    values first    f = E Σ_k U_k (K V_k)                             a linear one that is P mix(X, U) = E(X) U K(X)

With one pooled output the first is the cheaper one. With an output for every token ``M_k`` has as many rows as there
are tokens and as many columns as there are channels, where ``K V_k`` has a column for each class only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.program.activations import Activation
from convexhead.program.atoms import Atoms
from convexhead.program.heads.base import Data, Head

PullBack = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``R (b, r, c) -> (k, *mixing_shape), (k, e, c)``: gradients in ``U`` and in ``V``, summed over the batch."""


class Contraction(Protocol):
    """What passes over a batch of samples compute. ``b`` samples, ``k`` atoms, ``R (b, r, c)`` residuals."""

    def outputs(self, data: Data, U: Tensor, V: Tensor, block: Tensor) -> Float[Tensor, "b r c"]:
        """``Σ_k P mix(X, U_k) V_k``."""

    def with_pull_back(
        self, data: Data, U: Tensor, V: Tensor, block: Tensor
    ) -> tuple[Float[Tensor, "b r c"], PullBack]:
        """`outputs`, and their gradients in both weights, which share work."""

    def times_values(
        self, data: Data, R: Tensor, V: Tensor, block: Tensor, at: Tensor | None
    ) -> Float[Tensor, "k ..."]:
        """``𝒜*(R) V_k``, summed over the batch; of a ReLU ``at`` given mixing weights."""

    def times_mixing(self, data: Data, R: Tensor, U: Tensor, block: Tensor) -> Float[Tensor, "k e c"]:
        """``𝒜*(R)ᵀ U_k``, summed over the batch."""

    def pairs(self, data: Data, basis: Atoms, z: Float[Tensor, "t b r c"], n_blocks: int) -> Float[Tensor, "tb jmm"]:
        """``⟨P mix(X_i, U_a) V_b, z_ti⟩`` for all pairs ``(a, b)`` of the ``m`` atoms that each block has."""

    def workspace(self, k: int) -> int:
        """Count the numbers held for each sample; it sets the batch size of a pass."""


class MixFirst:
    """``f = Σ_k M_k V_k``."""

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def outputs(self, data: Data, U: Tensor, V: Tensor, block: Tensor) -> Tensor:
        return self.activation.mix(data, U, block).flatten(2) @ V.flatten(0, 1)

    def with_pull_back(self, data: Data, U: Tensor, V: Tensor, block: Tensor) -> tuple[Tensor, PullBack]:
        M, to_mixing = self.activation.mix_with_pull_back(data, U, block)
        flat, values = M.flatten(2).flatten(0, 1), V.flatten(0, 1)  # (b·r, k·e), (k·e, c)

        def pull_back(R: Tensor) -> tuple[Tensor, Tensor]:
            R = R.flatten(0, 1)
            learns = self.activation.head.learns_mixing
            at_mixing = to_mixing((R @ values.T).view(M.shape)) if learns else torch.zeros_like(U)
            return at_mixing, (flat.T @ R).view(V.shape)

        return (flat @ values).view(*M.shape[:2], -1), pull_back

    def times_values(self, data: Data, R: Tensor, V: Tensor, block: Tensor, at: Tensor | None) -> Tensor:
        T = (R @ V.flatten(0, 1).T).unflatten(-1, V.shape[:2])
        return self.activation.mix_adjoint(data, T, block, at)

    def times_mixing(self, data: Data, R: Tensor, U: Tensor, block: Tensor) -> Tensor:
        M = self.activation.mix(data, U, block)
        product = R.flatten(0, 1).T @ M.flatten(2).flatten(0, 1)  # few rows first: the other order is slower
        return product.T.reshape(len(U), -1, R.shape[2])

    def pairs(self, data: Data, basis: Atoms, z: Tensor, n_blocks: int) -> Tensor:
        return pairs_of_mixed(self.activation.mix(data, basis.U, basis.block), basis, z, n_blocks)

    def workspace(self, k: int) -> int:
        return self.activation.workspace(k)


class ValuesFirst:
    """``f = E Σ_k U_k (K V_k)``, in a few large products: see `Head.keys_times` and `Head.read_rows`."""

    def __init__(self, head: Head, c: int) -> None:
        self.head, self.c = head, c

    def outputs(self, data: Data, U: Tensor, V: Tensor, block: Tensor) -> Tensor:
        return self.head.read_rows(data, self._mixed(U, self._keyed(data, V)))

    def with_pull_back(self, data: Data, U: Tensor, V: Tensor, block: Tensor) -> tuple[Tensor, PullBack]:
        keyed = self._keyed(data, V)

        def pull_back(R: Tensor) -> tuple[Tensor, Tensor]:
            rows = self._rows(data, R)
            return (rows @ keyed.T).view(len(rows), len(U), -1).transpose(0, 1), self._to_values(data, U, rows)

        return self.head.read_rows(data, self._mixed(U, keyed)), pull_back

    def times_values(self, data: Data, R: Tensor, V: Tensor, block: Tensor, at: Tensor | None) -> Tensor:
        rows = self._rows(data, R)
        return (rows @ self._keyed(data, V).T).view(len(rows), len(V), -1).transpose(0, 1)

    def times_mixing(self, data: Data, R: Tensor, U: Tensor, block: Tensor) -> Tensor:
        return self._to_values(data, U, self._rows(data, R))

    def pairs(self, data: Data, basis: Atoms, z: Tensor, n_blocks: int) -> Tensor:
        m, (t, b) = len(basis), z.shape[:2]
        right = self._keyed(data, basis.V).view(m, -1, b, self.c).permute(2, 1, 3, 0).flatten(1, 2)  # (b, a·c, m)
        rows = torch.stack([self._rows(data, draw) for draw in z], dim=1).flatten(1)
        left = self._pulled(basis.U, rows).view(m, -1, t, b, self.c).permute(3, 2, 0, 1, 4).flatten(3).flatten(1, 2)
        return torch.bmm(left, right).view(b * t, -1)

    def workspace(self, k: int) -> int:
        return 2 * k * self.head.mixing_shape[1] * self.c

    def _keyed(self, data: Data, V: Float[Tensor, "k e c"]) -> Float[Tensor, "ka bc"]:
        """``K_i V_k`` of all samples side by side."""
        keyed = self.head.keys_times(data, V.transpose(0, 1).flatten(1))  # (b, a, k·c)
        return keyed.unflatten(2, (len(V), -1)).permute(2, 1, 0, 3).flatten(2).flatten(0, 1)

    def _mixed(self, U: Float[Tensor, "k p a"], keyed: Float[Tensor, "ka bc"]) -> Float[Tensor, "b p c"]:
        return (U.transpose(0, 1).flatten(1) @ keyed).unflatten(1, (-1, self.c)).transpose(0, 1)

    def _rows(self, data: Data, R: Float[Tensor, "b r c"]) -> Float[Tensor, "p bc"]:
        """``E_iᵀ R_i`` of all samples side by side."""
        return self.head.read_rows_adjoint(data, R).transpose(0, 1).flatten(1)

    def _pulled(self, U: Float[Tensor, "k p a"], rows: Float[Tensor, "p bc"]) -> Float[Tensor, "ka bc"]:
        return U.transpose(1, 2).flatten(0, 1) @ rows

    def _to_values(self, data: Data, U: Float[Tensor, "k p a"], rows: Float[Tensor, "p bc"]) -> Float[Tensor, "k e c"]:
        pulled = self._pulled(U, rows).view(len(U), U.shape[2], -1, self.c)
        values = self.head.keys_adjoint(data, pulled.permute(2, 1, 0, 3).flatten(2))  # (e, k·c)
        return values.unflatten(1, (len(U), -1)).transpose(0, 1)


def pairs_of_mixed(
    M: Float[Tensor, "b r k e"], basis: Atoms, z: Float[Tensor, "t b r c"], n_blocks: int
) -> Float[Tensor, "tb jmm"]:
    """`Contraction.pairs`, from mixed tokens at hand."""
    V, M = basis.V.flatten(0, 1).T, M.unflatten(2, (n_blocks, -1)).movedim(1, 2)  # (b, j, r, m, e)
    drawn = ((draw @ V).unflatten(2, (n_blocks, *M.shape[3:])).movedim(1, 2) for draw in z)
    return torch.cat([torch.einsum("bjrke,bjrle->bjkl", M, T).flatten(1) for T in drawn])
