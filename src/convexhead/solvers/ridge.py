"""The linear head: one smooth, strongly convex problem, ``min F(P X W + b) + β/2 ‖W‖²``, by L-BFGS.

Well-scaled tokens need some tens of steps. Where that is not enough, the descent goes on in the coordinates of
`Whitening`, in which channels of unequal scales and correlated ones curve the objective about alike.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from convexhead.program.atoms import Atoms
from convexhead.program.problem import Problem
from convexhead.solvers.base import Monitor, Stop
from convexhead.solvers.factored import FactoredDescent
from convexhead.solvers.whitening import Whitening


class RidgeDescent:
    """L-BFGS on ``W`` and ``b``; the gap is estimated from the dual point that the gradient gives."""

    check_every = 5
    max_iterations = 100_000
    slow = (50, 300)
    """Iterations at which curvature is looked at and the coordinates change."""

    def __init__(self, problem: Problem, beta: float, start: Atoms, monitor: Monitor) -> None:
        self.problem, self.beta, self.monitor = problem, beta, monitor
        self._descent = FactoredDescent(problem, start, beta)
        self._whitened_at: Atoms | None = None
        self._first = 0

    def atoms(self) -> Atoms:
        """The iterate."""
        return self._descent.atoms

    def dual_point(self) -> None:
        """The dual point is taken at the model's own outputs."""
        return None

    def _state(self, iteration: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the iterations to come depend on."""
        at = {} if self._whitened_at is None else self._whitened_at.state()
        at = {f"whitened at {name}": value for name, value in at.items()}
        return {**self._descent.state(), **at, "iteration": torch.tensor(iteration)}, {}

    def restore(self, shared: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's tensors."""
        at = {name.removeprefix("whitened at "): value for name, value in shared.items() if name.startswith("whitened")}
        self._whitened_at = Atoms.restored(at) if at else None
        self._descent = FactoredDescent.restored(self.problem, shared, self.beta, self._coordinates())
        self._first = int(shared["iteration"])

    def advance(self, target: float) -> Stop:
        """Iterate until the estimated relative gap is at most ``target``."""
        first, self._first = self._first, 0
        for iteration in range(first, self.max_iterations):
            self.monitor.offer(partial(self._state, iteration))
            if iteration % self.check_every == 0 and self._gap() <= target:
                return Stop.CONVERGED
            if self.monitor.out_of_time():
                return Stop.TIME
            if iteration in self.slow:
                self._whitened_at = self.atoms()
                self._descent = FactoredDescent(self.problem, self.atoms(), self.beta, self._coordinates())
            if not self._descent.step():
                return Stop.CONVERGED if self._gap() <= target else Stop.STALLED
        return Stop.STALLED

    def _coordinates(self) -> Whitening | None:
        """Of the curvature where the descent was last slow."""
        at = self._whitened_at
        return None if at is None else Whitening(self.problem, at, self.problem.outputs(at), self.beta)

    def _gap(self) -> float:
        """``P − D`` is ``‖∇‖²/(2β)`` exactly where no intercept is fitted: the gradient is all that duality lacks."""
        gradient = self.problem.value_and_gradient(self.atoms(), self.beta).gradient
        missing = float(gradient.V.double().square().sum()) / (2 * self.beta)
        return self.monitor.record(self._descent.value, self._descent.value - missing, 1)
