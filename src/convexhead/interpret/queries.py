"""An attentive head looks at tokens by the maps of its queries, and its weights say how much each map counts."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.errors import InputError
from convexhead.interpret.fitted import FittedHead, as_fitted
from convexhead.program.heads.attentive import Attentive


def query_maps(model: Any, X: Any) -> Float[Tensor, "n s J"]:
    """Return ``softmax(X q_j + π_j)`` of every query: what it looks at. Each sums to 1 over the tokens.

    Parameters
    ----------
    model : fitted classifier or regressor, HeadModule, or FittedHead
        With head "attentive".
    X : array or Tensor (n, s, d)
        Tokens.

    Returns
    -------
    Tensor (n, s, J)
        float64.
    """
    fitted = as_fitted(model)
    head = _attentive(fitted)
    return torch.cat([head.maps(chunk) for chunk in fitted.chunks(X)])


def query_strengths(model: Any) -> Float[Tensor, " J"]:
    """Return ``‖Z_j‖_F`` of every query: how much its map counts. Their squares sum to those of all singular values."""
    fitted = as_fitted(model)
    head, atoms = _attentive(fitted), fitted.atoms
    V, strengths = atoms.V.flatten(1), atoms.V.new_zeros(len(head.queries))
    for j in range(len(strengths)):
        mine = atoms.block == j if head.query_norm == "each" else torch.ones_like(atoms.block, dtype=torch.bool)
        U = atoms.U[mine] if head.query_norm == "each" else atoms.U[:, j]
        strengths[j] = ((U @ U.T) * (V[mine] @ V[mine].T)).sum().clamp_min(0).sqrt()
    return strengths


def _attentive(fitted: FittedHead) -> Attentive:
    if not isinstance(fitted.head, Attentive):
        raise InputError(f"only the attentive head has queries, not {fitted.head.name!r}")
    return fitted.head
