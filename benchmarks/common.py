"""What every benchmark writes beside its numbers: the machine, its GEMM rate, the versions; and tables that resume."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"


def gemm_rate(
    dtype: torch.dtype,
    size: int = 1536,
    repeats: int = 7,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Best GFLOP/s of a square matrix product, by the seconds of ``clock``."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = [timed(lambda: a @ b, device, clock)[0] for _ in range(repeats)]
    return 2 * size**3 / min(seconds) / 1e9


def cpu_name() -> str:
    """The processor as the system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions(*packages: str) -> str:
    """``package version`` of each, and Python's."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return "; ".join([f"python {platform.python_version()}", *found])


def hardware(*packages: str, device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> Row:
    """The columns that say where a row was measured; GEMM rates are those of ``device``, measured now by ``clock``."""
    size = 1536 if device == "cpu" else 8192
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device != "cpu" else {}
    return {
        "cpu": cpu_name(),
        **gpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gemm_gflops_float32": round(gemm_rate(torch.float32, size, device=device, clock=clock), 1),
        "gemm_gflops_float64": round(gemm_rate(torch.float64, size, device=device, clock=clock), 1),
        "versions": versions("torch", "numpy", "scipy", *packages),
    }


def tflop_equivalents(seconds: float, machine: Row) -> float:
    """What the machine's float32 matrix product would have computed in that time, in 10¹² operations."""
    return seconds * machine["gemm_gflops_float32"] / 1000


def timed(
    function: Callable[[], T], device: str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> tuple[float, T]:
    """Seconds by ``clock`` and the result; on a GPU, until its work is done."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    wait()
    began = clock()
    result = function()
    wait()
    return clock() - began, result


def measure(
    run: Callable[[], T], *, runs: int = 5, budget: float = 60.0, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[float], T]:
    """Times of up to ``runs`` runs, no more of them than fit ``budget`` seconds, and the last result.

    The first run of several is a warm-up that is not counted, unless runs are long.
    """
    seconds, result = timed(run, clock=clock)
    times = [seconds] if seconds > 2 else []
    while len(times) < runs and sum(times) + seconds < budget:
        again, result = timed(run, clock=clock)
        times.append(again)
    return times or [seconds], result


def spread(seconds: Sequence[float]) -> Row:
    """Median, smallest and largest of repeated times."""
    return {
        "seconds_median": f"{median(seconds):.4g}",
        "seconds_min": f"{min(seconds):.4g}",
        "seconds_max": f"{max(seconds):.4g}",
        "runs": len(seconds),
    }


def write_csv(name: str, rows: Iterable[Row]) -> Path:
    """``benchmarks/results/<name>.csv`` with the union of the rows' columns, in order of appearance."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".tmp").replace(path)
    return path


def read_csv(name: str) -> list[Row]:
    """The rows of ``benchmarks/results/<name>.csv``, empty cells left out; none without the file."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if value != ""} for row in csv.DictReader(file)]


class Table:
    """A CSV that is written row by row and goes on where it stopped.

    Parameters
    ----------
    name : str
        Of the file in ``benchmarks/results``.
    key : sequence of str
        The columns that tell rows apart: what has such a row is not measured again.
    machine : dict
        `hardware`, added to every new row.
    again : bool
        Measure everything anew; old rows are replaced one by one.
    """

    def __init__(self, name: str, key: Sequence[str], machine: Row, *, again: bool = False) -> None:
        self.name, self.key, self.machine = name, tuple(key), machine
        self.rows: list[Row] = read_csv(name)
        self._fresh: set[tuple[str, ...]] = set() if again else {self._id(row) for row in self.rows}

    def _id(self, row: Row) -> tuple[str, ...]:
        return tuple(str(row.get(column, "")) for column in self.key)

    def has(self, **key: Any) -> bool:
        """Whether there is such a row already, one that was measured now if everything is measured anew."""
        return self._id(key) in self._fresh

    def add(self, row: Row) -> None:
        """Note a row, in place of an old one with the same key, and write the file."""
        if "seconds_median" in row:
            equivalents = tflop_equivalents(float(row["seconds_median"]), self.machine)
            row = {**row, "tflop_equivalents": f"{equivalents:.4g}"}
        row = {**row, **self.machine}
        places = [i for i, old in enumerate(self.rows) if self._id(old) == self._id(row)]
        if places:
            self.rows[places[0]] = row
        else:
            self.rows.append(row)
        self._fresh.add(self._id(row))
        write_csv(self.name, self.rows)

    def run(self, measure: Callable[[], Row], **key: Any) -> None:
        """Add the row that ``measure`` makes, unless it is there; what it raises as `Skip` goes into ``note``."""
        if self.has(**key):
            return
        try:
            row = measure()
        except Skip as reason:
            row = {"note": str(reason)}
        self.add({**key, **row})
        shown = {k: v for k, v in {**key, **row}.items() if not isinstance(v, (list, dict))}
        print("  ".join(f"{name}={value}" for name, value in shown.items()), flush=True)

    def where(self, **key: Any) -> Iterator[Row]:
        """Rows with these values."""
        return (row for row in self.rows if all(str(row.get(k, "")) == str(v) for k, v in key.items()))


class Skip(Exception):
    """A measurement that is not made; the message says why."""
