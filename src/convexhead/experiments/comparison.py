"""Every head on the same tokens: certified, tuned on a validation split, beside its non-convex twins and probes.

1. Every cell (`cells`) and every probe (`probes`) is trained and tuned without the test images.
2. At the very end these are read, once, and everything that was chosen is scored on them.

Each piece of work is kept in the run's folder, from which the same command goes on.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import multiprocessing
import os
import platform
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from convexhead._version import __version__
from convexhead.baselines.attentive_probe import OPTIONS
from convexhead.baselines.probes import PROBES, fit_probe, probe_scores
from convexhead.errors import ConvexHeadError
from convexhead.experiments.cells import (
    Cell,
    PathSettings,
    Twin,
    TwinSettings,
    fit_path,
    mean,
    network_scores,
    preferred,
    restore_twin,
    top,
    train_twins,
)
from convexhead.experiments.run_folder import Piece, RunFolder
from convexhead.experiments.splits import Part, Splits
from convexhead.experiments.tuning import Tuned
from convexhead.persistence import load
from convexhead.program.heads import HEADS
from convexhead.runtime.clock import count_processor_time
from convexhead.runtime.progress import Notify, silent
from convexhead.tokens.store.files import make_folder, writer_lock

Results = dict[str, Any]
ROUNDING = 1e-9
"""By how much, relatively, rounding may put a twin below a certified bound."""


def cells_of(heads: Iterable[str] = tuple(HEADS), activations: Iterable[str] = ("linear", "gated-relu")) -> list[Cell]:
    """Every head with every activation; the linear head has the linear one only."""
    heads = list(heads)
    return [
        Cell(head, activation)
        for activation in activations
        for head in heads
        if head != "linear" or activation == "linear"
    ]


@dataclass(frozen=True)
class Settings:
    """What is run: the cells of the table and the probes, and how they are trained."""

    cells: tuple[Cell, ...] = tuple(cells_of())
    probes: tuple[str, ...] = ("mean-token",)
    path: PathSettings = field(default_factory=PathSettings)
    twins: TwinSettings = field(default_factory=TwinSettings)

    def pieces(self) -> int:
        """How many pieces of work the run has, the last one the test images."""
        probes = sum(self.twins.runs(len(OPTIONS)) if name == "attentive-probe" else 1 for name in self.probes)
        a_twin = self.twins.runs(len(self.twins.learning_rates))
        numbers = [1 if cell.head == "linear" else max(1, len(self.twins.heads)) for cell in self.cells]
        twins = a_twin * sum(number + self.twins.adamw for number in numbers)
        return probes + len(self.cells) + twins + 1


@dataclass
class Trained:
    """A cell when all training is over."""

    cell: Cell
    path: Piece
    twins: list[Twin]

    @property
    def main_twin(self) -> Twin | None:
        """Adam on the same objective, with the number of atoms that validation prefers."""
        return preferred(self.twins) if self.twins else None


def run(
    splits: Splits, settings: Settings, out: Path, *, title: str, jobs: int = 1, notify: Notify = silent
) -> Results:
    """Run everything that ``out`` does not hold yet, and return the results as `convexhead.report` takes them.

    Parameters
    ----------
    splits : Splits
    settings : Settings
    out : Path
        Folder of the run; see `convexhead.experiments.run_folder`.
    title : str
        Of the page.
    jobs : int
        Cells trained at a time, in processes that share the cores; seconds are then those of the processor.
    notify : callable
        Told of progress, see `convexhead.runtime.progress`.

    Raises
    ------
    FileFormatError
        ``out`` holds something else, or a run with other settings.
    StoreWriteError
        ``out`` cannot be written, or another process is writing it.
    """
    total = settings.pieces()
    folder = RunFolder(out, lambda name: notify(name, folder.count(), total))
    make_folder(out)
    with writer_lock(out):
        folder.begin({**asdict(settings), "images": splits.name, "data": splits.identity})
        notify("training", folder.count(), total)
        if jobs > 1:
            _train_in_processes(splits, settings, folder, jobs, lambda: notify("training", folder.count(), total))
        probes = {name: fit_probe(name, splits, settings.twins, folder) for name in settings.probes}
        trained = [_train_cell(splits, settings, folder, cell) for cell in settings.cells]
        notify("test images", folder.count(), total)
        test = folder.once("test", lambda: _score_test(splits, folder, probes, trained))
        notify("done", total, total)
    clock = "wall" if jobs == 1 else f"processor, {jobs} cells at a time"
    return _results(splits, settings, probes, trained, test.record, title, clock)


def _train_cell(splits: Splits, settings: Settings, folder: RunFolder, cell: Cell) -> Trained:
    path = folder.once(f"{cell.name}/path", lambda: fit_path(splits, settings.path, cell, folder))
    return Trained(cell, path, train_twins(splits, settings.twins, cell, folder))


# -- several cells at a time ------------------------------------------------------------------------------------------
def _train_in_processes(
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
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(task: Cell | str) -> None:
    splits, settings, folder = _worker["splits"], _worker["settings"], _worker["folder"]
    if isinstance(task, Cell):
        _train_cell(splits, settings, folder, task)
    else:
        fit_probe(task, splits, settings.twins, folder)


# -- the test images --------------------------------------------------------------------------------------------------
def _score_test(splits: Splits, folder: RunFolder, probes: dict[str, Tuned], trained: list[Trained]) -> Piece:
    """Read the test images and score everything that was chosen: ``{name of the piece: [top-1, top-5]}``."""
    test = splits.load_test()
    classes = np.unique(splits.train.labels)
    scores: dict[str, list[float | None]] = {"images": [len(test.labels)]}

    def keep(name: str, outputs: Any) -> None:
        top1 = top(outputs, classes, test.labels)
        scores[name] = [top1, top(outputs, classes, test.labels, 5) if len(classes) > 5 else None]

    for probe, tuned in probes.items():
        for piece in tuned.runs:
            keep(piece.name, probe_scores(probe, piece, splits.train, test))
    for each in trained:
        model = load(folder.model(each.cell.name))
        keep(each.path.name, model.predict_proba(test.tokens))
        for twin in each.twins:
            for piece in twin.tuned.runs:
                keep(piece.name, network_scores(restore_twin(model, piece.tensors), test.tokens))
    return Piece(scores)


# -- results ----------------------------------------------------------------------------------------------------------
def _results(
    splits: Splits,
    settings: Settings,
    probes: dict[str, Tuned],
    trained: list[Trained],
    scores: dict[str, Any],
    title: str,
    clock: str,
) -> Results:
    n, s, d = splits.train.tokens.shape
    baseline = None
    if "mean-token" in probes:
        piece = probes["mean-token"].runs[0]
        baseline = {
            "name": "Linear probe (scikit-learn, L2, mean token)",
            "validation_accuracy": piece.record["validation_accuracy"],
            "test_accuracy": scores[piece.name][0],
            "seconds": piece.record["seconds"],
            "detail": piece.record["detail"],
        }
    return {
        "title": title,
        "subtitle": f"{len(trained)} heads trained to a certified optimum on frozen tokens",
        "dataset": {
            "name": splits.name,
            "train": n,
            "validation": len(splits.validation.labels),
            "test": scores["images"][0],
            "tokens": s,
            "channels": d,
            "classes": len(splits.class_names),
            "backbone": splits.backbone,
        },
        "environment": environment() | {"clock": clock},
        "settings": asdict(settings),
        "rows": [_row(each, scores) for each in trained],
        "baseline": baseline,
        "methods": [row for each in trained for row in _cell_methods(each, scores)]
        + [_probe_method(name, tuned, scores) for name, tuned in probes.items()],
        "attention": None,
        "reproduce": [],
    }


def _row(each: Trained, scores: dict[str, Any]) -> dict[str, Any]:
    """A cell with its main twin."""
    twin = each.main_twin
    return {
        **each.path.record,
        "test_accuracy": scores[each.path.name][0],
        "test_top5": scores[each.path.name][1],
        "twin": None if twin is None else _twin_row(twin, each.path.record["certificate"], scores),
    }


def _twin_row(twin: Twin, certificate: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    kept = ("seed", "learning_rate", "objective", "seconds", "history")

    def run(piece: Piece) -> dict[str, Any]:
        excess = _excess(piece, certificate)
        return {key: piece.record[key] for key in kept} | {"relative_excess": excess}

    record = twin.tuned.runs[0].record
    return {
        "optimizer": record["optimizer"],
        "n_heads": twin.n_heads,
        "learning_rate": record["learning_rate"],
        "tuning_seconds": twin.tuned.seconds,
        "runs": [run(piece) | {"test_accuracy": scores[piece.name][0]} for piece in twin.tuned.runs],
        "tried": [run(piece) for piece in twin.tuned.tried],
    }


def _excess(piece: Piece, certificate: dict[str, Any]) -> float | None:
    """How far a training run ended above the certified optimum, relatively; None where it diverged.

    Raises
    ------
    ConvexHeadError
        It ended below the certified lower bound, which would refute the certificate, or it was another problem's.
    """
    objective = piece.record["objective"]
    if objective is None:
        return None
    # Records without an identity are older; the settings of their folder say that they are of the same problem.
    told = [key for key in ("beta", "identity") if key in piece.record and key in certificate]
    if any(piece.record[key] != certificate[key] for key in told):
        raise ConvexHeadError(
            f"{piece.name} was trained on another problem than the convex head was certified for, so the two cannot be "
            "compared: delete the folder and run the same again"
        )
    lowest, scale = piece.record["convex_objective"], abs(certificate["primal"])
    if lowest < certificate["dual"] - ROUNDING * scale:
        raise ConvexHeadError(
            f"{piece.name} has objective {lowest!r}, below the certified bound {certificate['dual']!r}: "
            "this refutes the certificate, please report it"
        )
    return float((objective - certificate["primal"]) / scale)


def _cell_methods(each: Trained, scores: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row for the convex head, and one for each of its twins."""
    record = each.path.record
    certificate = record["certificate"]
    about = {"head": record["head"], "activation": record["activation"]}
    about |= {key: record[key] for key in ("beta_ratio", "beta")}
    keys = ("relative_gap", "estimated_gap", "dual", "scope", "converged", "failure_probability")
    convex = _method(
        **about,
        method="convex",
        heads=record["heads"],
        validation_accuracy=record["validation_accuracy"],
        test_top1=scores[each.path.name][0],
        test_top5=scores[each.path.name][1],
        objective=certificate["primal"],
        **{key: certificate[key] for key in keys},
        seconds=record["fit_seconds"],
        seconds_total=record["seconds"],
        fits=len(record["path"]),
        parameters=record["parameters"],
    )
    rows = [convex]
    for twin in each.twins:
        excess, of_all = (
            [value for piece in pieces if (value := _excess(piece, certificate)) is not None]
            for pieces in (twin.tuned.runs, twin.tuned.tried)
        )
        rows.append(
            _method(
                **about,
                method=twin.tuned.runs[0].record["optimizer"],
                heads=twin.n_heads,
                learning_rate=twin.tuned.runs[0].record["learning_rate"],
                **_tuned_values(twin.tuned, scores),
                excess_median=statistics.median(excess) if excess else None,
                excess_worst=max(excess, default=None),
                excess_best=min(of_all, default=None),
                convex_seconds_ratio=record["seconds"] / twin.tuned.seconds,
                parameters=twin.tuned.runs[0].record["parameters"],
            )
        )
    return rows


def _probe_method(name: str, tuned: Tuned, scores: dict[str, Any]) -> dict[str, Any]:
    record = tuned.runs[0].record
    row = _method(head=PROBES[name], method="probe", **_tuned_values(tuned, scores), parameters=record["parameters"])
    row["learning_rate"] = record.get("learning_rate")
    row["fits"] = record.get("fits", row["fits"])
    row["seconds"] = record.get("fit_seconds", row["seconds"])
    return row


def _tuned_values(tuned: Tuned, scores: dict[str, Any]) -> dict[str, Any]:
    """Means and spread over the seeds of a tuned method, and what tuning cost."""
    top1, top5 = ([scores[piece.name][k] for piece in tuned.runs] for k in (0, 1))
    return {
        "validation_accuracy": mean(tuned.runs, "validation_accuracy"),
        "test_top1": statistics.fmean(top1),
        "test_top1_sd": statistics.stdev(top1) if len(top1) > 1 else None,
        "test_top5": None if top5[0] is None else statistics.fmean(top5),
        "objective": mean(tuned.runs, "objective"),
        "seconds": mean(tuned.runs, "seconds"),
        "seconds_total": tuned.seconds,
        "fits": len(tuned.tried),
        "seeds": len(tuned.runs),
        "diverged": sum(piece.record.get("objective", 0.0) is None for piece in tuned.tried),
    }


METHOD = (
    "head", "activation", "method", "heads", "learning_rate", "beta_ratio", "beta", "validation_accuracy", "test_top1",
    "test_top1_sd", "test_top5", "objective", "relative_gap", "estimated_gap", "dual", "scope", "converged",
    "failure_probability", "excess_median", "excess_worst", "excess_best", "seconds", "seconds_total",
    "convex_seconds_ratio", "fits", "seeds", "diverged", "parameters",
)  # fmt: skip
"""Columns of the flat table; every one of its rows has them all, None where there is nothing to say."""


def _method(**values: Any) -> dict[str, Any]:
    values = {key: None if value == -math.inf else value for key, value in values.items()}
    return {key: values.pop(key, None) for key in METHOD} | values


def environment() -> dict[str, Any]:
    """Hardware and versions that figures were measured with."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "convexhead": __version__,
        "date": datetime.date.today().isoformat(),
    }
