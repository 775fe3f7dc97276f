"""Long jobs say through one callback how far they are.

A job calls ``notify(what, done, total, detail)`` as it goes, as often as it likes. Who passed the callback decides what
to show: the command line draws a bar on a terminal and writes a line now and then elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Notify(Protocol):
    """A callback that a long job tells how far it is."""

    def __call__(self, what: str, done: int = 0, total: int = 0, detail: str = "") -> None:
        """Show how far the job is.

        Parameters
        ----------
        what : str
            The work at hand, in a few words.
        done, total : int
            Finished pieces of work and all of them; ``total = 0`` where nobody knows.
        detail : str
            Figures that change as the work goes.
        """


def silent(what: str, done: int = 0, total: int = 0, detail: str = "") -> None:
    """Show nothing: a `Notify` for callers who gave none."""


class SolverRow(Protocol):
    """A solver describes a step by these numbers, as `convexhead.solvers.Progress` does."""

    @property
    def objective(self) -> float: ...

    @property
    def gap(self) -> float: ...

    @property
    def heads(self) -> int: ...


def solver_detail(row: SolverRow) -> str:
    """Describe a solver's step in words: objective, estimated relative gap and number of heads."""
    gap = row.gap / abs(row.objective) if row.objective else 0.0
    return f"objective {row.objective:.6g}, estimated gap {gap:.1e}, {row.heads} heads"


def solver_callback(
    notify: Notify, what: str, also: Callable[[SolverRow], None] | None = None
) -> Callable[[SolverRow], None]:
    """Make a callback for solvers that passes their steps on to ``notify``, and ``also`` to another one."""

    def callback(row: SolverRow) -> None:
        notify(what, detail=solver_detail(row))
        if also is not None:
            also(row)

    return callback
