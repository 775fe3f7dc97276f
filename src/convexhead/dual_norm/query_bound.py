"""The dual norm of the attentive head over all queries of a ball, by branch and bound: a proof.

    h(R) = max_{‖z‖ ≤ ρ, π} ‖ Σ_i φ_{Ez,π}(X_i) R_iᵀ ‖₂,      φ_{q,π}(X) = Xᵀ softmax(X q + π)

the largest reward that any query can have. There are finitely many log-weights of places ``π``: one bound for each. The
ball is covered by cells (`ball`); in each the norm has a bound that is exact to third order in the size of the
cell (`softmax`). Cells whose bound is not above the largest value found are done; the others are halved, those with
the largest bounds first. Every state gives a valid bound, so the search may stop at any time. Values are found by a
short ascent from the cells that promise most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.dual_norm.ball import cover
from convexhead.dual_norm.climb import climb
from convexhead.dual_norm.softmax import ROUNDING, Reads
from convexhead.runtime.clock import never

MAX_KEYS = 4
"""Largest dimension of keys in which branch and bound covers the ball. Chosen by hand: the work grows exponentially."""
MOST_CELLS = 100_000
"""Cells that are bounded at most. Chosen by hand: those that are left are kept."""
WORK = 1e12
"""Operations that a bound may take. Chosen by hand: some minutes of one core."""
ROUNDED = 1e-9
"""Relative amount by which the ball is taken larger: queries are in it up to rounding only. Chosen by hand."""
INSIDE = 1 - 2 * ROUNDED
"""Share of that larger radius at which found queries end: they are in the ball itself."""
ASCENT = 40
"""Steps of an ascent, at most. Chosen by hand."""


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
    place : int
        Which of the log-weights of places.
    cells : int
        Cells that were bounded.
    """

    upper: float
    lower: float
    z: Float[Tensor, " k"]
    place: int
    cells: int


def largest_reward(
    X: Float[Tensor, "n s d"],
    R: Float[Tensor, "n c"],
    E: Float[Tensor, "d k"],
    rho: float,
    *,
    places: Float[Tensor, "m s"] | None = None,
    starts: Float[Tensor, "b k"] | None = None,
    rtol: float = 1e-3,
    enough: float = 0.0,
    most_cells: int | None = None,
    late: Callable[[], bool] = never,
) -> QueryNorm:
    """Bound ``h(R)``.

    Parameters
    ----------
    X : Tensor (n, s, d)
        Tokens; rows of ``−∞`` are tokens that a sample does not have.
    R : Tensor (n, c)
        Residuals.
    E : Tensor (d, k)
        Queries are ``E z``; any numbers, ``k ≤ MAX_KEYS``.
    rho : float
        The ball's radius. The ball is taken larger by `ROUNDED`.
    places : Tensor (m, s) or None
        Log-weights of places, each on its own; None: none.
    starts : Tensor (b, k) or None
        Queries ``z`` that a search has found.
    rtol : float
        Relative width of the bounds at which the search ends.
    enough : float
        An upper bound that need not be improved on.
    most_cells : int or None
        Cells to bound at most, over all log-weights; None: as many as `WORK` allows.
    late : callable () -> bool
        Whether to end with the bound at hand.
    """
    X, E = X.double(), E.to(X.device).double()
    absent = X.isneginf().all(2)
    known = X.new_zeros(1, X.shape[1]) if places is None else places.to(X)
    if most_cells is None:
        most_cells = min(MOST_CELLS, int(WORK / operations(X.shape, R.shape[1], E.shape[1])))
    begin = X.new_zeros(1, E.shape[1])
    begin = begin if starts is None else torch.cat([begin, starts.to(begin)])

    def reads_on(place: int) -> Reads:
        return Reads.of(X, R, E, rho * (1 + ROUNDED), known[place].expand(len(X), -1).masked_fill(absent, -math.inf))

    found = []
    for place in range(len(known)):
        reads = reads_on(place)
        point = _ascend(reads, begin / reads.unit, late)
        found.append((point.value * reads.scale, point.z * reads.unit))
        if late() and place + 1 < len(known):  # there is no bound without the other maps
            highest = max(range(len(found)), key=lambda each: found[each][0])
            return QueryNorm(math.inf, *found[highest], highest, 0)
    # Of one map no bound is needed that is below what another attains.
    enough = max(enough, max(value for value, _ in found))
    parts: list[QueryNorm] = []
    for place, (_, z) in enumerate(found):
        left = most_cells - sum(part.cells for part in parts)
        parts.append(_largest(reads_on(place), place, z.unsqueeze(0), rtol, enough, left, late))
    best = max(parts, key=lambda part: part.lower)
    return replace(best, upper=max(part.upper for part in parts), cells=sum(part.cells for part in parts))


def _largest(
    reads: Reads,
    place: int,
    start: Float[Tensor, "1 k"],
    rtol: float,
    enough: float,
    most_cells: int,
    late: Callable[[], bool],
) -> QueryNorm:
    """`largest_reward` for one of the log-weights."""
    enough = enough / reads.scale - reads.neglected
    best = _ascend(reads, start / reads.unit, late)
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
        cells = cells.halve(metric)
        z, F = cells.boxes()
        values, fresh = reads.bound(z, F)
        done += len(z)
        top = int(values.argmax())
        if float(values[top]) > best.value:
            best = _ascend(reads, z[top : top + 1], late)
        open_cells = open_cells.select(order).merge(cells)
        bounds = torch.cat([bounds[order], torch.minimum(parents.repeat(2), fresh.nan_to_num(nan=math.inf))])
    upper = max(below, best.value, float(bounds.max()) if len(bounds) else 0.0)
    upper = (upper * (1 + ROUNDING) + reads.neglected) * reads.scale
    return QueryNorm(upper, best.value * reads.scale, best.z * reads.unit, place, done)


def operations(shape: tuple[int, ...], c: int, k: int) -> int:
    """Operations that a cell takes: a mean of tokens, its derivatives up to the second, and their sums over samples."""
    n, s, d = shape
    return (k + 1) * (k + 2) * n * (d * (s + c) + 20 * s)


@dataclass(frozen=True)
class _Point:
    value: float
    z: Float[Tensor, " k"]


def _ascend(reads: Reads, z: Float[Tensor, "b k"], late: Callable[[], bool]) -> _Point:
    """The highest point that ascents from every ``z`` reach within the ball."""
    inside = partial(_inside, reads)
    values, z = climb(z, reads.value_and_slope, inside, step=reads.rho / 4, iterations=ASCENT, late=late)
    top = int(values.argmax())
    return _Point(float(values[top]), z[top])


def _inside(reads: Reads, z: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    norm = z.norm(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    return z * (reads.rho * INSIDE / norm).clamp_max(1.0)
