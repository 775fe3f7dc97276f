"""Limited-memory BFGS on a flat vector, one evaluation at a time.

The inverse Hessian estimate is kept in its compact form (Byrd, Nocedal & Schnabel 1994, theorem 2.2): with steps ``S``
and gradient differences ``Y`` as rows, ``R`` the upper triangle of ``S Yᵀ`` and ``D`` its diagonal,

    H g = γ g + Sᵀ a − γ Yᵀ u,    u = R⁻¹ S g,    a = R⁻ᵀ ((D + γ Y Yᵀ) u − γ Y g),

four matrix-vector products instead of a chain of dot products. The line search is for the weak Wolfe conditions, by
bracketing and safeguarded cubic steps. The caller owns the loop: `LBFGS.step` makes one accepted iterate, so clocks,
checks and interrupts need no hooks in here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg.blas import dtrsv
from torch import Tensor

Vector = Float[Tensor, " m"]


class Pairs:
    """The last ``memory`` pairs of steps and gradient differences, oldest overwritten first."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.clear()

    def clear(self) -> None:
        self.S = self.Y = torch.empty(0, 0)
        self.order: list[int] = []
        self.SY = self.YY = torch.zeros(self.memory, self.memory, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.order)

    def append(self, s: Vector, y: Vector) -> None:
        if not self.order:
            self.S = s.new_empty(self.memory, len(s))
            self.Y = s.new_empty(self.memory, len(s))
            self.SY, self.YY = torch.zeros_like(self.SY), torch.zeros_like(self.YY)
        row = len(self.order) if len(self.order) < self.memory else self.order.pop(0)
        self.S[row], self.Y[row] = s, y
        self.order.append(row)
        filled = len(self.order)
        self.SY[:filled, row] = (self.S[:filled] @ y).double().cpu()
        self.SY[row, :filled] = (self.Y[:filled] @ s).double().cpu()
        self.YY[:filled, row] = self.YY[row, :filled] = (self.Y[:filled] @ y).double().cpu()

    def apply(self, g: Vector) -> Vector:
        """``H g``."""
        filled, order = len(self.order), self.order
        SY, YY = (part.numpy()[np.ix_(order, order)] for part in (self.SY, self.YY))
        gamma = SY[-1, -1] / YY[-1, -1]
        S, Y = self.S[:filled], self.Y[:filled]
        Sg, Yg = ((part @ g).double().cpu().numpy()[order] for part in (S, Y))
        u = dtrsv(SY, Sg)  # reads the upper triangle alone
        inner = SY.diagonal() * u + gamma * (YY @ u - Yg)
        back = np.empty((2, filled))
        back[0, order] = dtrsv(SY, inner, trans=1)
        back[1, order] = gamma * u
        along_S, along_Y = torch.from_numpy(back).to(g.device, g.dtype)
        return gamma * g + along_S @ S - along_Y @ Y


class LBFGS:
    """The state of a minimisation.

    Parameters
    ----------
    function : callable (x) -> (value, gradient, outputs)
        Smooth, with ``x`` and the gradient flat tensors ``(m,)``. ``outputs`` are whatever else it made there.
    x : Tensor (m,)
        The start.
    memory : int
        Pairs of steps and gradient differences kept.

    Attributes
    ----------
    x, value, gradient, outputs
        The current iterate.
    evaluations : int
        Calls of ``function`` so far.
    """

    max_trials = 12
    decrease, curvature = 1e-4, 0.9

    def __init__(self, function: Callable[[Tensor], tuple[float, Tensor, Tensor]], x: Vector, memory: int = 30) -> None:
        self.function, self.x = function, x
        self.value, self.gradient, self.outputs = function(x)
        self.evaluations = 1
        self.pairs = Pairs(memory)

    def state(self) -> dict[str, Tensor]:
        """Return everything but ``x``, in tensors of its own."""
        pairs = self.pairs
        filled = len(pairs)
        return {
            "value": torch.tensor(self.value, dtype=torch.float64),
            "gradient": self.gradient,
            "order": torch.tensor(pairs.order, dtype=torch.int64),
            "steps": pairs.S[:filled].clone(),
            "differences": pairs.Y[:filled].clone(),
            "SY": pairs.SY.clone(),
            "YY": pairs.YY.clone(),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Resume the minimisation of which these are `state` and ``x``."""
        self.value, self.gradient = float(state["value"]), state["gradient"]
        pairs, filled = self.pairs, len(state["order"])
        pairs.clear()
        if filled:
            pairs.order = state["order"].tolist()
            pairs.S, pairs.Y = (self.x.new_empty(pairs.memory, len(self.x)) for _ in range(2))
            pairs.S[:filled], pairs.Y[:filled] = state["steps"], state["differences"]
            pairs.SY, pairs.YY = state["SY"].cpu(), state["YY"].cpu()

    def step(self) -> bool:
        """Move to the next iterate; False where no decrease can be found in this precision."""
        d = -self.pairs.apply(self.gradient) if self.pairs else -self.gradient
        slope = float(torch.dot(d, self.gradient))
        if not slope < 0:
            if not self.pairs:
                return False
            self.pairs.clear()
            return self.step()
        t = 1.0 if self.pairs else min(1.0, 1.0 / float(self.gradient.norm()))
        low, high = (0.0, self.value, slope), None
        for _ in range(self.max_trials):
            x = self.x + t * d
            value, gradient, outputs = self.function(x)
            self.evaluations += 1
            new_slope = float(torch.dot(gradient, d)) if math.isfinite(value) else math.inf
            if not value <= self.value + self.decrease * t * slope:
                high = (t, value, new_slope)
            elif new_slope < self.curvature * slope:
                low = (t, value, new_slope)
            else:
                return self._accept(x, value, gradient, outputs)
            t = 4 * t if high is None else _between(low, high)
        if low[0] == 0.0:
            if not self.pairs:
                return False
            self.pairs.clear()
            return self.step()
        x = self.x + low[0] * d
        value, gradient, outputs = self.function(x)
        self.evaluations += 1
        return self._accept(x, value, gradient, outputs)

    def _accept(self, x: Tensor, value: float, gradient: Tensor, outputs: Tensor) -> bool:
        self._remember(x - self.x, gradient - self.gradient)
        self.x, self.value, self.gradient, self.outputs = x, value, gradient, outputs
        return True

    def _remember(self, s: Tensor, y: Tensor) -> None:
        """Keep a pair of positive curvature."""
        sy = float(torch.dot(s, y))
        if sy > torch.finfo(s.dtype).eps * float(s.norm() * y.norm()):
            self.pairs.append(s, y)


def _between(low: tuple[float, float, float], high: tuple[float, float, float]) -> float:
    """Minimum of the cubic through two points with slopes, kept well inside their interval."""
    (a, fa, ga), (b, fb, gb) = low, high
    width = b - a
    t = a + width / 2
    if math.isfinite(fb) and math.isfinite(gb):
        d1 = ga + gb - 3 * (fa - fb) / (a - b)
        square = d1 * d1 - ga * gb
        if square >= 0:
            d2 = math.copysign(math.sqrt(square), width)
            denominator = gb - ga + 2 * d2
            if denominator != 0:
                t = b - width * (gb + d2 - d1) / denominator
    return min(max(t, a + 0.1 * width), b - 0.1 * width)
