"""How far an extraction is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from convexhead.runtime.progress import Notify


@dataclass(frozen=True)
class Progress:
    """What one process of an extraction has done of its share.

    Attributes
    ----------
    split
        The split at work.
    done
        Images extracted in this run.
    total
        Images that this process had to extract when the run began; finished shards do not count.
    images_per_second
        Mean rate of this process since the run began.
    seconds_left
        At that rate.
    processes
        Number of processes, each with a share of its own.
    """

    split: str
    done: int
    total: int
    images_per_second: float
    seconds_left: float
    processes: int


ProgressCallback = Callable[[Progress], None]


def told_to(notify: Notify) -> ProgressCallback:
    """Return a callback for `extract` that passes its progress on to ``notify``."""
    return lambda p: notify(f"tokens of {p.split} images", p.done, p.total, f"{p.images_per_second:.0f} images/s")


class ProgressMeter:
    """Counts images and reports them to a callback."""

    def __init__(self, callback: ProgressCallback | None, total: int, processes: int) -> None:
        self._callback = callback
        self._total = total
        self._processes = processes
        self._done = 0
        self._start = time.monotonic()

    def add(self, split: str, n: int) -> None:
        """Report ``n`` more images of ``split``."""
        self._done += n
        if self._callback is None:
            return
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        left = (self._total - self._done) / rate
        self._callback(Progress(split, self._done, self._total, rate, left, self._processes))
