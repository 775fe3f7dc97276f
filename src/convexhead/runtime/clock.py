"""One clock times and limits fits, paths and training runs.

Long work is told when to end by a function that it asks now and then, ``late() -> bool``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_now = time.perf_counter


def now() -> float:
    """Return seconds; only differences mean something."""
    return _now()


def count_processor_time() -> None:
    """Let `now` count the processor seconds of this process from here on, all its threads together.

    This is for processes that share a machine: the seconds of one then do not depend on what the others do.
    """
    global _now
    _now = time.process_time


class OutOfTimeError(Exception):
    """Work was late before it was done."""


def never() -> bool:
    """Work is never late."""
    return False


def after(seconds: float | None) -> Callable[[], bool]:
    """Work is late when so many seconds have passed from now on; never where None."""
    end = math.inf if seconds is None else now() + seconds
    return lambda: now() > end
