"""A logit is the sum of what every token adds to it through every atom, exactly.

At fixed activation masks ``D_k`` (all ones for the linear activation) a head is

    f_i = Σ_k P read(D_k ⊙ pre(X_i, U_k)) V_k + b

and tokens enter this last, linearly, at one place, where the sum over tokens is split:

* self-attention reads the tokens again, ``read(S) = S X / s``, after it has compared them. With the pooled score
  ``S_ik[t] = Σ_p P_p D_k[p, t] x_pᵀ U_k x_t``

      C_i[t, k] = (1/s) S_ik[t] x_tᵀ V_k                 (the attention paid to ``t`` times what ``t`` says)

* the attentive head reads tokens by its maps ``a_j``, which do not depend on weights

      C_i[t, k] = Σ_j a_ij[t] x_tᵀ u_kj v_k               (how much query ``j`` looks at ``t`` times what ``t`` says)

* every other head has a pre-activation that is linear in the tokens. With ``X_i^(t)``, all tokens but ``t`` zero,

      C_i[t, k] = P (D_k ⊙ pre(X_i^(t), U_k)) V_k         (what ``t`` sends to all tokens that pooling reads)

In all cases ``Σ_{t,k} C_i[t, k] = f_i − b`` with nothing approximated. The masks are those of the whole sample: a
contribution is a share of the logit, not what the logit would lose without the token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexhead.errors import InputError
from convexhead.interpret.fitted import FittedHead, as_fitted
from convexhead.interpret.queries import query_maps

BATCH_NUMBERS = 4_000_000
"""Float64 numbers of workspace that a batch of samples may take. Chosen by hand: 32 MB."""


def token_contributions(model: Any, X: Any) -> Float[Tensor, "n s c"]:
    """Return ``Σ_k C_i[t, k]``, what each token adds to each logit. Over tokens they sum to the logits minus intercept.

    Parameters
    ----------
    model : fitted classifier or regressor, HeadModule, or FittedHead
        Any head and activation with pool "mean" or "cls".
    X : array, Tensor, or split of a token store (n, s, d)
        Tokens; those of a store are read a part at a time.

    Returns
    -------
    Tensor (n, s, c)
        float64.
    """
    fitted = _pooled(model)
    V = fitted.atoms.V
    parts = [torch.einsum("bske,kec->bsc", mixed, V) for mixed in _mixed_parts(fitted, X)]
    return torch.cat(parts)


def head_contributions(model: Any, X: Any) -> Float[Tensor, "n s k c"]:
    """Return ``C_i[t, k]``: as `token_contributions`, for every atom (attention head, neuron) by itself."""
    fitted = _pooled(model)
    V = fitted.atoms.V
    parts = [torch.einsum("bske,kec->bskc", mixed, V) for mixed in _mixed_parts(fitted, X)]
    return torch.cat(parts)


def head_lift(model: Any, X: Any, y: Int[Tensor, " n"]) -> Float[Tensor, "k c"]:
    """Say which head serves which classes: by how much each atom lifts the logit of the true class.

        L[k, c] = E[g_ikc | y_i = c] − E[g_ikc | y_i ≠ c],        g_ik = Σ_t C_i[t, k] − its mean over classes

    Logits matter up to a common shift, hence the centring. ``Σ_k L[k, c]`` is the lift of the whole head: a share of it
    can be read as a share of the work, and a negative one as work against the class.

    Parameters
    ----------
    X : array, Tensor, or split of a token store (n, s, d)
    y : Tensor (n,)
        The output that is each sample's class, ``0 .. c − 1``; samples with −1 are left out.

    Returns
    -------
    Tensor (k, c)
        float64; 0 for a class without samples, and for one that all samples have.
    """
    fitted = _pooled(model)
    k, _, c = fitted.atoms.V.shape
    own, total, start = torch.zeros(k, c).double(), torch.zeros(k, c).double(), 0
    for chunk in fitted.chunks(X):
        for x in chunk.split(_step(fitted, c)):
            data = fitted.activation.prepare(x, reuse=False)
            if (masks := fitted.activation.pack_masks(x)) is not None:
                data["masks"] = masks
            mixed = fitted.activation.mix(data, fitted.atoms.U, fitted.atoms.block)[:, 0]
            logits = torch.einsum("bke,kec->bkc", mixed, fitted.atoms.V)
            logits = logits - logits.mean(2, keepdim=True)
            labels = y[start : start + len(x)]
            start += len(x)
            is_own = (labels.unsqueeze(1) == torch.arange(c)).double()
            own += torch.einsum("bkc,bc->kc", logits, is_own)
            total += logits[labels >= 0].sum(0)
    count = torch.bincount(y[y >= 0], minlength=c).double()
    others = count.sum() - count
    lift = own / count.clamp_min(1) - (total - own) / others.clamp_min(1)
    return torch.where((count > 0) & (others > 0), lift, 0.0)


def _pooled(model: Any) -> FittedHead:
    fitted = as_fitted(model)
    if fitted.head.pool == "none":
        raise InputError("contributions need one output a sample: pool='mean' or pool='cls'")
    return fitted


def _step(fitted: FittedHead, per_atom: int) -> int:
    head = fitted.head
    widest = max(head.p * head.score_width, head.s * max(head.value_rows, per_atom))
    return max(1, BATCH_NUMBERS // max(1, len(fitted.atoms) * widest))


def _mixed_parts(fitted: FittedHead, X: Any) -> Iterator[Float[Tensor, "b s k e"]]:
    """Yield the pooled mixed tokens of every atom, split over source tokens: ``C`` before it meets ``V``."""
    head, atoms, group = fitted.head, fitted.atoms, fitted.group
    gates = fitted.mask_weights()
    step = _step(fitted, atoms.V.shape[2])
    for x in (part for chunk in fitted.chunks(X) for part in chunk.split(step)):
        if not len(atoms):
            yield x.new_zeros(len(x), head.s, 0, head.value_rows)
            continue
        if head.queries is not None:
            yield _looked_at_parts(fitted, x)
            continue
        masks = None if gates is None else (head.preactivation(head.prepare(x), gates, group) >= 0).double()
        split = _read_parts if head.reads_tokens else _linear_parts
        yield split(fitted, x, masks)


def _read_parts(fitted: FittedHead, x: Tensor, masks: Tensor | None) -> Tensor:
    """Split at the reading: column ``t`` of the pooled scores weighs token ``t``."""
    head, data = fitted.head, fitted.head.prepare(x)
    A = head.preactivation(data, fitted.atoms.U, fitted.group)
    S = head.pool_rows(A if masks is None else A * masks)
    each = torch.eye(head.s, dtype=x.dtype)
    return torch.cat([head.read(data, S * only) for only in each], dim=1)


def _looked_at_parts(fitted: FittedHead, x: Tensor) -> Tensor:
    """Split at the maps: weight ``t`` of each query's times what the atom's weights for that query read of ``t``."""
    maps, U = query_maps(fitted, x), fitted.atoms.U
    if U.ndim == 2:  # an atom has one query
        return (maps[:, :, fitted.group] * (x @ U.T)).unsqueeze(3)
    return torch.einsum("bsj,kjd,bsd->bsk", maps, U, x).unsqueeze(3)


def _linear_parts(fitted: FittedHead, x: Tensor, masks: Tensor | None) -> Tensor:
    """Split a linear function, ``S(X) = Σ_t ⟨∂S/∂x_t, x_t⟩``; it has one column, or one for each channel."""
    head, atoms = fitted.head, fitted.atoms
    x = x.detach().requires_grad_()
    parts = []
    for k in range(len(atoms)):
        one = slice(k, k + 1)
        if head.learns_mixing:
            A = head.preactivation(head.prepare(x), atoms.U[one], fitted.group[one])
            S = head.pool_rows(A if masks is None else A * masks[:, one])
        else:
            S = fitted.activation.mix(fitted.activation.prepare(x, reuse=False), atoms.U, atoms.block)
        (slope,) = torch.autograd.grad(S.sum(), x)
        part = slope * x.detach()
        parts.append(part if S.shape[-1] == head.d else part.sum(-1, keepdim=True))
    return torch.stack(parts, dim=2)
