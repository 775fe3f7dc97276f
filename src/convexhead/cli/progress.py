"""How long jobs show their progress on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from time import monotonic

from convexhead.cli.output import errors, speaks_for_all
from convexhead.runtime.progress import Notify, silent

FIRST, EVERY = 5.0, 10.0
"""Seconds until the first line of a log, so that quick commands stay silent, and between lines after it."""
SHARE = 0.05
"""Least share of the time so far between two lines: the log of a day has some hundred lines."""


@contextlib.contextmanager
def shown_progress(quiet: bool, what: str = "starting") -> Iterator[Notify]:
    """A callback for long jobs; until its first news they are at ``what``.

    Nothing is shown if ``quiet``, or if another process speaks for this one.
    """
    if quiet or not speaks_for_all():
        yield silent
        return
    with _bar() if errors.is_terminal else Log(_print).ticking() as notify:
        notify(what)
        yield notify


@contextlib.contextmanager
def _bar() -> Iterator[Notify]:
    """A live line: the work, a bar where somebody knows how much there is, the time left, figures."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rest]}", markup=False),
    )
    pace = Pace()
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("", total=None, count="", rest="")

        def notify(what: str, done: int = 0, total: int = 0, detail: str = "") -> None:
            left = pace.left(done, total)
            rest = ", ".join(part for part in ("" if left is None else f"{duration(left)} left", detail) if part)
            count = f"{done}/{total}" if total else ""
            bar.update(task, description=what, completed=done, total=total or None, count=count, rest=rest)

        yield notify


class Log:
    """A `Notify` that writes a line now and then.

    Parameters
    ----------
    write : callable (str)
        Takes a line.
    clock : callable () -> float
        Seconds.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] | None = None) -> None:
        self._write, self._clock = write, clock or monotonic
        self._pace = Pace(self._clock)
        self._began, self._due = self._clock(), FIRST
        self._news = ("", 0, 0, "")
        self._left: float | None = None
        self._lock = threading.Lock()

    def __call__(self, what: str, done: int = 0, total: int = 0, detail: str = "") -> None:
        with self._lock:
            self._news, self._left = (what, done, total, detail), self._pace.left(done, total)
        self.tick()

    def tick(self) -> None:
        """Write the latest news if it is time to."""
        with self._lock:
            passed = self._clock() - self._began
            if passed < self._due:
                return
            self._due = max(passed + EVERY, (1 + SHARE) * passed)
            what, done, total, detail = self._news
            left = "" if self._left is None else f"about {duration(self._left)} left"
            parts = (what, f"{done}/{total}" if total else "", detail, f"{duration(passed)} so far", left)
            self._write(", ".join(part for part in parts if part))

    @contextlib.contextmanager
    def ticking(self) -> Iterator[Log]:
        """Write inside of the block even while the job has no news, as in a long product."""
        over = threading.Event()

        def tick() -> None:
            while not over.wait(1.0):
                self.tick()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()


class Pace:
    """The time that a count still takes, at its mean rate from its beginning to its last step."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._total = self._first = self._done = 0
        self._began, self._end = 0.0, 0.0

    def left(self, done: int, total: int) -> float | None:
        """Seconds; None where nothing can be said: before the first step, and when a step takes longer than thought."""
        now = self._clock()
        if total != self._total or done < self._done:
            self._total, self._first, self._done, self._began = total, done, done, now
        if done > self._done:
            self._done = done
            self._end = now + (now - self._began) * (total - done) / (done - self._first)
        counted = self._first < done < total
        return self._end - now if counted and self._end > now else None


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(42), duration(600), duration(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _print(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        errors.print(line, soft_wrap=True, markup=False)
