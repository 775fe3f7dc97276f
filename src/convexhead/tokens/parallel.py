"""Running batches in threads, each on one core."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from convexhead.runtime.ranks import local_ranks

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 6
"""Number of items begun ahead of those at work, so that no core waits for a disk. Chosen by hand."""


def map_on_cores(function: Callable[[T], R], items: Iterable[T]) -> Generator[R]:
    """Yield ``function(item)`` for every item, in order, with one item at work on every core.

    Threads that take whole batches do not wait for each other, as those inside of one torch operation do: it
    is faster, stays fast on busy machines, and makes results independent of the number of cores. The
    processes of one run share the cores of their machine. Only a few results wait at any time, however many
    items there are. An exception ends the iteration where it belongs.
    """
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_threads = max(1, n_cores // local_ranks()[1])
    torch_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > n_threads + AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        # The workers' setting would otherwise be the default of threads to come.
        torch.set_num_threads(torch_threads)
