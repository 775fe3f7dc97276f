"""The processes of one run are a single one, or those that torchrun started.

Each process holds a share of the samples and all of the weights. They exchange sums over samples (`Ranks.sum`) and a
few flags (`Ranks.largest`); both give every process the same bits, so that all of them decide alike.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

from convexhead._version import __version__
from convexhead.errors import ConvexHeadError, InputError

T = TypeVar("T")

SOFTWARE = {"version of convexhead": __version__, "version of torch": torch.__version__}
"""Versions that must be the same in all processes of a run."""
PATIENCE = timedelta(minutes=10)
"""Minutes that processes wait for each other. A vanished host is noticed after that, a process that died at once.
Chosen by hand."""


class Ranks:
    """This process is number ``rank`` of ``size``.

    Attributes
    ----------
    sums, bytes : int
        Messages summed over the processes so far, and the bytes that they held.
    """

    def __init__(self, rank: int = 0, size: int = 1, patience: timedelta = PATIENCE) -> None:
        self.rank = rank
        self.size = size
        self.sums = self.bytes = 0
        self._patience = patience

    @property
    def _group(self) -> Any:
        if self._patience not in _groups:
            raise ConvexHeadError("the processes have left this run: start it again")
        return _groups[self._patience]

    def share(self, n: int) -> slice:
        """Return this process's rows out of ``n``; shares differ by at most one row.

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

    def join(self, part: Tensor, n: int) -> Tensor:
        """Return all ``n`` rows in every process, of which ``part`` is this one's `share`."""
        if self.size == 1:
            return part
        whole = part.new_zeros(n, *part.shape[1:])
        whole[self.share(n)] = part
        return self.sum(whole)[0]

    def largest(self, *values: float) -> tuple[float, ...]:
        """Return the largest of each of ``values`` over the processes."""
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
        """Wait until all processes are here."""
        self.largest(0.0)

    def agree(self, work: Callable[[], T], facts: Callable[[T], Mapping[str, Any]] | None = None) -> T:
        """Run ``work`` in every process and go on only if all have succeeded, and with equal ``facts``.

        Every run begins with this, before anything is computed together: processes with unequal data would converge
        to a bound on no problem, and processes with unequal settings would wait for each other without end.

        Parameters
        ----------
        work : callable
            What a process can do alone: open its files, check its input.
        facts : callable (result of ``work``) -> dict, or None
            What must be equal in all processes, as JSON values by name. Not called where there is one process.

        Raises
        ------
        InputError
            The same in all processes: what differs and between which of them, or which of them failed and why.
        """
        if self.size == 1:
            return work()
        result, error, mine = None, None, {}
        try:
            result = work()
            mine = {} if facts is None else dict(facts(result))
        except Exception as caught:  # whatever it is, the others must not wait for this process
            error = caught
        told = self.gather((mine, None if error is None else str(error) or type(error).__name__))
        failures = {rank: text for rank, (_, text) in enumerate(told) if text is not None}
        if error is not None and len(failures) == self.size and len(set(failures.values())) == 1:
            raise error
        if failures:
            first = min(failures)
            raise InputError(f"process {first} of {self.size} failed: {failures[first]}") from error
        if differing := _differences([fact for fact, _ in told]):
            raise InputError(
                f"the processes of this run differ: {'; '.join(differing)}. "
                "Start all of them with the same settings and the same data"
            )
        return cast(T, result)

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _stopped_process_named():
            distributed.all_gather_object(values, value, group=self._group)
        return values

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Guard a run of all processes: if the block fails in this one, the others fail in their next message.

        Without it they would wait for this process as long as it lives, or take its next run's messages for this one's.
        """
        try:
            yield
        except BaseException:
            _leave_group(self._patience)
            raise

    def first_does(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the first process only; all return its result, or raise what it raised.

        Before that all processes wait for each other.

        Raises
        ------
        ConvexHeadError
            What ``work`` raised, or another process of the run has stopped.
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


def _differences(facts: list[Mapping[str, Any]]) -> list[str]:
    """Say in words what differs between processes: short values are quoted, hashes are not."""
    told = []
    for name in dict.fromkeys(name for each in facts for name in each):
        groups: dict[str, list[int]] = {}
        for rank, each in enumerate(facts):
            groups.setdefault(json.dumps(each.get(name), sort_keys=True), []).append(rank)
        if len(groups) == 1:
            continue
        if any("sha256:" in value for value in groups):
            told.append(f"{name} in {' and in '.join(map(_processes, groups.values()))}")
        else:
            told.append(f"{name} is " + " and ".join(f"{v} in {_processes(g)}" for v, g in groups.items()))
    return told


def _processes(ranks: list[int], most: int = 4) -> str:
    names = ", ".join(map(str, ranks[:most])) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")
    return f"process{'es' if len(ranks) > 1 else ''} {names}"


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

    They stay joined until the process ends. Joining anew, as for a second store, would be a race.

    Parameters
    ----------
    timeout : timedelta or None
        How long a process waits for the others before it gives them up; None: `PATIENCE`.
    """
    timeout = timeout or PATIENCE
    if not distributed.is_available():
        return Ranks()
    with _stopped_process_named():
        if not distributed.is_initialized() and distributed.is_torchelastic_launched():
            distributed.init_process_group(_backend(), timeout=timeout)
            atexit.register(_leave)
        if not distributed.is_initialized():
            _groups.clear()
            return Ranks()
        if timeout not in _groups:
            if "cpu:gloo" in distributed.get_backend_config():
                # A group forms through a store, which does not notice that a process has ended; a message does.
                distributed.all_reduce(torch.zeros(1))
            _groups[timeout] = distributed.new_group(backend=_backend(), timeout=timeout)
        return Ranks(distributed.get_rank(), distributed.get_world_size(), timeout)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _backend() -> str:
    """Gloo for tensors in memory and for objects, NCCL for tensors on GPUs where there are any."""
    nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if nccl else "gloo"


_groups: dict[timedelta, Any] = {}
"""The group of all processes for each timeout, whatever the backend of the default group. Nothing else holds a group:
its connections close when the last reference goes."""


def _leave_group(patience: timedelta) -> None:
    """Close the connections of a group, so that whoever waits for this process in it fails at once."""
    if distributed.is_initialized() and patience in _groups:
        distributed.destroy_process_group(_groups.pop(patience))


def local_ranks() -> tuple[int, int]:
    """Return this process's number among those of the run on this machine, and how many they are."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
