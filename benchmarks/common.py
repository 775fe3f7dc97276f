"""What every benchmark writes beside its numbers: the machine, its GEMM rate, the versions, one CSV."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"


def gemm_rate(dtype: torch.dtype, size: int = 1536, repeats: int = 5) -> float:
    """Best GFLOP/s of a square matrix product."""
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b)[0] for _ in range(repeats)]
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


def hardware(*packages: str) -> dict[str, object]:
    """The columns that say where a row was measured."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gemm_gflops_float32": round(gemm_rate(torch.float32), 1),
        "gemm_gflops_float64": round(gemm_rate(torch.float64), 1),
        "versions": versions("torch", "numpy", "scipy", *packages),
    }


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Wall seconds and the result."""
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def spread(seconds: Sequence[float]) -> dict[str, object]:
    """Median, smallest and largest of repeated times."""
    return {
        "seconds_median": f"{median(seconds):.4g}",
        "seconds_min": f"{min(seconds):.4g}",
        "seconds_max": f"{max(seconds):.4g}",
        "runs": len(seconds),
    }


def write_csv(name: str, rows: Iterable[dict[str, object]]) -> Path:
    """``benchmarks/results/<name>.csv`` with the union of the rows' columns, in order of appearance."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path
