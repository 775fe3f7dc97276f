"""The processes of one run: a single one, or those that torchrun started.

Each process holds a share of the samples and all of the weights. They exchange sums over samples (`Ranks.sum`) and a
few flags (`Ranks.largest`); both give every process the same bits, so that all of them decide alike.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

from convexhead.errors import ConvexHeadError, InputError

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""How long processes wait for each other: a host that vanished is noticed after that, a process that died at once."""


class Ranks:
    """``size`` processes, of which this is number ``rank``.

    Attributes
    ----------
    sums, bytes : int
        Messages summed over the processes so far, and the bytes that they held.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank = rank
        self.size = size
        self.sums = self.bytes = 0
        self._group = group

    def share(self, n: int) -> slice:
        """This process's rows out of ``n``, as even as can be.

        Raises
        ------
        InputError
            There are fewer rows than processes.
        """
        if n < self.size:
            raise InputError(f"{n} samples cannot be shared by {self.size} processes: start fewer processes")
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Each of ``parts`` summed over the processes; one message for each of their types."""
        if self.size == 1:
            return parts
        out = list(parts)
        for dtype in dict.fromkeys(part.dtype for part in parts):
            which = [i for i, part in enumerate(parts) if part.dtype == dtype]
            message = torch.cat([parts[i].reshape(-1) for i in which])
            self._reduce(message, distributed.ReduceOp.SUM)
            for i, piece in zip(which, message.split([parts[i].numel() for i in which]), strict=True):
                out[i] = piece.view(parts[i].shape)
        return tuple(out)

    def largest(self, *values: float) -> tuple[float, ...]:
        """The largest of each of ``values`` over the processes."""
        if self.size == 1:
            return values
        message = torch.tensor(values, dtype=torch.float64)
        self._reduce(message, distributed.ReduceOp.MAX)
        return tuple(message.tolist())

    def _reduce(self, message: Tensor, how: Any) -> None:
        self.sums += 1
        self.bytes += message.numel() * message.element_size()
        with _stopped_process_named():
            distributed.all_reduce(message, how, group=self._group)

    def wait(self) -> None:
        """Until all processes are here."""
        self.largest(0.0)

    def first_does(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the first process only; all return its result, or raise what it raised.

        Before that all processes wait for each other.

        Raises:
            ConvexHeadError: what ``work`` raised, or another process of the run has stopped.
        """
        if self.size == 1:
            return work()
        self.wait()
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


def join_ranks(timeout: timedelta | None = None) -> Ranks:
    """Join the processes that torchrun started, or those of an initialised `torch.distributed`.

    What is joined stays joined until the process ends: joining anew, as for a second store, would be a race.

    Parameters
    ----------
    timeout : timedelta or None
        How long a process waits for the others before it takes them for lost; None: `PATIENCE`.
    """
    timeout = timeout or PATIENCE
    if not distributed.is_available():
        return Ranks()
    if not distributed.is_initialized() and distributed.is_torchelastic_launched():
        distributed.init_process_group(_backend(), timeout=timeout)
        atexit.register(_leave)
    if not distributed.is_initialized():
        return Ranks()
    return Ranks(distributed.get_rank(), distributed.get_world_size(), _group(timeout))


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _backend() -> str:
    """Gloo for tensors in memory and for objects, NCCL for tensors on GPUs where there are any."""
    nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if nccl else "gloo"


@functools.cache
def _group(timeout: timedelta) -> Any:
    """Return a group of all processes with this timeout, whatever the backend of the default group."""
    return distributed.new_group(backend=_backend(), timeout=timeout)


def local_ranks() -> tuple[int, int]:
    """Return this process's number among those of the run on this machine, and how many they are."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
