"""The best model on the plane of two directions whose outputs are known: no products with the features.

    φ(s, t) = F((1 + s) f + t z) + (β/2) ‖(1 + s) W + t Δ‖²

``f`` and ``z`` are the outputs of weights ``(W, b)`` and of a step ``(Δ, δ)``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.program.problem import Problem
from convexhead.program.sample_losses import SampleLosses

MOST_STEPS = 8
"""Largest number of Newton steps on the plane. Chosen by hand."""
ENOUGH = 0.05
"""Share of the decrease so far that another step must promise. Chosen by hand."""
HALVINGS = 40
"""Largest number of halvings of a step. Derived: less than rounding is left of it."""


def minimise_on_plane(
    problem: Problem,
    beta: float,
    f: Float[Tensor, "n r c"],
    z: Float[Tensor, "n r c"],
    B: Float[Tensor, "c d1"],
    x: Float[Tensor, "c d1"],
    gradient: Float[Tensor, "c d1"],
    objective: float,
    agrees: float,
) -> tuple[float, float, float]:
    """Return ``s``, ``t`` and ``φ``, by Newton's method in two variables.

    Parameters
    ----------
    problem : Problem
        Its losses; ``f`` and ``z`` are in float64 whatever its precision is.
    B, x : Tensor (c, d + 1)
        ``[Wᵀ b]`` and ``[Δᵀ δ]``.
    gradient : Tensor (c, d + 1)
        At ``B``.
    objective : float
        ``φ(0, 0)``.
    agrees : float
        ``(0, 1)`` is taken without a search if ``φ`` falls by this share of ``−½⟨gradient, x⟩``, which is what the
        quadratic model says of a solution of a Newton system.
    """
    plane = _Plane(problem, beta, f, z, B, x)
    best, lowest = torch.tensor([0.0, 1.0], dtype=torch.float64), plane.value(0.0, 1.0)
    if objective - lowest >= -agrees * float((gradient * x).sum()) / 2:
        return 0.0, 1.0, lowest
    if not lowest < objective:
        best, lowest = torch.zeros_like(best), objective
    for _ in range(MOST_STEPS):
        move, promised = plane.newton(*best.tolist())
        for _ in range(HALVINGS):
            value = plane.value(*(best + move).tolist())
            if value <= lowest - 1e-4 * promised:
                break
            move, promised = move / 2, promised / 2
        else:
            break
        best, lowest = best + move, value
        if promised < ENOUGH * (objective - lowest):
            break
    s, t = best.tolist()
    return s, t, lowest


class _Plane:
    """``φ``, and its Newton steps."""

    def __init__(self, problem: Problem, beta: float, f: Tensor, z: Tensor, B: Tensor, x: Tensor) -> None:
        self.problem, self.beta, self.f, self.z = problem, beta, f, z
        both = torch.stack([B[:, :-1].flatten(), x[:, :-1].flatten()])
        self.inner = (both @ both.T).cpu()

    def value(self, s: float, t: float) -> float:
        """``φ``, which may be NaN far away."""
        parts = [losses.value(u).sum() for _, losses, u in self._parts(s, t)]
        at = torch.tensor([1 + s, t], dtype=torch.float64)
        total = float(self.problem.sum(torch.stack(parts).sum())[0])
        return total / self.problem.n + self.beta * float(at @ self.inner @ at) / 2

    def newton(self, s: float, t: float) -> tuple[Tensor, float]:
        """The step, and what ``φ`` falls by along it, to first order."""
        total = self.f.new_zeros(5)
        for rows, losses, u in self._parts(s, t):
            f, z, R = self.f[rows], self.z[rows], losses.residual(u)
            of_f, of_z = losses.hessian_times(u, f), losses.hessian_times(u, z)
            pairs = (R, f), (R, z), (of_f, f), (of_z, f), (of_z, z)
            total += torch.stack([(a * b).sum() for a, b in pairs])
        slopes, curvatures = (self.problem.sum(total)[0].cpu() / self.problem.n).split([2, 3])
        at = torch.tensor([1 + s, t], dtype=torch.float64)
        g, H = slopes + self.beta * (self.inner @ at), curvatures[[0, 1, 1, 2]].view(2, 2) + self.beta * self.inner
        scale = H.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        g, coupled = g / scale, float(H[0, 1] / scale.prod())  # the diagonal is 1
        ridge = 1 + 1e-12
        u, v = g.tolist()
        det = ridge * ridge - coupled * coupled
        move = torch.tensor([coupled * v - ridge * u, coupled * u - ridge * v], dtype=torch.float64) / det
        return move / scale, -float(g @ move)

    def _parts(self, s: float, t: float) -> Iterator[tuple[slice, SampleLosses, Float[Tensor, "b r c"]]]:
        """Some samples at a time, with their outputs."""
        for rows in self.problem.rows:
            losses = self.problem.losses.at(rows).to(torch.float64)
            yield rows, losses, (1 + s) * self.f[rows] + t * self.z[rows]
