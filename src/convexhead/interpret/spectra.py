"""How many directions a head uses, on each of its sides.

A head's weights form one tensor, ``T = Σ_k U_k ⊗ V_k``. Read as the matrix ``Z = Σ_k vec(U_k) vec(V_k)ᵀ`` its singular
values are what the nuclear norm sums, and its rank is the number of atoms. Read as a matrix from any one of its axes to
all the others (an unfolding), they say how many directions of that axis are used: with ``⟨V_k, V_l⟩ = (LLᵀ)_kl``,

    T_(a) has the singular values of the unfolding along ``a`` of ``Σ_k (LᵀU)_k``   (a mixing axis; values likewise)

For self-attention the axes are the query and key channels of ``U (d, d)``, the value channels and the outputs of
``V (d, c)``. Blocks (gates, channel groups) act on different features: their unfoldings stand side by side.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.heads.base import Head
from convexhead.problem import Atoms, balance

AXES: dict[str, tuple[str, ...]] = {
    "self-attention": ("query channels", "key channels", "value channels", "outputs"),
    "mlp-mixer": ("mixed tokens", "tokens", "value channels", "outputs"),
    "fno": ("shifts", "channels", "", "outputs"),
    "block-fno": ("shifts", "channels", "", "outputs"),
    "mlp": ("channels", "", "outputs"),
    "linear": ("", "channels", "outputs"),
}
"""The axes of ``U`` and then of ``V``, as people call them; empty where there is but one entry."""


def spectra(head: Head, atoms: Atoms) -> dict[str, Float[Tensor, " m"]]:
    """Singular values, falling: of ``Z`` (all blocks together) as ``"Z"``, and of the unfolding along every axis.

    Parameters
    ----------
    head : Head
    atoms : Atoms
        Weights, convex or of a twin: they need not be balanced.

    Returns
    -------
    dict of Tensor
        float64; ``"Z"`` first, then the names of `AXES`. Sums of squares agree: all are norms of one tensor.
    """
    atoms = atoms.to(atoms.U.device, torch.float64)
    if not head.learns_mixing:
        coef = atoms.V[0]
        return {name: torch.linalg.svdvals(coef) for name in ("Z", "channels", "outputs")}
    _, values = balance(atoms, drop=0.0)
    result = {"Z": torch.cat(values or [atoms.U.new_zeros(0)]).sort(descending=True).values}
    U, V = atoms.U.flatten(1), atoms.V.flatten(1)
    mixed, valued = _whiten(V, atoms.block).T @ U, _whiten(U, atoms.block).T @ V
    names = AXES[head.name]
    n_mixing = len(head.mixing_shape)
    for axis, name in enumerate(names):
        if not name:
            continue
        part, like = (mixed, atoms.U) if axis < n_mixing else (valued, atoms.V)
        which = axis + 1 if axis < n_mixing else axis - n_mixing + 1
        unfolded = part.view(-1, *like.shape[1:]).movedim(which, 0).flatten(1)
        result[name] = torch.linalg.svdvals(unfolded)
    return result


def _whiten(W: Float[Tensor, "k m"], block: Tensor) -> Float[Tensor, "k k"]:
    """``L`` with ``(LLᵀ)_kl = ⟨W_k, W_l⟩`` for atoms of one block, 0 across blocks."""
    gram = (W @ W.T) * (block.unsqueeze(1) == block)
    values, Q = torch.linalg.eigh(gram)
    return Q * values.clamp_min(0).sqrt()


def effective_rank(singular_values: Float[Tensor, " m"]) -> float:
    """``exp(−Σ p_i log p_i)``, ``p = σ / Σσ``: equals the rank of equal singular values; 0 for the zero matrix.

    Source: Roy & Vetterli, *The effective rank*, EUSIPCO 2007.
    """
    total = float(singular_values.sum())
    if total == 0:
        return 0.0
    p = singular_values / total
    return float(torch.exp(-torch.xlogy(p, p).sum()))
