"""What solvers share: the clock, the history, and why a run stopped."""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from torch import Tensor

from convexhead.certificate import Certificate
from convexhead.problem import Atoms, Problem


class Stop(enum.Enum):
    """Why a solver returned; the value is a sentence for people."""

    CONVERGED = "the requested gap was reached"
    TIME = "max_time was reached"
    HEADS = "max_heads was reached before the requested gap"
    INTERRUPTED = "interrupted from the keyboard"
    SEARCHED = "searches found nothing to improve, but this ReLU head is too large for a proof"
    STALLED = "no further progress is possible in floating point"


@dataclass(frozen=True)
class Progress:
    """One row of a solver's history.

    Attributes
    ----------
    seconds : float
        Since the solve began.
    objective : float
        Of the model at that moment.
    gap : float
        Above the best lower bound so far, as the solver estimates it; a `Certificate` has the proven one.
    heads : int
        Atoms in the model.
    """

    seconds: float
    objective: float
    gap: float
    heads: int

    def to_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass
class Monitor:
    """Clock and history of one solve.

    Parameters
    ----------
    max_time : float or None
        Seconds after which solvers return what they have.
    callback : callable (Progress) or None
        Called with every new row.
    """

    max_time: float | None = None
    callback: Callable[[Progress], None] | None = None
    history: list[Progress] = field(default_factory=list)
    dual: float = -math.inf
    began: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def out_of_time(self) -> bool:
        return self.max_time is not None and self.seconds() > self.max_time

    def record(self, objective: float, dual: float, heads: int) -> float:
        """Note a state; returns the estimated relative gap above the best lower bound so far."""
        self.dual = max(self.dual, dual)
        gap = max(objective - self.dual, 0.0)
        self.history.append(Progress(self.seconds(), objective, gap, heads))
        if self.callback is not None:
            self.callback(self.history[-1])
        return gap / abs(objective) if objective else 0.0


@dataclass
class Solution:
    """What a solve returns: balanced ``atoms``, their ``certificate``, the ``history`` and why it stopped."""

    atoms: Atoms
    certificate: Certificate
    history: list[Progress]
    stop: Stop


def scaled_dual(problem: Problem, f: Tensor, sigma: float, beta: float) -> float:
    """Dual value of the scaled residual at outputs ``f``, given the gradient's spectral norm there: an estimate.

    What an intercept leaves of ``Σ_i R_i`` is charged at the scale of the targets, or a solver would stop before it
    has settled.
    """
    tau = min(1.0, beta / sigma) if sigma > 0 else 1.0
    Y = problem.Y.double()
    g = tau * problem.loss.residual(f.double(), Y)
    dual = -float(problem.loss.conjugate(g, Y).mean())
    if problem.fit_intercept:
        dual -= (1 + float(Y.abs().max())) * float(g.mean(0).sum(0).abs().sum())
    return dual
