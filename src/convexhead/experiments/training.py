"""All training of a comparison, in one process or in several: every cell and every probe, without the test images."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from convexhead.baselines.attentive_probe import OPTIONS
from convexhead.baselines.probes import fit_probe
from convexhead.errors import ConvexHeadError
from convexhead.experiments.cells import (
    AdamRuns,
    AdamSettings,
    Cell,
    PathSettings,
    fit_path,
    preferred,
    train_with_adam,
)
from convexhead.experiments.splits import Part, Splits
from convexhead.program.heads import HEADS
from convexhead.runtime.clock import count_processor_time
from convexhead.runtime.run_folder import Piece, RunFolder


def cells_of(heads: Iterable[str] = tuple(HEADS), activations: Iterable[str] = ("linear", "gated-relu")) -> list[Cell]:
    """Every head with every activation that it takes."""
    heads = list(heads)
    return [
        Cell(head, activation)
        for activation in activations
        for head in heads
        if HEADS[head].takes_masks or activation == "linear"
    ]


@dataclass(frozen=True)
class Settings:
    """What is run: the cells of the table and the probes, and how they are trained."""

    cells: tuple[Cell, ...] = tuple(cells_of())
    probes: tuple[str, ...] = ("mean-token",)
    path: PathSettings = field(default_factory=PathSettings)
    adam: AdamSettings = field(default_factory=AdamSettings)

    def pieces(self) -> int:
        """How many pieces of work the run has, the last one the test images."""
        probes = sum(self.adam.runs(len(OPTIONS)) if name == "attentive-probe" else 1 for name in self.probes)
        each = self.adam.runs(len(self.adam.learning_rates))
        numbers = [1 if cell.head == "linear" else max(1, len(self.adam.heads)) for cell in self.cells]
        more = [len(self.adam.more(cell)) for cell in self.cells]
        return probes + len(self.cells) + each * (sum(numbers) + sum(more)) + 1


@dataclass
class Trained:
    """A cell when all training is over."""

    cell: Cell
    path: Piece
    adam: list[AdamRuns]

    @property
    def main_adam(self) -> AdamRuns | None:
        """Adam on the same objective, with the number of atoms that validation prefers."""
        return preferred(self.adam) if self.adam else None


def train_cell(splits: Splits, settings: Settings, folder: RunFolder, cell: Cell) -> Trained:
    path = folder.once(f"{cell.name}/path", lambda: fit_path(splits, settings.path, cell, folder))
    return Trained(cell, path, train_with_adam(splits, settings.adam, cell, folder))


# -- several cells at a time ------------------------------------------------------------------------------------------
def train_in_processes(
    splits: Splits, settings: Settings, folder: RunFolder, jobs: int, tick: Callable[[], None]
) -> None:
    """Train cells and probes, ``jobs`` at a time; what they leave is in the folder."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    unread = replace(splits, load_test=_not_here)
    threads = max(1, min(torch.get_num_threads(), cores // jobs))
    started = (unread, settings, folder.path, threads, os.getpid())
    # New interpreters: a fork of a process that has used several threads may hang in the next product.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=fresh, initializer=_begin_worker, initargs=started) as pool:
        # The longest first: gated cells.
        cells = sorted(settings.cells, key=lambda cell: cell.activation == "linear")
        tasks: list[Cell | str] = [*cells, *settings.probes]
        with _ignoring_interrupts():  # workers inherit that: Ctrl-C is the parent's, and they end with it
            pending = {pool.submit(_work, task) for task in tasks}
        try:
            while pending:
                done, pending = wait(pending, timeout=1.0, return_when="FIRST_COMPLETED")
                for future in done:
                    future.result()
                tick()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


def _not_here() -> Part:
    raise ConvexHeadError("the test images are read by one process, when everything is chosen")


_worker: dict[str, Any] = {}


def _begin_worker(splits: Splits, settings: Settings, out: Path, threads: int, parent: int) -> None:
    torch.set_num_threads(threads)
    threadpool_limits(threads)  # those of scikit-learn, whose waiting would be counted as work
    count_processor_time()
    _worker.update(splits=splits, settings=settings, folder=RunFolder(out))
    leave_with(parent)


def leave_with(parent: int, every: float = 0.5) -> None:
    """End this process when its parent is gone, however that ended; a thread looks ``every`` so many seconds."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every):
            if os.getppid() != parent:
                os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    # A thread that wakes while Python ends would abort the process, as soon as torch has been imported.
    atexit.register(thread.join)
    atexit.register(over.set)  # first: the last to be registered


def _work(task: Cell | str) -> None:
    splits, settings, folder = _worker["splits"], _worker["settings"], _worker["folder"]
    if isinstance(task, Cell):
        train_cell(splits, settings, folder, task)
    else:
        fit_probe(task, splits, settings.adam, folder)
