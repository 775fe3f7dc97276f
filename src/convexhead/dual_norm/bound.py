"""The largest norm of a piecewise linear function on the unit sphere, by branch and bound: a proof, not a search.

    max_{‖u‖ ≤ 1} ‖g(u)‖,      g(u) = Lᵀ u + Σ_h c_h max(k_hᵀ u, 0)

The sphere is covered by the boxes of the faces of a cube, seen from its centre. A box with unit centre ``u₀`` lies in
the cone of angle ``θ`` around it, ``u = cos φ (u₀ + tan φ v)`` with ``v ⊥ u₀`` and ``φ ≤ θ``, where

* a score ``k_hᵀ u`` keeps its sign if ``a_h = |k_hᵀ u₀|`` exceeds ``t_h = tan θ ‖k_h − (k_hᵀ u₀) u₀‖``. The other
  ReLUs are ``δ_h k_hᵀ u`` with the slope ``δ_h = (k_hᵀ u₀ + t_h) / 2t_h`` up to ``(t_h² − a_h²) / 2t_h``;
* what is left is linear, ``Mᵀ u``, and with ``q = ‖Mᵀ u₀‖²``, ``b`` the norm of the part of ``M Mᵀ u₀`` orthogonal to
  ``u₀`` and ``λ`` the largest eigenvalue of ``M Mᵀ`` there, ``‖Mᵀ u‖² ≤ q cos² φ + 2b sin φ cos φ + λ sin² φ``.

Boxes whose bound is not above the best value found are done; the others are halved. Every state gives a valid bound,
so the search may stop at any time. The error of a box falls with the square of its size where ``g`` is smooth and with
its size at kinks, where maxima are as sharp: few boxes survive at any size, in the few dimensions this is meant for.

Rounding only ever raises a bound. Angles of boxes are widened by more than their centres are rounded; ``b²`` and ``λ``,
differences of terms as large as ``‖M‖²``, are raised by as much as can be lost in them; errors in scores and sums are
part of `Form.neglected`; what is not finite bounds nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.dual_norm.scores import Form
from convexhead.program.patterns import EPSILON
from convexhead.runtime.clock import never

MAX_DIMENSION = 6
"""Largest mixing dimension in which branch and bound covers the sphere. Chosen by hand: the work grows
exponentially."""
ROUNDING = 1e-11
"""Relative amount by which a bound is raised to cover rounding in float64."""
NUMBERS = 4_000_000
"""Float64 numbers of workspace that a batch of boxes may take. Chosen by hand: 32 MB."""
FEW, BATCH = 200, 512
"""Largest number of hyperplanes with which boxes share one function, and boxes examined at once then. Chosen by
hand."""
WIDER = 8 * EPSILON
"""Addition to the sine of a box's angle. Derived: it covers the rounding of the box's centre and sides."""
OVERHEAD = 20_000
"""Cost of a batch of boxes besides its scores, in scores; a box costs a fourth of the entries of ``M`` more. Chosen by
hand."""


def largest_norm(
    form: Form,
    *,
    lower: float = 0.0,
    rtol: float = 1e-6,
    enough: float = 0.0,
    work: float = 6e7,
    late: Callable[[], bool] = never,
) -> tuple[float, float, Float[Tensor, " w"]]:
    """Return bounds on ``max_{‖u‖ ≤ 1} ‖g(u)‖``.

    Parameters
    ----------
    form : Form
        ``g``, of dimension ``w ≤ MAX_DIMENSION``.
    lower : float
        A value known to be attained.
    rtol : float
        Relative width of the bounds at which the search ends.
    enough : float
        An upper bound that need not be improved on.
    work : float
        Scores evaluated at most: the sum over boxes of the hyperplanes that cut them, overhead included.
    late : callable () -> bool
        Whether to end with the bound at hand.

    Returns
    -------
    upper : float
        Never below the maximum; rounding and neglected directions included. Infinite where the search ended before it
        had been everywhere.
    lower : float
        The largest value found.
    u : Tensor (w,)
        Unit vector where the search found its largest value.
    """
    w = len(form.L)
    best_u = form.L.new_zeros(w)
    if w == 0:
        return form.neglected, lower, best_u
    found = below = done = 0.0
    # Best first: the largest bound of a batch of boxes, and g as it was when they were examined; the cover is not yet.
    parts = (part.split(2 * BATCH) for part in _cover(w, form.L))
    heap: list[tuple[float, int, Form, Tensor, Tensor]] = [
        (-math.inf, i, form, *part) for i, part in enumerate(zip(*parts, strict=True))
    ]
    count = len(heap)
    while heap:
        target = max(lower * (1 + rtol), enough)
        if -heap[0][0] <= target or done > work or late():
            break
        key, _, local, centers, halves = heapq.heappop(heap)
        if key > -math.inf:
            if len(local.K) > FEW:
                done += len(local.K)
                local = _within(local, centers, halves)
            centers, halves = _halve(centers, halves)
        value, bounds, u = _examine(local, centers, halves)
        done += len(centers) * (len(local.K) + local.L.numel() / 4) + OVERHEAD
        top = int(value.argmax())
        if float(value[top]) > found:
            found, best_u = float(value[top]), u[top]
            lower = max(lower, found)
        target = max(lower * (1 + rtol), enough)
        bounds = bounds.nan_to_num(nan=math.inf)
        left = bounds > target
        below = max(below, float(torch.where(left, 0.0, bounds).max()))
        order = bounds.argsort(descending=True)[: int(left.sum())]
        # Many hyperplanes: a box is worth a function of its own, without those that do not cut it.
        for boxes in order.split(1 if len(local.K) > FEW else BATCH) if len(order) else ():
            count += 1
            heapq.heappush(heap, (-float(bounds[boxes[0]]), count, local, centers[boxes], halves[boxes]))
    upper = max(below, lower, -heap[0][0] if heap else 0.0)
    return upper * (1 + ROUNDING) + form.neglected, lower, best_u


def _within(form: Form, center: Float[Tensor, "1 w"], half: Float[Tensor, "1 w"]) -> Form:
    """``g`` within one box: scores that keep their sign are linear there."""
    norm = center.norm()
    a = form.K @ (center[0] / norm)
    theta = torch.asin(half.norm() / norm + WIDER)
    cut = a.abs() < theta.tan() * (1 - a.square()).clamp_min(0).sqrt() * (1 + ROUNDING) + WIDER
    on = ~cut & (a > 0)
    return Form(form.L + form.K[on].T @ form.c[on], form.K[cut], form.c[cut])


def _cover(w: int, like: Tensor) -> tuple[Float[Tensor, "b w"], Float[Tensor, "b w"]]:
    """Centres and half-widths of boxes that cover the faces of the cube ``[−1, 1]^w``, in cones of at most 30°."""
    parts = max(1, math.ceil(2 * math.sqrt(w - 1)))
    ticks = (2 * torch.arange(parts, dtype=like.dtype, device=like.device) + 1) / parts - 1
    within = torch.cartesian_prod(*[ticks] * (w - 1)).view(-1, w - 1) if w > 1 else like.new_zeros(1, 0)
    centers, halves = [], []
    for axis in range(w):
        for sign in (1.0, -1.0):
            centers.append(torch.cat([within[:, :axis], like.new_full((len(within), 1), sign), within[:, axis:]], 1))
            half = like.new_full((len(within), w), 1.0 / parts)
            half[:, axis] = 0.0
            halves.append(half)
    return torch.cat(centers), torch.cat(halves)


def _halve(
    centers: Float[Tensor, "b w"], halves: Float[Tensor, "b w"]
) -> tuple[Float[Tensor, "l w"], Float[Tensor, "l w"]]:
    """Each box cut in two across its longest side."""
    longest = halves.argmax(1, keepdim=True)
    quarter = torch.zeros_like(halves).scatter_(1, longest, halves.gather(1, longest) / 2)
    halves = halves - quarter
    return torch.cat([centers - quarter, centers + quarter]), torch.cat([halves, halves])


def _examine(
    form: Form, centers: Float[Tensor, "b w"], halves: Float[Tensor, "b w"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"], Float[Tensor, "b w"]]:
    """``‖g‖`` at the centre of each box, a bound on it over the box, and the unit centres."""
    h, (w, q) = len(form.K), form.L.shape
    outer = (form.K.unsqueeze(2) * form.c.unsqueeze(1)).view(h, w * q)
    size = form.c.norm(dim=1)
    values, bounds = [], []
    norm = centers.norm(dim=1)
    units = centers / norm.unsqueeze(1)
    radius = halves.norm(dim=1) / norm + WIDER  # sine of the cone's angle
    step = max(1, NUMBERS // max(1, 4 * h + 4 * w * (w + q)))
    for u, sine in zip(units.split(step), radius.split(step), strict=True):
        theta = torch.asin(sine)
        a = u @ form.K.T
        values.append((u @ form.L + a.clamp_min(0) @ form.c).norm(dim=1))
        t = theta.tan().unsqueeze(1) * (1 - a.square()).clamp_min(0).sqrt()
        t = t.clamp_min(torch.finfo(t.dtype).tiny)
        slope = ((a / t + 1) / 2).clamp(0, 1)
        remainder = ((t.square() - a.square()).clamp_min(0) / (2 * t)) @ size
        M = (slope @ outer).view(-1, w, q) + form.L
        Mu = torch.einsum("bwq,bw->bq", M, u)
        MMu = torch.einsum("bwq,bq->bw", M, Mu)
        along = Mu.square().sum(1)
        gram = M @ M.mT
        noise = 4 * (w + q) * EPSILON * gram.flatten(1).norm(dim=1)
        across = (MMu - along.unsqueeze(1) * u).norm(dim=1) + noise
        mixed = u.unsqueeze(2) * MMu.unsqueeze(1)
        gram = gram - mixed - mixed.mT + along.view(-1, 1, 1) * (u.unsqueeze(2) * u.unsqueeze(1))
        rest = torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0) + noise
        turn = torch.minimum(torch.atan2(across, (along - rest) / 2) / 2, theta)
        sin, cos = turn.sin(), turn.cos()
        square = along * cos.square() + 2 * across * sin * cos + rest * sin.square()
        bounds.append(square.sqrt() + remainder)
    return torch.cat(values), torch.cat(bounds), units
