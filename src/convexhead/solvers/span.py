"""The best model in the span of a few whose outputs are known: no products with the features.

    φ(a) = F(Σ_j a_j f_j) + (β/2) ‖Σ_j a_j W_j‖²

``f_j`` are the outputs of weights ``(W_j, b_j)``: a model and a step from it, or models of other β.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.program.problem import Problem
from convexhead.program.sample_losses import SampleLosses

Shares = Float[Tensor, " k"]
MOST_STEPS = 8
"""Largest number of Newton steps in the span. Chosen by hand."""
ENOUGH = 0.05
"""Share of the decrease so far that another step must promise. Chosen by hand. What it will promise is known from what
the last one missed of its quadratic model."""
HALVINGS = 40
"""Largest number of halvings of a step. Derived: less than rounding is left of it."""
RIDGE = 1e-12
"""What is added to the Hessian, whose diagonal is 1. Derived: some units of rounding, for models that are alike."""


class Span:
    """``φ``, and where it is least.

    Parameters
    ----------
    problem : Problem
        Its losses.
    beta : float
    outputs : sequence of Tensor (n, r, c)
        ``f_j``. Samples are computed in the precision of the first; sums over them are in float64.
    weights : sequence of Tensor (c, d + 1)
        ``[W_jᵀ b_j]`` in float64.
    """

    def __init__(
        self,
        problem: Problem,
        beta: float,
        outputs: Sequence[Float[Tensor, "n r c"]],
        weights: Sequence[Float[Tensor, "c d1"]],
    ) -> None:
        self.problem, self.beta, self.outputs = problem, beta, outputs
        flat = torch.stack([B[:, :-1].flatten() for B in weights])
        self.inner = (flat @ flat.T).cpu()

    def value(self, a: Shares) -> float:
        """``φ``, which may be NaN far away."""
        parts = [losses.value(u).sum(dtype=torch.float64) for _, losses, u in self._parts(a)]
        total = float(self.problem.sum(torch.stack(parts).sum())[0])
        return total / self.problem.n + self.beta * float(a @ self.inner @ a) / 2

    def minimise(self, a: Shares, value: float) -> tuple[Shares, float]:
        """Shares with the least ``φ`` and its value, by Newton's method from ``a`` with its ``value``."""
        first, rounding = value, torch.finfo(self.outputs[0].dtype).eps
        for _ in range(MOST_STEPS):
            move, promised = self._newton(a)
            if promised <= rounding * abs(value):  # which hides whether a move is right; the nearer, the more it is
                return a + move, value
            for _ in range(HALVINGS):
                lower = self.value(a + move)
                if lower <= value - 1e-4 * promised:
                    break
                move, promised = move / 2, promised / 2
                if promised <= rounding * abs(value):
                    return a, value
            else:
                break
            missed = value - lower - promised / 2
            a, value = a + move, lower
            if 9 * missed * missed < promised * ENOUGH * (first - value):
                break
        return a, value

    def _newton(self, a: Shares) -> tuple[Shares, float]:
        """The step, and what ``φ`` falls by along it, to first order."""
        k = len(self.outputs)
        total = self.outputs[0].new_zeros(k, k + 1, dtype=torch.float64)
        for rows, losses, u in self._parts(a):
            f = torch.stack([f[rows].to(u.dtype) for f in self.outputs])
            right = torch.cat([losses.hessian_times(u, f), losses.residual(u).unsqueeze(0)])
            total += torch.tensordot(f, right, dims=([1, 2, 3], [1, 2, 3]))
        curvatures, slopes = (self.problem.sum(total)[0].cpu() / self.problem.n).split([k, 1], dim=1)
        g, H = slopes.squeeze(1) + self.beta * (self.inner @ a), curvatures + self.beta * self.inner
        scale = H.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        g, H = g / scale, H / scale / scale.unsqueeze(1)
        H.diagonal().fill_(1 + RIDGE)
        move = -torch.linalg.solve_ex(H, g)[0]
        return move / scale, -float(g @ move)

    def _parts(self, a: Shares) -> Iterator[tuple[slice, SampleLosses, Float[Tensor, "b r c"]]]:
        """Some samples at a time, with their outputs."""
        for rows in self.problem.rows:
            losses = self.problem.losses.at(rows).to(self.outputs[0].dtype)
            yield rows, losses, sum(share * f[rows] for share, f in zip(a.tolist(), self.outputs, strict=True))
