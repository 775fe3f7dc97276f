"""The clock and the history of a solve: what solvers tell while they work, and when they must stop."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

from torch import Tensor

from convexhead.runtime.clock import now
from convexhead.runtime.ranks import Ranks

GRACE, SHARE = 5.0, 0.2
"""Seconds, and share of the seconds so far, that a certificate may take after the clock or Ctrl-C has ended a solve.
Chosen by hand."""
State = dict[str, Tensor]
Resumable = Callable[[], tuple[State, State]]
"""Makes the tensors from which a solver resumes: those that all processes share, and those of this one's samples."""


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
        """Return plain values, for JSON."""
        return dict(vars(self))


@dataclass
class Monitor:
    """The clock, the history and the interruptions of one solve.

    Parameters
    ----------
    max_time : float or None
        Seconds after which solvers return what they have.
    callback : callable (Progress) or None
        Called with every new row.
    ranks : Ranks
        The processes that must stop together.
    """

    max_time: float | None = None
    callback: Callable[[Progress], None] | None = None
    ranks: Ranks = field(default_factory=Ranks)
    history: list[Progress] = field(default_factory=list)
    dual: float = -math.inf
    began: float = field(default_factory=now)
    before: float = 0.0
    """Seconds that the solve had taken before it was resumed; `max_time` begins anew."""
    interrupted: bool = False
    save: Callable[[Resumable], None] | None = None
    """Called with each state from which the solve can be resumed."""

    def seconds(self) -> float:
        """Seconds that the solve has taken, before it was resumed too."""
        return self.before + now() - self.began

    def out_of_time(self) -> bool:
        """Whether to return, because of the clock or an interrupt; all processes get the same answer."""
        late = self.max_time is not None and now() - self.began > self.max_time
        late, self.interrupted = (bool(flag) for flag in self.ranks.largest(late, self.interrupted))
        return late or self.interrupted

    def out_of_grace(self) -> Callable[[], bool]:
        """Whether to end a certificate that begins now with the bound that it has; processes answer alike."""
        end = now() + max(GRACE, SHARE * self.seconds())
        return lambda: self.out_of_time() and bool(self.ranks.largest(now() > end)[0])

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C only asks to stop at the next step: a step that is cut in two may leave a model half changed, and
        several processes must not leave a sum one by one. A second Ctrl-C ends the step too."""

        def ask(signum: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as in workers, which their parent ends
        if ignored or threading.current_thread() is not threading.main_thread():
            yield
            return
        old = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, old)

    def offer(self, state: Resumable) -> None:
        """Note that the solve can be gone on from here; ``state`` makes the tensors, of all and of this process."""
        if self.save is not None:
            self.save(state)

    def record(self, objective: float, dual: float, heads: int) -> float:
        """Note a state; returns the estimated relative gap above the best lower bound so far."""
        # Estimates of the bound may be too good: those that an objective refutes are forgotten.
        self.dual = dual if objective < self.dual else max(self.dual, dual)
        gap = max(objective - self.dual, 0.0)
        self.history.append(Progress(self.seconds(), objective, gap, heads))
        if self.callback is not None:
            self.callback(self.history[-1])
        return gap / abs(objective) if objective else 0.0
