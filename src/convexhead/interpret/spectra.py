"""The singular values of a head say how many directions it uses on each of its sides.

A head's weights form one tensor, ``T = Σ_k U_k ⊗ V_k``. Read as the matrix ``Z = Σ_k vec(U_k) vec(V_k)ᵀ`` its singular
values are what the nuclear norm sums, and its rank is the number of atoms. Read as a matrix from any one of its axes to
all the others (an unfolding), they say how many directions of that axis are used: with ``⟨V_k, V_l⟩ = (LLᵀ)_kl``,

    T_(a) has the left singular vectors and values of the unfolding along ``a`` of ``Σ_k (LᵀU)_k``
                                                                                  (a mixing axis; values likewise)

For self-attention the axes are the query and key channels of ``U (d, d)``, the value channels and the outputs of
``V (d, c)``. Blocks (gates, channel groups, each atom of a ReLU) act on different features: their unfoldings stand side
by side.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.interpret.fitted import as_fitted
from convexhead.program.atoms import Atoms, balance

AXES: dict[str, tuple[str, ...]] = {
    "self-attention": ("query channels", "key channels", "value channels", "outputs"),
    "attentive": ("queries", "channels", "", "outputs"),
    "mlp-mixer": ("mixed tokens", "tokens", "value channels", "outputs"),
    "fno": ("shifts", "channels", "", "outputs"),
    "block-fno": ("shifts", "channels", "", "outputs"),
    "mlp": ("channels", "", "outputs"),
    "linear": ("channels", "outputs"),
}
"""Names of the axes of ``U``, then of ``V``; empty for an axis of one entry. A block of an attentive head that is one
query's lacks the first."""


def spectra(model: Any) -> dict[str, Float[Tensor, " m"]]:
    """Return falling singular values of ``Z`` (all blocks together), and of the unfolding along every axis.

    Parameters
    ----------
    model : fitted classifier or regressor, HeadModule, or FittedHead
        However it was trained: the weights need not be balanced.

    Returns
    -------
    dict of Tensor
        float64; ``"Z"`` first, then the names of `AXES`. Sums of squares agree: all are norms of one tensor.
    """
    fitted = as_fitted(model)
    atoms = fitted.features
    if fitted.head.learns_mixing:
        _, values = balance(atoms, drop=0.0)
        Z = torch.cat(values or [atoms.U.new_zeros(0)]).sort(descending=True).values
    else:
        Z = torch.linalg.svdvals(atoms.V[0])
    sides = {name: torch.linalg.svdvals(T) for name, T in unfoldings(fitted.head.name, atoms).items()}
    return {"Z": Z, **sides}


def unfoldings(head: str, atoms: Atoms) -> dict[str, Float[Tensor, "a m"]]:
    """Return a matrix with the left singular vectors and values of ``T_(a)`` for every named axis ``a``.

    Parameters
    ----------
    head : str
        Its name, for that of the axes.
    atoms : Atoms
    """
    U = atoms.U.reshape(len(atoms), math.prod(atoms.U.shape[1:]))
    V = atoms.V.flatten(1)
    mixed = (_whiten(V, atoms.block).T @ U).view(len(atoms), *atoms.U.shape[1:])
    valued = (_whiten(U, atoms.block).T @ V).view(len(atoms), *atoms.V.shape[1:])
    axes = [(part, axis) for part in (mixed, valued) for axis in range(1, part.ndim)]
    named = zip(AXES[head][-len(axes) :], axes, strict=True)
    return {name: part.movedim(axis, 0).flatten(1) for name, (part, axis) in named if name}


def _whiten(W: Float[Tensor, "k m"], block: Tensor) -> Float[Tensor, "k k"]:
    """Return ``L`` with ``(LLᵀ)_kl = ⟨W_k, W_l⟩`` for atoms of one block, 0 across blocks."""
    gram = (W @ W.T) * (block.unsqueeze(1) == block)
    values, Q = torch.linalg.eigh(gram)
    return Q * values.clamp_min(0).sqrt()


def effective_rank(singular_values: Float[Tensor, " m"]) -> float:
    """Return ``exp(−Σ p_i log p_i)``, ``p = σ / Σσ``: the rank if singular values are equal, 0 for a zero matrix.

    Source: Roy & Vetterli, *The effective rank*, EUSIPCO 2007.
    """
    total = float(singular_values.sum())
    if total == 0:
        return 0.0
    p = singular_values / total
    return float(torch.exp(-torch.xlogy(p, p).sum()))
