"""Time and peak memory of self-attention linear, certified to 1e-3, as the samples grow: each size in its own process.

    python benchmarks/growth.py --store STORE [--channels 128] [--sizes 6000 12000 25000 50000] [--budget-mb 5000]
                                [--runs 1] [--work FOLDER] [--device cpu] [--again]

STORE is a token store of all of CIFAR-100: 50,000 train images. Where it has more stored channels than --channels,
they are standardised and reduced to that many principal components (fitted on every tenth image); with fewer, all are
taken. Tokens of EfficientNet-Lite0's last map with exactly 128 channels, 8 minutes on 2 cores:

    convexhead extract IMAGES --backbone packaged:efficientnet-lite0 --channels 128 --reduce avgpool --crop-pct 1 \\
        --out STORE

Every size takes the first rows of one random order, from a memory map in --work (made once; default: a temporary
folder). β/β_max = 0.02. --budget-mb is the estimator's `max_memory`: what tokens and what is prepared of them may take.
On a GPU a fit of 500 samples comes first and is not timed: it loads the GPU's libraries. A row has the times of all
--runs, one after the other, the peak memory of the first and the rest of the last. 50,000 x 49 x 128 with their Gram
matrices take 4.6 GB; with less the rest streams. Rows: benchmarks/results/growth.csv; the exponent of the growth is a
line of its own, the slope of log seconds over log samples by least squares. On 2 cores about 12 minutes for all four
sizes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import clone

import convexhead as ch
from common import Row, Table, hardware, spread
from instances import write_tokens
from memory import peak


def child(store: str, channels: int, work: str, n: int, budget: float, tol: float, device: str, runs: int) -> None:
    """Fits, and what they took, on standard output; memory is the first one's."""
    warnings.simplefilter("ignore")
    X, y = write_tokens(store, channels, Path(work), n)
    clf = ch.ConvexHeadClassifier(
        beta_ratio=0.02, tol=tol, max_memory=budget, random_state=0, device=device, max_time=1800
    )
    if device != "cpu":
        clone(clf).fit(X[:500], y[:500])  # loads the GPU's libraries, which a process does once
        torch.cuda.reset_peak_memory_stats()
    before, seconds, peaks = peak(), [], []
    for _ in range(runs):
        began = time.perf_counter()
        clf.fit(X, y)
        seconds.append(time.perf_counter() - began)
        peaks.append(peak())
    certificate = clf.certificate_
    row: dict[str, Any] = {
        "seconds": seconds,
        "peak_mb": round(peaks[0]),
        "peak_mb_before": round(before),
        "converged": certificate.converged,
        "objective": f"{certificate.primal:.9f}",
        "relative_gap_certified": f"{certificate.relative_gap:.2g}",
        "heads": clf.n_heads_,
        "beta": f"{clf.beta_:.8g}",
    }
    if device != "cpu":
        row["gpu_peak_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--sizes", type=int, nargs="*", default=[6000, 12000, 25000, 50000])
    parser.add_argument("--budget-mb", type=float, default=5000)
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--work")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--child", type=int)
    args = parser.parse_args()
    if args.child:
        budget = 1e6 * args.budget_mb
        child(args.store, args.channels, args.work, args.child, budget, args.tol, args.device, args.runs)
        return
    with tempfile.TemporaryDirectory(prefix="convexhead-growth-") as folder:
        work = args.work or folder
        Path(work).mkdir(parents=True, exist_ok=True)
        X, y = write_tokens(args.store, args.channels, Path(work))
        name = f"{Path(args.store).name} s={X.shape[1]} d={X.shape[2]} c={len(set(y.tolist()))} ratio=0.02"
        machine = hardware(device=args.device)
        machine["dtype"] = "float32, certificate float64"
        table = Table("growth", ("instance", "tol", "budget_mb", "device", "samples"), machine, again=args.again)
        where = {
            "instance": name,
            "tol": f"{args.tol:g}",
            "budget_mb": f"{args.budget_mb:g}",
            "device": machine.get("gpu", "cpu"),
        }
        for n in args.sizes:

            def row(n: int = n) -> Row:
                command = [sys.executable, __file__, "--child", str(n), "--store", args.store, "--work", work]
                command += ["--channels", str(args.channels), "--budget-mb", str(args.budget_mb)]
                command += ["--tol", str(args.tol), "--device", args.device, "--runs", str(args.runs)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                found = json.loads(done.stdout.splitlines()[-1])
                return {**spread(found.pop("seconds")), **found}

            table.run(row, **where, samples=n)
        rows = [row for row in table.where(**where) if str(row["samples"]).isdigit()]
        if len(rows) > 1:
            samples, seconds = ([float(row[key]) for row in rows] for key in ("samples", "seconds_median"))
            slope = np.polyfit(np.log(samples), np.log(seconds), 1)[0]
            print(f"exponent {slope:.2f} over {sorted(map(int, samples))}")
            table.add({**where, "samples": "all", "exponent": f"{slope:.3f}"})


if __name__ == "__main__":
    main()
