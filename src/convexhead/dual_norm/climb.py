"""Ascent of a function from many points at once: each has a step of its own along its normalised gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.runtime.clock import never

LONGER, SHORTER = 1.5, 1 / 3
"""What a step is multiplied by where the value rose, and where it fell. Chosen by hand."""


def climb(
    z: Float[Tensor, "j k"],
    value_and_slope: Callable[[Tensor], tuple[Tensor, Tensor]],
    inside: Callable[[Tensor], Tensor],
    *,
    step: float,
    iterations: int,
    late: Callable[[], bool] = never,
) -> tuple[Float[Tensor, " j"], Float[Tensor, "j k"]]:
    """Ascend from every ``z_j``.

    Parameters
    ----------
    z : Tensor (j, k)
    value_and_slope : callable (z) -> (values (j,), gradients (j, k))
    inside : callable (z) -> z
        The nearest points of the set that is searched.
    step : float
        Length of the first steps.
    late : callable () -> bool
        Whether to end where the ascents are.

    Returns
    -------
    values : Tensor (j,)
        Never below those at the start.
    z : Tensor (j, k)
    """
    z = inside(z)
    values, slopes = value_and_slope(z)
    steps = values.new_full((len(z), 1), step)
    for _ in range(iterations):
        if late():
            break
        length = slopes.norm(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
        ahead = inside(z + steps * slopes / length)
        new_values, new_slopes = value_and_slope(ahead)
        better = new_values > values
        rose = better.unsqueeze(1)
        z, slopes = torch.where(rose, ahead, z), torch.where(rose, new_slopes, slopes)
        values, steps = torch.where(better, new_values, values), steps * torch.where(rose, LONGER, SHORTER)
    return values, z
