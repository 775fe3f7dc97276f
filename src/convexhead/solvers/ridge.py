"""The linear head: one smooth, strongly convex problem, by L-BFGS.

minimise  F(P X W + b) + (β/2) ‖W‖²
"""

from __future__ import annotations

import torch

from convexhead.dual_norm.norm import NormOracle
from convexhead.program.atoms import Atoms
from convexhead.program.problem import Problem
from convexhead.solvers.base import Solver, Stop
from convexhead.solvers.factored import FactoredDescent
from convexhead.solvers.monitor import State
from convexhead.solvers.whitening import Whitening


class RidgeDescent(Solver):
    """L-BFGS on ``W`` and ``b``.

    1. Now and then, bound the gap by the gradient: without an intercept ``P − D = ‖∇_W‖²/(2β)``; stop where it is
       small.
    2. Take an L-BFGS step. Well-scaled tokens need some tens of them.
    3. Where that was not enough, go on in the coordinates of `Whitening`, in which channels of unequal scales and
       correlated ones curve the objective about alike.

    One `step` is one of L-BFGS. Parameters are those of `Solver`; the head has one atom whatever ``max_heads`` is.
    """

    name = "ridge"
    check_every = 5
    most_steps = 100_000
    slow = (50, 300)
    """Numbers of iterations at which curvature is measured and the coordinates change. Chosen by hand."""

    def _set_up(self, start: Atoms) -> None:
        self._descent = FactoredDescent(self.problem, start, self.beta)
        self._whitened_at: Atoms | None = None

    @classmethod
    def lacks(cls, problem: Problem, oracle: NormOracle | None) -> str | None:
        """No mixing weights."""
        return "head='linear'" if problem.head.learns_mixing else None

    def atoms(self) -> Atoms:
        """Return the iterate."""
        return self._descent.atoms

    def state(self) -> tuple[State, State]:
        """Return the iterate, the memory of L-BFGS, and the coordinates."""
        at = {} if self._whitened_at is None else self._whitened_at.state()
        at = {f"whitened at {name}": value for name, value in at.items()}
        return {**self._descent.state(), **at, "iteration": torch.tensor(self._iteration)}, {}

    def _restore(self, shared: State, rows: State) -> None:
        at = {name.removeprefix("whitened at "): value for name, value in shared.items() if name.startswith("whitened")}
        self._whitened_at = Atoms.restored(at) if at else None
        self._descent = FactoredDescent.restored(self.problem, shared, self.beta, self._coordinates())
        self._iteration = int(shared["iteration"])

    def begin(self) -> None:
        """Count iterations anew."""
        self._iteration = 0

    def step(self) -> Stop | None:
        """Take an iteration of L-BFGS, in new coordinates if it is time."""
        if self._iteration % self.check_every == 0 and self._gap() <= self.target:
            return Stop.CONVERGED
        if self._iteration in self.slow:
            self._whitened_at = self.atoms()
            self._descent = FactoredDescent(self.problem, self.atoms(), self.beta, self._coordinates())
        self._iteration += 1
        if self._descent.step():
            return None
        return Stop.CONVERGED if self._gap() <= self.target else Stop.STALLED

    def _coordinates(self) -> Whitening | None:
        """Of the curvature where the descent was last slow."""
        at = self._whitened_at
        return None if at is None else Whitening(self.problem, at, self.problem.outputs(at), self.beta)

    def _gap(self) -> float:
        """``P − D`` is ``‖∇‖²/(2β)`` exactly where no intercept is fitted: the gradient is all that duality lacks."""
        gradient = self._descent.gradient
        if gradient is None:
            gradient = self.problem.value_and_gradient(self.atoms(), self.beta).gradient
        missing = float(gradient.V.double().square().sum()) / (2 * self.beta)
        return self.monitor.record(self._descent.value, self._descent.value - missing, 1)
