"""Out of core: a million samples of 16 x 64 tokens, and 200,000 of 49 x 128, certified; time, peak memory, exponent.

    python benchmarks/million.py --work FOLDER [--case million|wide] [--samples 62500 1000000] [--classes 100]
                                 [--budget-mb 1000] [--slice SECONDS] [--begin COMMAND] [--again]

Tokens are Gaussian, and labels the argmax of a planted attention head of 6 atoms, standardised, plus 0.5 noise, as in
`instances.synthetic`. They are made in chunks that depend on their place alone, and lie as float16 in a token store in
FOLDER: 2.0 GB for a million samples, 2.5 GB for 200,000 of 49 x 128. Stores of fewer hold the first samples.

    case      tokens      sizes                      gap    β/β_max   standard deviation of channel j
    million   16 x 64     62,500 250,000 1,000,000   1e-2   0.3       1
    wide      49 x 128    12,500 50,000 200,000      1e-3   0.6       1/√j, as principal components have one

The head is self-attention. At these β the optimum has a few heads at every size. --budget-mb is the estimator's
`max_memory` at the largest size, and smaller sizes get their part of it: at 16 x 64 a fourth of the tokens as float32,
so that three fourths are read again in every pass. Libraries, targets, outputs and residuals come beside it. Each fit
has a process of its own, which writes checkpoints. With --slice it is killed after so many seconds (SIGKILL) and begun
again from its last checkpoint, as often as it takes; its time is that of all slices together, what a kill lost among
it. --begin is put before each command. --until HH:MM: a fit that is not done then ends with the gap that it has, in its
row.

Where time goes is sampled every 20 ms. ``reader``: share of the time in which the thread that reads and decodes is
busy; it runs beside the others. ``products`` and ``sums``: of the workers' time, or of the main thread's where that is
alone, in matrix products of batches and in adding up what they return. ``rest``: share in which no pass is under way;
what a single thread has beside these it waits for the reader. ``read_mb_s`` and ``decode_mb_s`` are of one
thread: bytes of the files as they lie, and the same bytes as tokens in float32.

Rows: benchmarks/results/million.csv. ``cpu_seconds`` are those of all threads: on a machine that others use they say
more than ``seconds``. Exponents are rows of their own, the slope of log seconds over log samples by least squares.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import convexhead as ch
from common import Row, Table, hardware, tflop_equivalents
from convexhead.tokens.import_arrays import import_arrays
from memory import peak

RANK, CHUNK, STEP = 6, 2500, 0.02


class Case(NamedTuple):
    """What one table of rows is measured on."""

    tokens: int
    channels: int
    samples: tuple[int, ...]
    tol: float
    ratio: float
    decay: float


CASES = {
    "million": Case(16, 64, (62_500, 250_000, 1_000_000), 1e-2, 0.3, 0.0),
    "wide": Case(49, 128, (12_500, 50_000, 200_000), 1e-3, 0.6, 0.5),
}


# -- tokens ------------------------------------------------------------------------------------------------------------
def planted(
    s: int, d: int, c: int, decay: float, chunk: int, scale: tuple[Any, Any] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``(CHUNK, s, d)`` and ``f (CHUNK, c)`` of the planted head, standardised by ``scale``, with noise."""
    head = torch.Generator().manual_seed(0)
    U, V = torch.randn(RANK, d, d, generator=head), torch.randn(RANK, d, c, generator=head)
    own = torch.Generator().manual_seed(1 + chunk)
    X = (torch.randn(CHUNK, s, d, generator=own) * torch.arange(1.0, d + 1) ** -decay).half().float()
    left = torch.einsum("nd,kde->nke", X.mean(1), U)
    mixed = torch.einsum("nks,nse->nke", torch.einsum("nke,nse->nks", left, X), X) / s
    f = mixed.flatten(1) @ V.flatten(0, 1)
    mean, std = (f.mean(0), f.std(0)) if scale is None else scale
    return X, (f - mean) / std + 0.5 * torch.randn(CHUNK, c, generator=own) if scale is not None else f


def make_store(folder: Path, case: Case, c: int, n: int) -> Path:
    """The store of ``n`` samples, made where it is not there."""
    s, d, decay = case.tokens, case.channels, case.decay
    out = folder / f"{n}x{s}x{d}x{c}"
    if out.is_dir():
        return out
    arrays = folder / "arrays"
    arrays.mkdir(parents=True, exist_ok=True)
    _, f = planted(s, d, c, decay, 0, None)
    scale, y = (f.mean(0), f.std(0)), np.empty(n, np.int64)
    X = np.lib.format.open_memmap(arrays / "X.npy", "w+", np.float16, (n, s, d))
    for chunk in range(n // CHUNK):
        rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        tokens, f = planted(s, d, c, decay, chunk, scale)
        X[rows], y[rows] = tokens.numpy(), f.argmax(1).numpy()
    X.flush()
    np.save(arrays / "y.npy", y)
    part = out.with_suffix(".part")
    import_arrays({"train": (str(arrays / "X.npy"), str(arrays / "y.npy"))}, part, shard_size=CHUNK)
    part.rename(out)
    shutil.rmtree(arrays)
    return out


# -- one process -------------------------------------------------------------------------------------------------------
class Where:
    """Samples what the threads of this process do."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.samples = self.workers = 0
        self.alone = torch.get_num_threads() == 1  # the main thread does the workers' work
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over,), daemon=True)
        thread.start()
        # A thread that wakes while Python ends would abort the process.
        atexit.register(thread.join)
        atexit.register(over.set)  # first: the last to be registered

    def _watch(self, over: threading.Event) -> None:
        main = threading.main_thread().ident
        while not over.wait(STEP):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            self.samples += 1
            for ident, innermost in sys._current_frames().items():
                inside, frame = set(), innermost
                while frame is not None:
                    inside.add(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
                    frame = frame.f_back
                worker = names.get(ident, "").startswith("convexhead-worker")
                if worker or (ident == main and self.alone):
                    self.workers += 1
                    if inside & {"workers.run", "workers.add_up"} and "stored_tokens.read_ahead" not in inside:
                        self.counts["sums" if "workers._add" in inside else "products"] += 1
                if worker:
                    continue
                if "stored_tokens.load" in inside:
                    self.counts["reader"] += 1
                elif ident == main and not inside & {"workers.add_up", "stored_tokens.read_ahead"}:
                    self.counts["rest"] += 1

    def shares(self) -> Row:
        """The columns of a row."""
        of_time, of_workers = max(self.samples, 1), max(self.workers, 1)
        by = {"reader": of_time, "rest": of_time, "products": of_workers, "sums": of_workers}
        return {f"share_{kind}": round(self.counts[kind] / whole, 3) for kind, whole in by.items()}


def read_rates(store: Path, view: Any) -> Row:
    """Megabytes of files a second that one thread reads, and that one decodes to float32 once they are read."""
    size, began = 0, time.perf_counter()
    for path in sorted(store.rglob("*.safetensors"))[:40]:
        size += len(path.read_bytes())
    read = time.perf_counter() - began
    n, began = min(len(view), 40 * CHUNK), time.perf_counter()
    for i in range(0, n, CHUNK):
        view[i : i + CHUNK]
    decode = time.perf_counter() - began
    stored = 2 * n * np.prod(view.shape[1:])
    return {"read_mb_s": round(size / 1e6 / read), "decode_mb_s": round(float(stored) / 1e6 / decode)}


def child(args: argparse.Namespace) -> None:
    """One fit; what happens goes into a log, a line each."""
    warnings.simplefilter("ignore")
    case, store, log = CASES[args.case], Path(args.store), Path(args.log)
    view = ch.TokenStore.open(store)["train"]
    before, where, began = peak(), Where(), time.perf_counter()

    def note(**values: Any) -> None:
        values |= {"t": time.perf_counter() - began, "cpu": time.process_time(), "peak_mb": round(peak())}
        with log.open("a") as file:
            file.write(json.dumps({**values, **where.shares(), "pid": os.getpid()}) + "\n")

    machine = hardware()
    note(peak_mb_before=round(before), machine=machine, **read_rates(store, view))
    began = time.perf_counter()
    note(clock=time.time())
    left = None
    if args.until is not None:
        hour, minute = map(int, args.until.split(":"))
        left = max(1.0, (datetime.now().replace(hour=hour, minute=minute, second=0) - datetime.now()).total_seconds())
    clf = ch.ConvexHeadClassifier(
        beta_ratio=case.ratio,
        tol=case.tol,
        max_memory=1e6 * args.budget_mb,
        random_state=0,
        device="cpu",
        max_time=left,
    )
    clf.fit(
        view, callback=lambda row: note(gap=row.gap / row.objective, heads=row.heads), checkpoint=f"{log}.checkpoint",
        checkpoint_minutes=0.5,
    )  # fmt: skip
    certificate = clf.certificate_
    note(
        converged=certificate.converged,
        objective=f"{certificate.primal:.9f}",
        relative_gap_certified=f"{certificate.relative_gap:.2g}",
        heads=clf.n_heads_,
        beta=f"{clf.beta_:.8g}",
        done=True,
    )


# -- all of them -------------------------------------------------------------------------------------------------------
def fitted(args: argparse.Namespace, n: int, store: Path) -> Row:
    """The row of one fit, in as many slices as it takes."""
    log = Path(args.work) / f"{args.case}-{n}-{args.classes}.log"
    if args.again:
        log.unlink(missing_ok=True)
        shutil.rmtree(f"{log}.checkpoint", ignore_errors=True)
    budget = args.budget_mb * n / CASES[args.case].samples[-1]
    command = [*args.begin.split(), sys.executable, __file__, "--child", "--store", str(store)]
    command += ["--log", str(log), "--case", args.case, "--budget-mb", str(budget)]
    command += [] if args.until is None else ["--until", args.until]
    while not (lines := _lines(log)) or "done" not in lines[-1]:
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        known = len(lines)
        while running.poll() is None:
            time.sleep(0.5)
            lines = _lines(log)
            if args.slice and len(lines) > known + 1 and time.time() - lines[known + 1]["clock"] > args.slice:
                os.kill(lines[known]["pid"], signal.SIGKILL)
                running.wait()
        if running.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(running.stderr.read() if running.stderr else "")
    slices: dict[int, list[Row]] = {}
    for line in lines:
        slices.setdefault(line["pid"], []).append(line)
    last, ends = lines[-1], [part[-1] for part in slices.values()]
    seconds = sum(end["t"] for end in ends)
    weighed = {
        name: round(sum(end["t"] * end[name] for end in ends) / seconds, 3) for name in last if name.startswith("share")
    }
    kept = ("converged", "objective", "relative_gap_certified", "heads", "beta")
    first, machine = lines[0], lines[0]["machine"]
    return {
        "max_memory_mb": round(budget, 1),
        "seconds": round(seconds, 1),
        "tflop_equivalents": f"{tflop_equivalents(seconds, machine):.4g}",
        "cpu_seconds": round(sum(end["cpu"] for end in ends), 1),
        "kills": len(slices) - 1,
        "peak_mb": max(end["peak_mb"] for end in ends),
        "peak_mb_before": first["peak_mb_before"],
        **{name: last[name] for name in kept},
        **weighed,
        **{name: first[name] for name in ("read_mb_s", "decode_mb_s")},
        **machine,
        "dtype": "float32, certificate float64",
    }


def _lines(log: Path) -> list[Row]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work")
    parser.add_argument("--case", choices=CASES, default="million")
    parser.add_argument("--samples", type=int, nargs="*")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--budget-mb", type=float, default=1000)
    parser.add_argument("--slice", type=float)
    parser.add_argument("--begin", default="")
    parser.add_argument("--until")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only-store", action="store_true", help="make the store and end")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    for name in ("--store", "--log"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    case = CASES[args.case]
    samples = args.samples or list(case.samples)
    stores = {n: make_store(Path(args.work), case, args.classes, n) for n in samples}
    if args.only_store:
        return
    table = Table("million", ("case", "classes", "budget_mb", "samples"), {}, again=args.again)
    where = {"case": args.case, "classes": args.classes, "budget_mb": f"{args.budget_mb:g}"}
    about = {"tokens": case.tokens, "channels": case.channels, "ratio": case.ratio, "tol": case.tol}
    for n in samples:
        table.run(lambda n=n: about | fitted(args, n, stores[n]), **where, samples=n)
    rows = [row for row in table.where(**where) if str(row["samples"]).isdigit()]
    if sum(row["converged"] in (True, "True") for row in rows) > 1:
        done = [row for row in rows if row["converged"] in (True, "True")]
        sizes = [float(row["samples"]) for row in done]
        slopes = {
            name: f"{np.polyfit(np.log(sizes), np.log([float(row[key]) for row in done]), 1)[0]:.3f}"
            for name, key in (("exponent", "seconds"), ("exponent_cpu", "cpu_seconds"))
        }
        print(slopes, sorted(map(int, sizes)))
        table.add({**where, "samples": "all", **slopes})


if __name__ == "__main__":
    main()
