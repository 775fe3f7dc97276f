"""Atoms: a head's weights in factored form, and the forms of them whose penalty is least.

``Z_j = Σ_{k in j} vec(U_k) vec(V_k)ᵀ`` is the same for many factors. `balance` and `rescale` choose those for which

    ½ Σ_k (‖U_k‖² + ‖V_k‖²)  =  Σ_k ‖U_k‖ ‖V_k‖

is least: over all factors of each ``Z_j``, where it is ``Σ_j ‖Z_j‖_*``, or over the scales of each atom.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class Atoms:
    """A head's weights in factored form.

    Attributes
    ----------
    U : Tensor (k, *mixing_shape)
        Mixing weights.
    V : Tensor (k, e, c)
        Value weights; zero outside the outputs that a grouped block-FNO's group writes.
    block : Tensor (k,), int64
        The block of each atom, ``gate · n_groups + group``.
    intercept : Tensor (c,)
        ``b``; zero where none is fitted.
    """

    U: Float[Tensor, "k ..."]
    V: Float[Tensor, "k e c"]
    block: Int[Tensor, " k"]
    intercept: Float[Tensor, " c"]

    def __len__(self) -> int:
        return len(self.block)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Atoms:
        """The same weights on another device in another precision."""
        return Atoms(
            self.U.to(device, dtype),
            self.V.to(device, dtype),
            self.block.to(device),
            self.intercept.to(device, dtype),
        )

    def select(self, index: Tensor) -> Atoms:
        """The atoms that ``index`` (a mask or positions) picks."""
        return replace(self, U=self.U[index], V=self.V[index], block=self.block[index])

    def state(self) -> dict[str, Tensor]:
        """The weights by name, for checkpoints."""
        return {"U": self.U, "V": self.V, "block": self.block, "intercept": self.intercept}

    @classmethod
    def restored(cls, state: dict[str, Tensor]) -> Atoms:
        """Inverse of `state`, which may hold other things too."""
        return cls(state["U"], state["V"], state["block"], state["intercept"])

    def append(self, other: Atoms) -> Atoms:
        """Return these atoms, then ``other``'s, with this intercept."""
        return replace(
            self,
            U=torch.cat([self.U, other.U]),
            V=torch.cat([self.V, other.V]),
            block=torch.cat([self.block, other.block]),
        )


def balance(atoms: Atoms, *, drop: float) -> tuple[Atoms, list[Tensor]]:
    """The same ``Z_j`` with orthogonal, balanced atoms sorted by singular value, block by block.

    Parameters
    ----------
    drop : float
        Atoms whose singular value is at most ``drop`` times the largest of all blocks are dropped.

    Returns
    -------
    atoms : Atoms
        ``‖U_k‖ = ‖V_k‖ = √σ_k``, ordered by block, then by falling ``σ_k``.
    singular_values : list of Tensor
        One ``(k_j,)`` for each block that has atoms, in the atoms' order.
    """
    pieces, blocks = [], torch.unique(atoms.block).tolist()
    for j in blocks:
        of_block = atoms.select(atoms.block == j) if len(blocks) > 1 else atoms
        qu, ru = torch.linalg.qr(of_block.U.flatten(1).T)
        qv, rv = torch.linalg.qr(of_block.V.flatten(1).T)
        left, sigma, right = torch.linalg.svd(ru @ rv.T)
        left, right = qu @ left[:, : len(sigma)], qv @ right[: len(sigma)].T
        pieces.append((j, left, sigma, right))
    largest = max((float(sigma[0]) for *_, sigma, _ in pieces if len(sigma)), default=0.0)
    if not pieces:
        return atoms, []
    kept, values = [], []
    for j, left, sigma, right in pieces:
        m = int((sigma > drop * largest).sum())
        root = sigma[:m].sqrt()
        balanced = (
            (left[:, :m] * root).T.reshape(m, *atoms.U.shape[1:]),
            (right[:, :m] * root).T.reshape(m, *atoms.V.shape[1:]),
            torch.full((m,), j, device=atoms.block.device),
        )
        kept.append(balanced)
        if m:
            values.append(sigma[:m])
    U, V, block = (torch.cat(part) for part in zip(*kept, strict=True))
    return Atoms(U, V, block, atoms.intercept), values


def rescale(atoms: Atoms) -> tuple[Atoms, list[Tensor]]:
    """The same function with ``‖U_k‖ = ‖V_k‖``, which every positively homogeneous activation allows.

    Returns
    -------
    atoms : Atoms
        Ordered by block, then by falling ``‖U_k‖‖V_k‖``; atoms that do nothing are dropped.
    sizes : list of Tensor
        ``‖U_k‖‖V_k‖``, one ``(k_j,)`` for each block that has atoms, in the atoms' order.
    """
    nU, nV = atoms.U.flatten(1).norm(dim=1), atoms.V.flatten(1).norm(dim=1)
    size = nU * nV
    order = torch.argsort(size, descending=True)
    order = order[torch.argsort(atoms.block[order], stable=True)]
    order = order[size[order] > 0]
    kept, size = atoms.select(order), size[order]
    root = size.sqrt()
    kept.U = kept.U * (root / nU[order]).view(-1, *[1] * (kept.U.ndim - 1))
    kept.V = kept.V * (root / nV[order]).view(-1, 1, 1)
    return kept, [size[kept.block == j] for j in torch.unique(kept.block).tolist()]
