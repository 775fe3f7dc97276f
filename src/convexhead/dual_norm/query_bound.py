"""The largest norm that a softmax query of a ball reads under a residual, by branch and bound: a proof.

    h(R) = max_{‖z‖ ≤ ρ} ‖ Σ_i φ_{Ez}(X_i) R_iᵀ ‖₂,      φ_q(X) = Xᵀ softmax(X q + π)

The ball is covered by cells (`ball`); in each the norm has a bound that is exact to third order in the size of the
cell (`softmax`). Cells whose bound is not above the largest value found are done; the others are halved, those with
the largest bounds first. Every state gives a valid bound, so the search may stop at any time. Values are found by a
short ascent from the cells that promise most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.dual_norm.ball import cover
from convexhead.dual_norm.softmax import ROUNDING, Reads
from convexhead.runtime.clock import never

MAX_KEYS = 4
"""Largest dimension of keys in which branch and bound covers the ball. Chosen by hand: the work grows exponentially."""
ASCENT = 40
"""Steps of an ascent, at most. Chosen by hand."""
INSIDE = 1 - 4 * torch.finfo(torch.float64).eps
"""Share of the radius at which points stay inside the ball for all rounding."""


@dataclass(frozen=True)
class QueryNorm:
    """Bounds ``lower ≤ h(R) ≤ upper``.

    Attributes
    ----------
    upper : float
        Proven, rounding included; infinite where the search ended before it had been everywhere.
    lower : float
        The largest value found, in float64.
    z : Tensor (k,)
        Where.
    cells : int
        Cells that were bounded.
    """

    upper: float
    lower: float
    z: Float[Tensor, " k"]
    cells: int


def largest_read(
    X: Float[Tensor, "n s d"],
    R: Float[Tensor, "n c"],
    E: Float[Tensor, "d k"],
    rho: float,
    *,
    log_weights: Float[Tensor, "#n s"] | None = None,
    starts: Float[Tensor, "b k"] | None = None,
    rtol: float = 1e-3,
    enough: float = 0.0,
    most_cells: int = 100_000,
    late: Callable[[], bool] = never,
) -> QueryNorm:
    """Bound ``h(R)``.

    Parameters
    ----------
    X, R : Tensor (n, s, d), (n, c)
        Tokens and residuals.
    E : Tensor (d, k)
        Queries are ``E z``; ``k ≤ MAX_KEYS``.
    rho : float
        The ball's radius.
    log_weights : Tensor (n, s) or (1, s), or None
        ``π``; −∞ takes a token out.
    starts : Tensor (b, k) or None
        Queries ``z`` that a search has found.
    rtol : float
        Relative width of the bounds at which the search ends.
    enough : float
        An upper bound that need not be improved on.
    most_cells : int
        Cells to bound at most.
    late : callable () -> bool
        Whether to end with the bound at hand.
    """
    reads = Reads.of(X, R, E, rho, log_weights)
    enough = enough / reads.scale - reads.neglected
    origin = reads.T.new_zeros(1, reads.k)
    best = _ascend(reads, origin if starts is None else torch.cat([origin, starts.to(origin) / reads.unit]))
    open_cells = cover(reads.k, reads.rho, reads.T)
    bounds = reads.T.new_full((len(open_cells),), math.inf)
    metric = torch.einsum("nsk,nsl,n->kl", reads.T, reads.T, reads.r)
    below, done, batch = 0.0, 0, max(1, reads.batch() // 2)
    while len(bounds):
        left = bounds > max(best.value * (1 + rtol), enough)
        below = max(below, float(torch.where(left, 0.0, bounds).max()))
        open_cells, bounds = open_cells.select(left), bounds[left]
        if not len(bounds) or done >= most_cells or late():
            break
        order = bounds.argsort(descending=True)
        cells, parents, order = open_cells.select(order[:batch]), bounds[order[:batch]], order[batch:]
        F = cells.boxes()[1]
        cells = cells.halve(torch.einsum("bak,kl,bal->ba", F, metric, F).argmax(1))
        z, F = cells.boxes()
        values, fresh = reads.bound(z, F)
        done += len(z)
        top = int(values.argmax())
        if float(values[top]) > best.value:
            best = _ascend(reads, z[top : top + 1])
        open_cells = open_cells.select(order).merge(cells)
        bounds = torch.cat([bounds[order], torch.minimum(parents.repeat(2), fresh.nan_to_num(nan=math.inf))])
    upper = max(below, best.value, float(bounds.max()) if len(bounds) else 0.0)
    upper = (upper * (1 + ROUNDING) + reads.neglected) * reads.scale
    return QueryNorm(upper, best.value * reads.scale, best.z * reads.unit, done)


@dataclass(frozen=True)
class _Point:
    value: float
    z: Float[Tensor, " k"]


def _ascend(reads: Reads, z: Float[Tensor, "b k"]) -> _Point:
    """The highest point that ascents from every ``z`` reach within the ball."""
    z = _inside(reads, z)
    values, slopes = reads.value_and_slope(z)
    step = values.new_full((len(z), 1), reads.rho / 4)
    for _ in range(ASCENT):
        length = slopes.norm(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
        ahead = _inside(reads, z + step * slopes / length)
        new_values, new_slopes = reads.value_and_slope(ahead)
        better = new_values > values
        z, slopes = torch.where(better.unsqueeze(1), ahead, z), torch.where(better.unsqueeze(1), new_slopes, slopes)
        values = torch.where(better, new_values, values)
        step = torch.where(better.unsqueeze(1), 1.5 * step, step / 3)
    top = int(values.argmax())
    return _Point(float(values[top]), z[top])


def _inside(reads: Reads, z: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    norm = z.norm(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    return z * (reads.rho * INSIDE / norm).clamp_max(1.0)
