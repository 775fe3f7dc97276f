"""Heads with fixed mixing act on positions: by token-to-token weights (Mixer) or by filters (FNO)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.errors import InputError
from convexhead.interpret.fitted import as_fitted


class Filters(NamedTuple):
    """The strength of every FNO atom's filter at each shift, and at each frequency (zero frequency in the middle)."""

    space: Float[Tensor, "k h w"]
    frequency: Float[Tensor, "k h w"]


def mixing_matrix(model: Any) -> Float[Tensor, "s s"]:
    """Measure how strongly a Mixer feeds ``t`` into ``p``: ``W[p, t] = (Σ_j ‖Σ_{k in j} U_k[p, t] V_k‖²_F)^½``.

    The sum of squares of ``W`` is that of the singular values of ``Z``. With mean pooling and a linear activation only
    the column means of the ``U_k`` act.
    """
    fitted = as_fitted(model)
    if fitted.head.name != "mlp-mixer":
        raise InputError(f"only the mlp-mixer has a token-to-token matrix, not {fitted.head.name!r}")
    atoms = fitted.features
    V = atoms.V.flatten(1)
    gram = (V @ V.T) * (atoms.block.unsqueeze(1) == atoms.block)
    return torch.einsum("kpt,kl,lpt->pt", atoms.U, gram, atoms.U).clamp_min(0).sqrt()


def fourier_filters(model: Any) -> Filters:
    """Return the filters of an FNO or block-FNO in both domains, each as the 2-norm over channels.

        space[k, t] = ‖U_k[t]‖        frequency[k, ω] = ‖Û_k[ω]‖,  Û_k = DFT of U_k over the grid, divided by √s

    so that both have the same sum of squares (Parseval). The zero shift is at ``[0, 0]``, the zero frequency at
    ``[h // 2, w // 2]``. With mean pooling and a linear activation the zero frequency alone acts.
    """
    fitted = as_fitted(model)
    if fitted.head.name not in ("fno", "block-fno"):
        raise InputError(f"only fno and block-fno have filters, not {fitted.head.name!r}")
    lattice = fitted.atoms.U.unflatten(1, fitted.head.grid)
    spectrum = torch.fft.fftn(lattice, dim=(1, 2), norm="ortho")
    shifted = torch.fft.fftshift(spectrum, dim=(1, 2))
    return Filters(lattice.norm(dim=-1), torch.linalg.vector_norm(shifted, dim=-1))
