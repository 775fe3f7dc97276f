"""The clock by which fits, paths and training runs are timed and limited."""

from __future__ import annotations

import time

_now = time.perf_counter


def now() -> float:
    """Seconds; only differences mean something."""
    return _now()


def count_processor_time() -> None:
    """From now on let `now` count the processor seconds of this process, all its threads together.

    For processes that share a machine: what one of them takes then does not depend on what the others do.
    """
    global _now
    _now = time.process_time
