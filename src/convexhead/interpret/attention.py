"""Where a logit comes from: the contribution of every token to every output of an attention head.

With a linear activation and one pooled output a sample, self-attention is

    f_i = (1/s) Σ_k q_i U_k X_iᵀ X_i V_k + b,        q_i = P X_i  (1, d)

and ``X_iᵀ X_i = Σ_t x_t x_tᵀ`` is a sum over the key tokens ``x_t (d,)``, so the logits are one too:

    C_i[t] = (1/s) Σ_k (q_i U_k x_t) (x_tᵀ V_k)  (c,)        Σ_t C_i[t] = f_i − b

The scalar ``q_i U_k x_t / s`` is the attention that head ``k`` pays to token ``t`` (averaged or picked over
the query tokens by the pooling), and ``x_tᵀ V_k`` what the token says about each class. Nothing is
approximated: the map of a class is an exact split of its logit.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.errors import InputError
from convexhead.heads.base import Head
from convexhead.problem import Atoms

BATCH_NUMBERS = 4_000_000
"""Numbers of workspace a batch of samples may take."""


def token_contributions(head: Head, atoms: Atoms, X: Float[Tensor, "n s d"]) -> Float[Tensor, "n s c"]:
    """``C_i[t]``: what each key token adds to each logit; summed over tokens, the logits minus the intercept.

    Parameters
    ----------
    head : Head
        Self-attention with pool "mean" or "cls".
    atoms : Atoms
        Weights of the linear activation.
    X : Tensor (n, s, d)
        Tokens.

    Returns
    -------
    Tensor (n, s, c)
        In the precision of the weights.
    """
    if head.name != "self-attention":
        raise InputError(f"token contributions are defined for the self-attention head, not for {head.name!r}")
    if head.pool == "none":
        raise InputError("token contributions need one output a sample: pool='mean' or pool='cls'")
    if X.ndim != 3 or tuple(X.shape[1:]) != (head.s, head.d):
        raise InputError(f"tokens have shape {tuple(X.shape)}, but this head takes (n, {head.s}, {head.d})")
    k, d, c = atoms.V.shape
    values = atoms.V.permute(1, 0, 2).reshape(d, k * c)
    step = max(1, BATCH_NUMBERS // max(1, head.s * k * c))
    parts = [atoms.V.new_zeros(0, head.s, c)]
    for tokens in X.split(step):
        x = tokens.to(atoms.V.device, atoms.V.dtype)
        queries = torch.einsum("brd,kde->bke", head.pool_tokens(x), atoms.U)
        attention = queries @ x.mT / head.s  # (b, k, s)
        said = (x @ values).view(len(x), head.s, k, c)
        parts.append(torch.einsum("bks,bskc->bsc", attention, said))
    return torch.cat(parts)
