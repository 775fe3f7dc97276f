"""Passes over batches on several cores: every thread takes whole batches of its own.

A batch that stays in a core's caches is too small to split its products between cores: threads inside of one product
mostly wait for each other. Workers do not; each makes its batches' products with one thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from convexhead.program.heads.base import Data

Batch = tuple[slice, Data]
Work = Callable[[slice, Data], tuple[Tensor, ...]]
AHEAD = 2
"""Number of batches that wait in every worker. Chosen by hand: it stays busy and holds little memory."""


def add_up(
    batches: Iterable[Batch],
    work: Work,
    into: tuple[Tensor, ...],
    *,
    workers: int,
    context: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Add to the tensors ``into`` what ``work(rows, data)`` returns for every batch, ``workers`` of them at a time.

    Batches take turns in fixed order, and workers are added up in theirs: the same for a number of workers, always.
    All work is done within ``context()``. The first exception ends it, once no worker is at work any more.
    """
    if workers == 1:
        with context():
            for batch in batches:
                _add(into, work(*batch))
        return
    inference = torch.is_inference_mode_enabled()
    totals = [into, *(tuple(map(torch.zeros_like, into)) for _ in range(workers - 1))]
    at_work: list[deque[Future[None]]] = [deque() for _ in range(workers)]

    def run(worker: int, batch: Batch) -> None:
        with torch.inference_mode(inference), context():  # which threads do not share
            _add(totals[worker], work(*batch))

    threads = _threads(workers)
    try:
        for i, batch in enumerate(batches):
            worker = i % workers
            if len(at_work[worker]) > AHEAD:
                at_work[worker].popleft().result()
            at_work[worker].append(threads[worker].submit(run, worker, batch))
        for future in chain(*at_work):
            future.result()
    finally:
        rest = list(chain(*at_work))
        for future in rest:
            future.cancel()
        wait(rest)
    for total in totals[1:]:
        _add(into, total)


def _add(into: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> None:
    for total, part in zip(into, parts, strict=True):
        total += part


@cache
def _threads(workers: int) -> list[ThreadPoolExecutor]:
    """One thread for each worker, kept for the passes to come."""
    threads = [
        ThreadPoolExecutor(1, f"convexhead-worker-{worker}", initializer=_take_one_core) for worker in range(workers)
    ]
    inside = torch.get_num_threads()
    wait([thread.submit(lambda: None) for thread in threads])
    torch.set_num_threads(inside)  # the workers' setting would otherwise be the default of threads to come
    return threads


def _take_one_core() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # fixes it: a thread's first use of it would otherwise ask for the default of that time


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a child process has none of these threads
