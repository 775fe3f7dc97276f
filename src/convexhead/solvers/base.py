"""What every solver is: steps towards a gap, a model, and a dual point. `convexhead.drive` joins it to certificates.

A new solver is a class in a module of its own that fulfils `Solver`, and a line in `convexhead.solvers.select`.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.dual_norm.norm import NormOracle
from convexhead.program.atoms import Atoms
from convexhead.program.problem import Problem
from convexhead.program.sample_losses import SampleLosses
from convexhead.solvers.monitor import Monitor, State


class Stop(enum.Enum):
    """Why a solver returned; the value is a sentence for people."""

    CONVERGED = "the requested gap was reached"
    TIME = "max_time was reached"
    HEADS = "max_heads was reached before the requested gap"
    INTERRUPTED = "interrupted from the keyboard"
    SEARCHED = "searches found nothing to improve, but this head is too large for a proof that there is nothing"
    STALLED = "no further progress is possible in floating point"


class Solver(ABC):
    """A method that minimises one problem at one β.

    Parameters
    ----------
    problem : Problem
        In the precision of the passes.
    beta : float
    start : Atoms
        Where to begin, in the same precision.
    monitor : Monitor
        Clock and history.
    max_heads : int or None
        Atoms that the model may have.
    generator : torch.Generator or None
        Source of random starts and draws; a new one where None.
    oracle : NormOracle or None
        Of a problem with a ReLU; its certificate uses it too.

    Attributes
    ----------
    name : str
        The name that users choose it by.
    bounds_heads : bool
        Whether it takes ``max_heads``.
    in_single : bool
        Whether its passes may be in single precision.
    keeps_state : bool
        Whether it can `refine` its precision; else a new one begins at its model.
    most_steps : int
        Steps after which no progress is to be expected.
    target : float
        The relative gap that was asked for last.
    """

    name: ClassVar[str]
    bounds_heads: ClassVar[bool] = True
    in_single: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = False
    most_steps: int

    def __init__(
        self,
        problem: Problem,
        beta: float,
        start: Atoms,
        monitor: Monitor,
        *,
        max_heads: int | None = None,
        generator: torch.Generator | None = None,
        oracle: NormOracle | None = None,
    ) -> None:
        self.problem, self.beta, self.monitor = problem, beta, monitor
        self.max_heads, self.generator, self.oracle = max_heads, generator or torch.Generator(), oracle
        self.target = 0.0
        self._restored = False
        self._set_up(start)

    @abstractmethod
    def _set_up(self, start: Atoms) -> None:
        """Make what the steps need, and begin at ``start``."""

    @classmethod
    @abstractmethod
    def lacks(cls, problem: Problem, oracle: NormOracle | None) -> str | None:
        """What ``problem`` lacks for this method, in words that go on "needs ..."; None where it can be solved."""

    def advance(self, target: float) -> Stop:
        """Take steps until the estimated relative gap is at most ``target``, or until there is a reason to stop."""
        self.target = target
        if not self._restored:
            self.begin()
        self._restored = False
        for _ in range(self.most_steps):
            self.monitor.offer(self.state)
            stop = self.step()
            if stop is not Stop.CONVERGED and self.monitor.out_of_time():
                return Stop.TIME
            if stop is not None:
                return stop
        return Stop.STALLED

    @abstractmethod
    def begin(self) -> None:
        """Forget what steps remember of each other, but for the model."""

    @abstractmethod
    def step(self) -> Stop | None:
        """Take one step of the algorithm; return why there are no more, or None."""

    @abstractmethod
    def atoms(self) -> Atoms:
        """Return the best model."""

    def dual_point(self) -> Float[Tensor, "n r c"] | None:
        """Return outputs to take the dual point at; None for those of the model."""
        return None

    @abstractmethod
    def state(self) -> tuple[State, State]:
        """Return what the steps to come depend on: tensors of all processes, and of this process's samples."""

    def restore(self, shared: State, rows: State) -> None:
        """Go on from a `state`: the next `advance` takes the steps that would have come then."""
        self._restore(shared, rows)
        self._restored = True

    @abstractmethod
    def _restore(self, shared: State, rows: State) -> None:
        """Inverse of `state`."""

    def refine(self) -> Problem:
        """Go on in float64 with all that is known; return the problem there."""
        raise NotImplementedError(f"{self.name} does not change its precision")

    def rest(self) -> None:  # noqa: B027
        """Give up what `begin` can make again, while a certificate takes memory; most methods keep all they have."""

    def take_vectors(self, vectors: Float[Tensor, "j big m"]) -> None:  # noqa: B027
        """Take leading singular vectors that a certificate has found; most methods have no use for them."""

    def _ended(self, heads: int) -> Stop:
        """Why a model of so many atoms gets no better."""
        return Stop.HEADS if self.max_heads is not None and heads >= self.max_heads else Stop.STALLED


def scaled_dual(problem: Problem, f: Tensor, sigma: float, beta: float, intercept: Tensor) -> float:
    """Dual value of the scaled residual at outputs ``f``, given the gradient's spectral norm there: an estimate."""
    return _dual(problem, f, lambda losses, f: losses.residual(f.double()) / problem.n, sigma, beta, intercept)


def dual_value(problem: Problem, R: Float[Tensor, "n r c"], sigma: float, beta: float, intercept: Tensor) -> float:
    """The same of a residual in float64."""
    return _dual(problem, R, lambda _, R: R, sigma, beta, intercept)


def _dual(
    problem: Problem,
    x: Float[Tensor, "n r c"],
    residual: Callable[[SampleLosses, Tensor], Tensor],
    sigma: float,
    beta: float,
    intercept: Tensor,
) -> float:
    """Dual value of the ``residual`` of ``x`` that is scaled to ``τ σ ≤ β``, some samples at a time to save memory.

    What an intercept leaves of ``Σ_i R_i`` is charged at the scale of the targets and of the ``intercept`` that has
    been reached, or a solver would stop too early.
    """
    tau, parts = min(1.0, beta / sigma) if sigma > 0 else 1.0, []
    for rows in problem.rows:
        losses = problem.exact_losses.at(rows)
        R = tau * residual(losses, x[rows])
        conjugate = losses.conjugate(losses.unweigh(problem.n * R))
        parts.append(torch.cat([conjugate.sum().view(1), R.sum((0, 1))]))
    conjugate, left = problem.sum(torch.stack(parts).sum(0))[0].split([1, problem.c])
    dual = -float(conjugate) / problem.n
    if problem.fit_intercept:
        scale = 1 + problem.largest_target + float(intercept.abs().max())
        dual -= scale * float(left.abs().sum())
    return dual
