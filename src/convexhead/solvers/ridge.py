"""The linear head: one smooth, strongly convex problem, ``min F(P X W + b) + β/2 ‖W‖²``, by L-BFGS."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from convexhead.problem import Atoms, Problem
from convexhead.solvers.base import Monitor, Stop
from convexhead.solvers.factored import FactoredDescent


class RidgeDescent:
    """L-BFGS on ``W`` and ``b``; the gap is estimated from the dual point that the gradient gives."""

    check_every = 5
    max_iterations = 100_000

    def __init__(self, problem: Problem, beta: float, start: Atoms, monitor: Monitor) -> None:
        self.problem, self.beta, self.monitor = problem, beta, monitor
        self._descent = FactoredDescent(problem, start, beta)
        self._first = 0

    def atoms(self) -> Atoms:
        """The iterate."""
        return self._descent.atoms

    def witness(self) -> None:
        """The dual point is taken at the model's own outputs."""
        return None

    def _state(self, iteration: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the iterations to come depend on."""
        return {**self._descent.state(), "iteration": torch.tensor(iteration)}, {}

    def restore(self, shared: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's tensors."""
        self._descent = FactoredDescent.restored(self.problem, shared, self.beta)
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
            if not self._descent.step():
                return Stop.CONVERGED if self._gap() <= target else Stop.STALLED
        return Stop.STALLED

    def _gap(self) -> float:
        """``P − D`` is ``‖∇‖²/(2β)`` exactly where no intercept is fitted: the gradient is all that duality lacks."""
        _, _, gV, _ = self.problem.value_and_gradient(self.atoms(), self.beta)
        missing = float(gV.double().square().sum()) / (2 * self.beta)
        return self.monitor.record(self._descent.value, self._descent.value - missing, 1)
