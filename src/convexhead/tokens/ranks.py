"""The processes of one run: a single one, or those that torchrun started."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

from torch import distributed

from convexhead.errors import ConvexHeadError

T = TypeVar("T")

# Processes wait for each other at the end of an extraction only; one that dies breaks the wait at once.
PATIENCE = timedelta(days=30)


class Ranks:
    """``size`` processes, of which this is number ``rank``."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._group = group

    def first_does(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the first process only; all return its result, or raise what it raised.

        Before that all processes wait for each other.

        Raises:
            ConvexHeadError: what ``work`` raised, or another process of the run has stopped.
        """
        if self.size == 1:
            return work()
        with _stopped_process_named():
            distributed.barrier(self._group)
        outcome = [_result_or_error(work) if self.rank == 0 else None]
        with _stopped_process_named():
            distributed.broadcast_object_list(outcome, src=0, group=self._group)
        if isinstance(outcome[0], ConvexHeadError):
            raise outcome[0]
        return cast(T, outcome[0])


def _result_or_error(work: Callable[[], T]) -> T | ConvexHeadError:
    try:
        return work()
    except ConvexHeadError as error:
        return error


@contextlib.contextmanager
def _stopped_process_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConvexHeadError(
            "another process of this run has stopped: see its message, then run the same again to resume"
        ) from error


def join_ranks() -> Ranks:
    """Join the processes that torchrun started, or those of an initialised `torch.distributed`.

    What is joined stays joined until the process ends: joining anew, as for a second store, would be a race.
    """
    if not distributed.is_available():
        return Ranks()
    if not distributed.is_initialized() and distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo", timeout=PATIENCE)
        atexit.register(_leave)
    if not distributed.is_initialized():
        return Ranks()
    return Ranks(distributed.get_rank(), distributed.get_world_size(), _gloo_group())


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


@functools.cache
def _gloo_group() -> Any:
    """Return a group of all processes that can pass objects about, whatever the backend of the default group."""
    if distributed.get_backend() == "gloo":
        return distributed.group.WORLD
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


def local_ranks() -> tuple[int, int]:
    """Return this process's number among those of the run on this machine, and how many they are."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
