"""Limited-memory BFGS on a flat vector, one evaluation at a time.

The two-loop recursion (Nocedal & Wright 2006, algorithm 7.4) with a line search for the weak Wolfe conditions by
bracketing and safeguarded cubic steps. The caller owns the loop: `LBFGS.step` makes one accepted iterate, so clocks,
checks and interrupts need no hooks in here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " m"]


class LBFGS:
    """State of a minimisation.

    Parameters
    ----------
    function : callable (x) -> (value, gradient)
        Smooth, with ``x`` and the gradient flat tensors ``(m,)``.
    x : Tensor (m,)
        The start.
    memory : int
        Pairs of steps and gradient differences kept.

    Attributes
    ----------
    x, value, gradient
        The current iterate.
    evaluations : int
        Calls of ``function`` so far.
    """

    max_trials = 12
    decrease, curvature = 1e-4, 0.9

    def __init__(self, function: Callable[[Tensor], tuple[float, Tensor]], x: Vector, memory: int = 30) -> None:
        self.function, self.x = function, x
        self.value, self.gradient = function(x)
        self.evaluations = 1
        self.pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=memory)

    def reshape(self, x: Vector, move: Callable[[Vector], Vector]) -> None:
        """Go on from ``x`` in another space; ``move`` takes remembered steps and gradient differences there."""
        pairs = [(move(s), move(y)) for s, y, _ in self.pairs]
        self.pairs.clear()
        self.x = x
        self.value, self.gradient = self.function(x)
        self.evaluations += 1
        for s, y in pairs:
            self._remember(s, y)

    def rotate(self, move: Callable[[Vector], Vector]) -> None:
        """Change coordinates by an orthogonal map: everything remembered goes along, nothing is evaluated."""
        self.x, self.gradient = move(self.x), move(self.gradient)
        self.pairs = deque(((move(s), move(y), rho) for s, y, rho in self.pairs), maxlen=self.pairs.maxlen)

    def direction(self) -> Vector:
        """Minus the inverse Hessian estimate times the gradient."""
        q = -self.gradient
        coefficients = []
        for s, y, rho in reversed(self.pairs):
            a = rho * torch.dot(s, q)
            q = q - a * y
            coefficients.append(a)
        if self.pairs:
            s, y, rho = self.pairs[-1]
            q = q / (rho * torch.dot(y, y))
        for (s, y, rho), a in zip(self.pairs, reversed(coefficients), strict=True):
            q = q + (a - rho * torch.dot(y, q)) * s
        return q

    def step(self) -> bool:
        """Move to the next iterate; False where no decrease can be found in this precision."""
        d = self.direction()
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
            value, gradient = self.function(x)
            self.evaluations += 1
            new_slope = float(torch.dot(gradient, d)) if math.isfinite(value) else math.inf
            if not value <= self.value + self.decrease * t * slope:
                high = (t, value, new_slope)
            elif new_slope < self.curvature * slope:
                low = (t, value, new_slope)
            else:
                return self._accept(x, value, gradient)
            t = 4 * t if high is None else _between(low, high)
        if low[0] == 0.0:
            if not self.pairs:
                return False
            self.pairs.clear()
            return self.step()
        x = self.x + low[0] * d
        value, gradient = self.function(x)
        self.evaluations += 1
        return self._accept(x, value, gradient)

    def _accept(self, x: Tensor, value: float, gradient: Tensor) -> bool:
        self._remember(x - self.x, gradient - self.gradient)
        self.x, self.value, self.gradient = x, value, gradient
        return True

    def _remember(self, s: Tensor, y: Tensor) -> None:
        """Keep a pair of positive curvature."""
        sy = float(torch.dot(s, y))
        if sy > torch.finfo(s.dtype).eps * float(s.norm() * y.norm()):
            self.pairs.append((s, y, 1.0 / sy))


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
