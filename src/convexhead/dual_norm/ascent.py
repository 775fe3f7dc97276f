"""Search for the mixing weights that a residual rewards most: batched ascent on the unit sphere from many starts.

    φ(u) = ‖Σ_i (P mix(X_i, u))ᵀ R_i‖_F,    ∇φ(u) = 𝒜_u*(R) G/‖G‖,    G = Σ_i (P mix(X_i, u))ᵀ R_i  (e, c)

On the cone of one activation pattern ``φ`` is ``‖Mᵀ u‖`` and ``u ← ∇φ/‖∇φ‖`` a step of the power method for
``M Mᵀ``. Across cones it may overshoot, so each start keeps a step ``α`` of its own, ``u ← (1 − α) u + α ∇φ/‖∇φ‖``,
halved where ``φ`` fell and doubled where it rose. The values found never exceed the maximum: they are estimates from
below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexhead.dual_norm.scores import all_tokens
from convexhead.program.activations import sample_gates
from convexhead.program.operator import Operator
from convexhead.runtime.clock import never


@dataclass(frozen=True)
class LocalMaxima:
    """The points at which ascents ended, highest first.

    Attributes
    ----------
    values : Tensor (k,)
        ``φ(u)``.
    U : Tensor (k, *mixing_shape)
        Unit mixing weights.
    G : Tensor (k, e, c)
        ``Σ_i (P mix(X_i, u))ᵀ R_i``: the value weights that go with them, up to sign and size.
    block : Tensor (k,)
    """

    values: Float[Tensor, " k"]
    U: Float[Tensor, "k ..."]
    G: Float[Tensor, "k e c"]
    block: Int[Tensor, " k"]

    def select(self, index: Tensor) -> LocalMaxima:
        """Return the maxima that ``index`` picks."""
        return LocalMaxima(self.values[index], self.U[index], self.G[index], self.block[index])

    def merge(self, other: LocalMaxima) -> LocalMaxima:
        """Return these maxima and ``other``'s, highest first."""
        pairs = ((self.values, other.values), (self.U, other.U), (self.G, other.G), (self.block, other.block))
        merged = LocalMaxima(*(torch.cat(pair) for pair in pairs))
        return merged.select(merged.values.argsort(descending=True))

    def distinct(self, *, cosine: float = 0.999, seen: Float[Tensor, "k w"] | None = None) -> LocalMaxima:
        """Keep the highest of a block's maxima whose directions (or as ``seen`` by the data) agree to ``cosine``."""
        flat = self.U.flatten(1)
        same = (flat @ flat.T > cosine) & (self.block.unsqueeze(1) == self.block)
        if seen is not None:
            same &= seen @ seen.T > cosine
        return self.select(~same.tril(-1).any(1))


def ascend(
    operator: Operator,
    R: Float[Tensor, "n r c"],
    U: Float[Tensor, "k ..."],
    block: Int[Tensor, " k"],
    *,
    iterations: int,
    rtol: float = 1e-7,
    ascents: int | None = None,
    late: Callable[[], bool] = never,
) -> LocalMaxima:
    """Ascend from every ``U_k``; starts whose ``φ`` rises by less than ``rtol`` rest.

    Parameters
    ----------
    operator : Operator
        With a ReLU, in any precision.
    R : Tensor (n, r, c)
        Residuals.
    U, block
        Starts ``(k, *mixing_shape)`` of any size but zero, and their channel groups ``(k,)``.
    ascents : int or None
        Only so many are gone on with, those that begin highest; None: all.
    late : callable () -> bool
        Whether to end where the ascents are.
    """
    U = _unit(U)
    G = operator.adjoint_times_mixing(R, U, block)
    values = G.flatten(1).norm(dim=1)
    if ascents is not None:
        highest = values.argsort(descending=True)[:ascents]
        U, G, values, block = U[highest], G[highest], values[highest], block[highest]
    step = torch.ones_like(values)
    moving = torch.arange(len(U), device=U.device)[values > 0]
    ahead = torch.zeros_like(U)
    fresh = moving
    for _ in range(iterations):
        if not len(moving) or late():
            break
        if len(fresh):
            unit = G[fresh] / values[fresh].view(-1, 1, 1)
            ahead[fresh] = _unit(operator.adjoint_times_values(R, unit, block[fresh], U[fresh]))
        a = step[moving].view(-1, *[1] * (U.ndim - 1))
        trial = _unit((1 - a) * U[moving] + a * ahead[moving])
        trial_G = operator.adjoint_times_mixing(R, trial, block[moving])
        trial_values = trial_G.flatten(1).norm(dim=1)
        gain = trial_values - values[moving]
        better = gain > 0
        rose = moving[better]
        U[rose], G[rose], values[rose] = trial[better], trial_G[better], trial_values[better]
        step[moving] = torch.where(better, (2 * step[moving]).clamp_max(1.0), step[moving] / 4)
        alive = torch.where(better, gain > rtol * trial_values, step[moving] > 1e-4)
        fresh, moving = moving[better & alive], moving[alive]
    order = values.argsort(descending=True)
    return LocalMaxima(values[order], U[order], G[order], block[order])


def starts(operator: Operator, k: int, generator: torch.Generator) -> tuple[Float[Tensor, "k ..."], Int[Tensor, " k"]]:
    """``k`` random starts for every channel group, half of them standard normal, half drawn from the data."""
    head, groups = operator.head, operator.head.n_groups
    gates = torch.cat(
        [sample_gates(head, k - k // 2, generator), sample_gates(head, k // 2, generator, all_tokens(operator))]
    )
    U = gates.to(operator.device, operator.dtype).view(-1, *head.mixing_shape)
    span = head.mixing_span()
    if span is not None:
        span = span.to(U)
        U = (U.flatten(1) @ span.T @ span).view_as(U)
    return U, torch.arange(len(U), device=operator.device) % groups


def _unit(U: Float[Tensor, "k ..."]) -> Float[Tensor, "k ..."]:
    norm = U.flatten(1).norm(dim=1).clamp_min(torch.finfo(U.dtype).tiny)
    return U / norm.view(-1, *[1] * (U.ndim - 1))
