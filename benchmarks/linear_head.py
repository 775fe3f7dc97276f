"""The linear head against scikit-learn's logistic regression: CPU seconds to an objective near the optimum.

    python benchmarks/linear_head.py [--store STORE --work FOLDER] [--only digits path 8000 50000 memory 100000]

Digits (1,797 x 64, divided by 16, 10 classes). With STORE, CIFAR-100 through EfficientNet-Lite0 as suite.py and
growth.py have it: its stored 1280 channels, averaged over the tokens and standardised, 80 images a class (8,000) and
all 50,000. And a synthetic problem of 100,000 x 1024, 1000 classes. All have an intercept. scikit-learn minimises
``½‖W‖² + C Σ_i ℓ_i``: ours times ``n C``, ``β = 1/(n C)``.

Ours runs at the tolerance that is asked for, and proves it. scikit-learn runs at the loosest power of ten of its own
tolerance whose objective, recomputed in float64, is as near. Features are float64 up to 8,000 samples, and float32 as
well where they came from a network: there they are float32 in ours at 50,000. An excess is one over a lower bound that
a fit of ours proves: the true one is at most that. One thread, CPU seconds; fits of less than 3 seconds are repeated,
all solvers in turns.

``path``: 45 values of C, each certified 1e-3, beside five of scikit-learn's at tol=1e-6, and beside all of them, of
which as many are taken, from the smallest up, as fit into 240 s; both start each fit where the one before ended. On
Lite0 in float32, as a network gives features, and in float64, as most people pass them.
scikit-learn's ``excess`` is the largest of its values.

``memory``: the largest resident memory of a process that fits 50,000 samples of 1280 float32 features (Gaussian
classes; what they are does not matter here), from an array or from a store, above what it had before it read them, in
units of the features: benchmarks/results/linear_memory.csv.

``100000``: two threads, seconds, a limit of 240 s each, after which scikit-learn and torch's L-BFGS are stopped
where they are. Rows: benchmarks/results/linear_head.csv. Each value of ``--only`` takes some minutes, most of them
scikit-learn's. Without it: digits, path and 8000. The largest one is measured alone.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

import convexhead as ch
from common import Row, Table, hardware, spread, timed

ASKED = (1e-3, 1e-6)
"""Excess over the optimum, relative to it."""
TOLERANCES = tuple(10.0**-k for k in range(2, 10))
"""Of scikit-learn."""
PATH = np.logspace(-6, 5, 45)
"""The field's values of C."""
RUNS, SHORT = 5, 3.0
"""Runs of a fit that takes less than so many seconds; others run once."""
LIMIT = 240.0
"""Seconds of scikit-learn's path, and of each solver of the largest problem."""
LARGE = 20_000
"""Samples from which fits run once, and the lower bound is that of the tightest one that is asked for."""

timed_on_cpu = partial(timed, clock=time.process_time)


# -- features ---------------------------------------------------------------------------------------------------------
def mean_tokens(store: str, work: Path) -> tuple[np.ndarray, np.ndarray]:
    """Stored channels of the training images, averaged over the tokens, and labels; kept in ``work``."""
    view, kept = ch.TokenStore.open(store)["train"], work / f"{Path(store).name}-means.npy"
    if not kept.exists():
        np.save(kept, np.concatenate([chunk.astype(np.float32).mean(1) for chunk in view.raw_chunks(200)]))
    return np.load(kept), np.asarray(view.labels)


def standardised(X: np.ndarray, y: np.ndarray, each: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``each`` images of a class, every channel with mean 0 and variance 1; float32."""
    order = np.argsort(y, kind="stable")
    place = np.arange(len(y)) - np.searchsorted(y[order], y[order])
    kept = np.sort(order[place < each])
    X = X[kept]
    return (X - X.mean(0)) / X.std(0), y[kept]


def clusters(n: int, d: int, c: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian classes whose means lie in a space of 64 dimensions, in noise: float32."""
    rng = np.random.default_rng(0)
    means = (rng.normal(size=(c, 64)) @ rng.normal(size=(64, d)) / 64).astype(np.float32)
    y = rng.integers(c, size=n)
    return means[y] + rng.normal(size=(n, d)).astype(np.float32), y


# -- one fit ----------------------------------------------------------------------------------------------------------
def objective(W: np.ndarray, b: np.ndarray, X: np.ndarray, y: np.ndarray, beta: float) -> float:
    """``(1/n) Σ_i ℓ_i + β/2 ‖W‖²`` in float64, ``W (d, c)``, ``b (c,)``."""
    total = 0.0
    for i in range(0, len(X), 5000):
        f = X[i : i + 5000].astype(np.float64) @ W + b
        largest = f.max(1)
        log_sum = np.log(np.exp(f - largest[:, None]).sum(1)) + largest
        total += float((log_sum - f[np.arange(len(f)), y[i : i + 5000]]).sum())
    return total / len(X) + beta / 2 * float((W**2).sum())


def fit_ours(X: np.ndarray, y: np.ndarray, C: float, tol: float, **limits: float) -> ch.ConvexHeadClassifier:
    """The certified one."""
    beta = 1 / (len(X) * C)
    head = ch.ConvexHeadClassifier(
        "linear", beta=beta, fit_intercept=True, tol=tol, random_state=0, device="cpu", **limits
    )
    return head.fit(X, y)


def fit_theirs(X: np.ndarray, y: np.ndarray, C: float, tol: float, max_iter: int = 20_000) -> LogisticRegression:
    """scikit-learn's, by its default solver, with steps enough."""
    return LogisticRegression(C=C, tol=tol, max_iter=max_iter).fit(X, y)


def compare(X: np.ndarray, y: np.ndarray, C: float, dtypes: tuple[type, ...], first: float) -> Iterator[Row]:
    """Rows of all solvers for each excess in `ASKED`; ``first`` is the tolerance that scikit-learn begins with."""
    beta, few = 1 / (len(X) * C), len(X) < LARGE
    optimum = fit_ours(X, y, C, 1e-8).certificate_.dual if few else np.nan

    def excess(model: ch.ConvexHeadClassifier | LogisticRegression) -> float:
        W, b = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
        value = objective(W if isinstance(model, ch.ConvexHeadClassifier) else W.T, b, X, y, beta)
        return value / optimum - 1

    def tighter(X: np.ndarray) -> Iterator[tuple[float, float, float]]:
        """scikit-learn's tolerance, seconds and excess."""
        for tol in TOLERANCES:
            if tol <= 1.01 * first:
                seconds, model = timed_on_cpu(partial(fit_theirs, X, y, C, tol))
                print(f"scikit-learn {X.dtype} C={C:g} tol={tol:g}: {seconds:.3g} s, {excess(model):.2g}", flush=True)
                yield tol, seconds, excess(model)

    ours = {asked: timed_on_cpu(partial(fit_ours, X, y, C, asked)) for asked in ASKED}
    optimum = optimum if few else max(model.certificate_.dual for _, model in ours.values())
    tightened = {dtype: tighter(X.astype(dtype)) for dtype in dtypes}
    reached = {dtype: next(fits) for dtype, fits in tightened.items()}
    for asked in ASKED:
        seconds, model = ours[asked]
        proven = model.certificate_.relative_gap
        rows: list[Row] = [{"solver": "convexhead", "dtype": X.dtype.name, "settings": f"tol={asked:g}",
                            "excess": f"{excess(model):.2g}", "relative_gap_certified": f"{proven:.2g}"}]  # fmt: skip
        fits, times = [partial(fit_ours, X, y, C, asked)], [[seconds]]
        enough = asked if few else asked + ours[ASKED[-1]][1].certificate_.relative_gap
        for dtype in dtypes:
            row = {"solver": "scikit-learn lbfgs", "dtype": np.dtype(dtype).name}
            while reached[dtype][2] > enough and (better := next(tightened[dtype], None)):
                reached[dtype] = better
            tol, seconds, far = reached[dtype]
            if far > enough:
                yield {"asked": f"{asked:g}", **row, "note": f"{far:.1e} above at tol={tol:g}"}
                continue
            rows.append({**row, "settings": f"tol={tol:g}", "excess": f"{far:.2g}"})
            fits.append(partial(fit_theirs, X.astype(dtype), y, C, tol))
            times.append([seconds])
        for _ in range(RUNS - 1):
            for fit, taken in zip(fits, times, strict=True):
                if taken[0] < SHORT:
                    taken.append(timed_on_cpu(fit)[0])
        for row, taken in zip(rows, times, strict=True):
            yield {"asked": f"{asked:g}", **row, **spread(taken)}


# -- a path -----------------------------------------------------------------------------------------------------------
def our_path(X: np.ndarray, y: np.ndarray) -> list[Row]:
    """All of `PATH`, certified 1e-3."""
    parameters = {"head": "linear", "fit_intercept": True, "tol": 1e-3, "random_state": 0, "device": "cpu"}
    return ch.regularization_path(X, y, Cs=PATH, **parameters)


def their_path(X: np.ndarray, y: np.ndarray, Cs: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights at the same values, or some of them, as good as ``tol=1e-6`` makes them, for `LIMIT` seconds."""
    model, began = LogisticRegression(tol=1e-6, max_iter=20_000, warm_start=True), time.process_time()
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for C in Cs:
        model.set_params(C=C).fit(X, y)
        found.append((model.coef_.T.astype(np.float64), model.intercept_.astype(np.float64)))
        if time.process_time() - began > LIMIT:
            break
    return found


def compare_paths(name: str, X: np.ndarray, y: np.ndarray, table: Table, some: dict[str, np.ndarray]) -> None:
    """A path of ours beside scikit-learn's fits at ``some`` values of C."""
    fits = {"ours": partial(our_path, X, y), **{told: partial(their_path, X, y, Cs) for told, Cs in some.items()}}
    times: dict[str, list[float]] = {who: [] for who in fits}
    found: dict[str, Row] = {}
    bounds: dict[str, float] = {}
    for _ in range(RUNS):
        for who, fit in fits.items():
            if times[who] and times[who][0] > SHORT:
                continue
            seconds, result = timed_on_cpu(fit)
            times[who].append(seconds)
            if who == "ours":
                worst = max(row["relative_gap"] for row in result)
                certified = sum(row["converged"] for row in result)
                settings = f"tol=0.001, {certified} certified"
                found[who] = {"settings": settings, "relative_gap_certified": f"{worst:.2g}"}
                bounds = {f"{row['C']:.6g}": row["dual"] for row in result}
            else:
                excess = [
                    objective(W, b, X, y, 1 / (len(X) * C)) / bounds[f"{C:.6g}"] - 1
                    for C, (W, b) in zip(some[who], result, strict=False)
                ]
                found[who] = {"excess": f"{max(excess):.2g}"}
                if len(result) < len(some[who]):
                    found[who]["note"] = f"stopped after {len(result)} of {len(some[who])} values"
    for told in some:
        key = {
            "instance": f"{name}, a path of 45 beside {told} of scikit-learn's",
            "C": "1e-6 to 1e5",
            "asked": "0.001",
        }
        theirs = {"solver": "scikit-learn lbfgs", "dtype": X.dtype.name, "settings": "tol=1e-06", **found.get(told, {})}
        table.add({**key, **theirs, **spread(times[told])})
        table.add({**key, "solver": "convexhead", "dtype": X.dtype.name, **found["ours"], **spread(times["ours"])})


# -- memory -----------------------------------------------------------------------------------------------------------
def resident(what: str) -> float:
    """Bytes that this process holds (``VmRSS``) or has held at most (``VmHWM``)."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024.0


def measure_memory(source: str, C: float) -> None:
    """Fit what is in ``source`` in this process, and print its memory in units of the features, and the gap."""
    torch.set_num_threads(1)
    digits = load_digits()
    fit_ours(digits.data / 16, digits.target, 1.0, 1e-3)  # with all that a first fit loads
    before = resident("VmRSS")
    stored = Path(source).is_dir()
    X = ch.TokenStore.open(source)["train"] if stored else np.load(source)
    y = np.asarray(X.labels) if stored else np.load(Path(source).parent / "y.npy")
    model = fit_ours(X, y, C, 1e-3)
    features = 4 * len(y) * model.n_features_in_
    print((resident("VmHWM") - before) / features, model.certificate_.relative_gap)


def compare_memory(X: np.ndarray, y: np.ndarray, C: float, table: Table) -> None:
    """A process for each source."""
    with tempfile.TemporaryDirectory(prefix="convexhead-linear-") as folder:
        array, store = Path(folder) / "X.npy", Path(folder) / "store"
        np.save(array, X)
        np.save(Path(folder) / "y.npy", y)
        ch.tokens.import_arrays({"train": (X, y)}, store, standardize=False, dtype="float32")
        for told, source in {"array": array, "store": store}.items():
            command = [sys.executable, __file__, "--child", str(source), str(C)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            units, gap = map(float, done.stdout.split())
            row = {"source": told, "samples": len(X), "channels": X.shape[1], "classes": len(set(y)), "C": f"{C:g}"}
            table.add({**row, "relative_gap_certified": f"{gap:.2g}", "memory_in_features": f"{units:.3g}"})
            print(told, units, flush=True)


# -- the largest one --------------------------------------------------------------------------------------------------
def torch_lbfgs(X: np.ndarray, y: np.ndarray, C: float, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """torch's L-BFGS on the same objective in float32, for so many seconds."""
    began, beta = time.perf_counter(), 1 / (len(X) * C)
    features, labels = torch.from_numpy(X), torch.from_numpy(y)
    head = torch.nn.Linear(X.shape[1], int(y.max()) + 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=1, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(features), labels) + beta / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    while time.perf_counter() - began < limit:
        optimizer.step(closure)
    return head.weight.detach().numpy().T.astype(np.float64), head.bias.detach().numpy().astype(np.float64)


def compare_largest(C: float, table: Table) -> None:
    """Ours to 1e-3, and how far the others are after as many seconds as they may take."""
    X, y = clusters(100_000, 1024, 1000)
    beta = 1 / (len(X) * C)
    key = {"instance": "synthetic, 100000 x 1024, 1000 classes", "C": f"{C:g}", "asked": "0.001", "dtype": "float32"}
    seconds, model = timed(partial(fit_ours, X, y, C, 1e-3, max_time=LIMIT))
    dual = model.certificate_.dual
    excess = objective(model.coef_, model.intercept_, X, y, beta) / dual - 1
    certified = {"excess": f"{excess:.2g}", "relative_gap_certified": f"{model.certificate_.relative_gap:.2g}"}
    table.add({**key, "solver": "convexhead", "settings": "tol=0.001", **certified, **spread([seconds])})
    print(seconds, excess, flush=True)

    def by_steps() -> tuple[np.ndarray, np.ndarray]:
        each = timed(partial(fit_theirs, X, y, C, 1e-9, 3))[0] / 4
        model = fit_theirs(X, y, C, 1e-9, max(1, int(LIMIT / each) - 4))
        return model.coef_.T.astype(np.float64), model.intercept_.astype(np.float64)

    others: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
        "scikit-learn lbfgs": by_steps, "torch L-BFGS": partial(torch_lbfgs, X, y, C, LIMIT)
    }  # fmt: skip
    for solver, fit in others.items():
        seconds, (W, b) = timed(fit)
        excess = objective(W, b, X, y, beta) / dual - 1
        table.add({**key, "solver": solver, "settings": "stopped", "excess": f"{excess:.2g}", **spread([seconds])})
        print(solver, seconds, excess, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store")
    parser.add_argument("--work", default=".", help="folder that keeps the features of the store")
    parser.add_argument("--only", nargs="+", default=["digits", "path", "8000"])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--child", nargs=2)
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    if args.child:
        measure_memory(args.child[0], float(args.child[1]))
        return
    largest = args.only == ["100000"]
    clock = time.perf_counter if largest else time.process_time
    torch.set_num_threads(2 if largest else 1)
    threadpool_limits(2 if largest else 1)
    machine = {**hardware("scikit-learn", clock=clock), "clock": "seconds" if largest else "CPU seconds"}
    table = Table("linear_head", ("instance", "C", "asked", "solver", "dtype"), machine, again=args.again)
    if largest:
        compare_largest(0.01, table)
        return

    def run(instance: str, X: np.ndarray, y: np.ndarray, C: float, dtypes: tuple[type, ...], first: float) -> None:
        last = {"solver": "convexhead", "dtype": X.dtype.name, "asked": f"{ASKED[-1]:g}"}
        if not table.has(instance=instance, C=f"{C:g}", **last):
            for row in compare(X, y, C, dtypes, first):
                table.add({"instance": instance, "C": f"{C:g}", **row})
                print(instance, C, row, flush=True)

    digits = load_digits()
    if "digits" in args.only:
        for C in (1.0, 100.0, 1e4):
            run("digits, 1797 x 64, 10 classes", digits.data / 16, digits.target, C, (np.float64,), 1e-2)
    if "path" in args.only:
        compare_paths("digits", digits.data / 16, digits.target, table, {"five": PATH[::11], "45": PATH})
    if "memory" in args.only:
        about = {name: machine[name] for name in ("cpu", "cores", "threads", "versions")}
        compare_memory(
            *clusters(50_000, 1280, 100), 0.01, Table("linear_memory", ("source", "samples"), about, again=True)
        )
    if not args.store:
        return
    means, labels = mean_tokens(args.store, Path(args.work))
    for each in (80, 500):
        if not {f"{100 * each}", *(("path",) if each == 80 else ())} & set(args.only):
            continue
        X, y = standardised(means, labels, each)
        name = f"mean tokens of Lite0, {len(X)} x {X.shape[1]}, {len(np.unique(y))} classes"
        if "8000" in args.only and each == 80:
            for C in (0.01, 1.0, 100.0):
                run(name, X.astype(np.float64), y, C, (np.float64, np.float32), 1e-2)
        if "path" in args.only and each == 80:
            compare_paths(name, X, y, table, {"five": PATH[::11], "45": PATH})
            compare_paths(f"{name}, in float64", X.astype(np.float64), y, table, {"45": PATH})
        if "50000" in args.only and each == 500:
            for C, first in ((0.01, 1e-3), (1.0, 1e-5)):
                run(name, X, y, C, (np.float32, np.float64), first)


if __name__ == "__main__":
    main()
