"""One clock times and limits fits, paths and training runs."""

from __future__ import annotations

import time

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
