"""A head sees tokens on the few channel directions that its weights retain, scaled by their weight.

``T_(a)`` is the unfolding of the weights along an axis ``a`` that is indexed by the channels of a token (see
`spectra`). With ``A (d, r)`` and ``λ`` the leading eigenvectors and eigenvalues of ``Σ_a T_(a) T_(a)ᵀ``, the latent
embedding of a token is ``x A (λ/λ₁)^½``. Distances in it are what the weights make of a difference,

    λ₁⁻¹ Σ_a ‖(x − y)ᵀ T_(a)‖²        (up to the share of energy left out)

and bound by how much any pre-activation changes (for the Mixer and the probe: any output) when ``x`` takes the place of
``y``. Two tokens with the same embedding are the same to the head.

| head | axes a | |
|---|---|---|
| self-attention | query and key channels | ``Σ_kl ⟨V_k, V_l⟩ (U_k U_lᵀ + U_kᵀ U_l)``: what tokens are compared by |
| mlp-mixer | value channels | ``U`` acts on positions, ``V`` alone on channels |
| fno, block-fno, mlp, linear | channels | of the filters, neurons or the probe; channel groups side by side |
| attentive | channels | of what is read by its maps, which compare tokens with queries besides |
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.errors import InputError
from convexhead.interpret.fitted import as_fitted
from convexhead.interpret.spectra import unfoldings

TOKEN_AXES = {"self-attention": ("query channels", "key channels"), "mlp-mixer": ("value channels",)}
"""Names of the axes that the embedding is taken from; ``"channels"`` for the other heads."""


def retained_directions(model: Any, *, energy: float = 0.99) -> Float[Tensor, "d r"]:
    """Return ``A``, an orthonormal basis of the channel directions that a head looks at, strongest first.

    Parameters
    ----------
    model : fitted classifier or regressor, HeadModule, or FittedHead
    energy : float
        Share of the trace of ``Σ_a T_(a) T_(a)ᵀ`` that the directions keep.
    """
    return _directions(model, energy)[0]


def token_embedding(model: Any, X: Any, *, energy: float = 0.99) -> Float[Tensor, "n s r"]:
    """Return ``X_i A (λ/λ₁)^½`` (see the module), with ``A`` as in `retained_directions`."""
    A, strength = _directions(model, energy)
    scaled = A * (strength / strength[:1]).sqrt()
    return torch.cat([chunk @ scaled for chunk in as_fitted(model).chunks(X)])


def _directions(model: Any, energy: float) -> tuple[Float[Tensor, "d r"], Float[Tensor, " r"]]:
    """Return ``A`` and ``λ``."""
    if not 0 < energy <= 1:
        raise InputError(f"energy must be in (0, 1], got {energy!r}")
    fitted = as_fitted(model)
    head, atoms, group = fitted.head, fitted.features, fitted.group
    gram = atoms.V.new_zeros(head.d, head.d)
    for g in torch.unique(group).tolist():
        sides = unfoldings(head.name, atoms.select(group == g))
        channels = head.channels_of(g)
        for axis in TOKEN_AXES.get(head.name, ("channels",)):
            gram[channels, channels] += sides[axis] @ sides[axis].T
    strength, Q = torch.linalg.eigh(gram)
    strength, Q = strength.clamp_min(0).flip(0), Q.flip(1)
    total = float(strength.sum())
    kept = int((strength.cumsum(0) < energy * total * (1 - 1e-12)).sum()) + 1 if total else 0
    return Q[:, :kept], strength[:kept]


def principal_embedding(X: Float[Tensor, "n s d"], rank: int) -> Float[Tensor, "n s r"]:
    """Project tokens on their own ``rank`` leading principal components: raw features at a head's dimension."""
    flat = X.double().flatten(0, 1)
    _, _, components = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    return X.double() @ components[:rank].T
