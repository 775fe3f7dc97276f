"""Peak memory under a fixed budget at 1, 4 and 16 times the samples, each in a process of its own.

    python benchmarks/memory.py [--store STORE] [--samples 3125] [--budget-mb 256]

Self-attention linear. Without a store: tokens 49 x 128 in a temporary memory map of float16 (class means in noise), the
size of CIFAR-100 through EfficientNet-Lite0; 16 x 3125 samples is its train split. The weight is large and the gap wide
(--beta-ratio, --tol), for short runs: every kind of pass is taken, and peak memory does not depend on how many.
Appends rows to benchmarks/results/memory.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import convexhead as ch
from common import RESULTS, hardware

CLASSES, TOKENS, CHANNELS = 100, 49, 128


def write_tokens(folder: Path, n: int) -> None:
    """``X.npy (n, 49, 128)`` float16 and ``y.npy``, a chunk at a time."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(CLASSES, TOKENS, CHANNELS)).astype(np.float32)
    y = np.arange(n) % CLASSES
    out = np.lib.format.open_memmap(folder / "X.npy", "w+", np.float16, (n, TOKENS, CHANNELS))
    for i in range(0, n, 500):
        noise = rng.normal(size=(len(y[i : i + 500]), TOKENS, CHANNELS)).astype(np.float32)
        out[i : i + 500] = 0.3 * means[y[i : i + 500]] + noise
    out.flush()
    np.save(folder / "y.npy", y)


def peak() -> float:
    """Largest resident memory of this process so far, in MB. (getrusage would count the parent's before the exec.)"""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1000


def child(source: str, n: int, budget: float, beta_ratio: float, tol: float) -> None:
    """One fit, and what it took, on standard output."""
    if (Path(source) / "X.npy").exists():
        X, y = np.load(Path(source) / "X.npy", mmap_mode="r")[:n], np.load(Path(source) / "y.npy")[:n]
    else:
        X = ch.TokenStore.open(source, "train")  # a store is taken whole
        y = X.labels
    start, began = peak(), time.perf_counter()
    clf = ch.ConvexHeadClassifier(beta_ratio=beta_ratio, tol=tol, max_memory=budget, random_state=0).fit(X, y)
    row = {
        "samples": len(y),
        "tokens": X.shape[1],
        "channels": X.shape[2],
        "token_mb_as_float32": round(4 * np.prod(X.shape) / 1e6),
        "budget_mb": round(budget / 1e6),
        "peak_mb": round(peak()),
        "peak_mb_before": round(start),
        "outputs_mb_as_float64": round(len(y) * len(clf.classes_) * 8 / 1e6),
        "seconds": round(time.perf_counter() - began, 1),
        "relative_gap_certified": clf.certificate_.relative_gap,
        "heads": clf.n_heads_,
    }
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store")
    parser.add_argument("--samples", type=int, default=3125, help="the smallest size")
    parser.add_argument("--budget-mb", type=float, default=256)
    parser.add_argument("--beta-ratio", type=float, default=0.5)
    parser.add_argument("--tol", type=float, default=0.3)
    parser.add_argument("--child", nargs=5)
    args = parser.parse_args()
    if args.child:
        source, *numbers = args.child
        child(source, int(numbers[0]), *map(float, numbers[1:]))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="convexhead-memory-") as folder:
        if args.store is None:
            write_tokens(Path(folder), 16 * args.samples)
        sizes = [args.samples * factor for factor in (1, 4, 16)] if args.store is None else [0]
        for n in sizes:
            command = [sys.executable, __file__, "--child", args.store or folder]
            command += [str(n), str(1e6 * args.budget_mb), str(args.beta_ratio), str(args.tol)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            rows.append({**json.loads(done.stdout), "source": args.store or "synthetic memmap, float16"})
            print(rows[-1], flush=True)
    where = hardware()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "memory.csv"
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *where])
        if fresh:
            writer.writeheader()
        writer.writerows({**row, **where} for row in rows)


if __name__ == "__main__":
    main()
