"""Attentive probes whose queries are found, certified over all queries of a ball: intervals, time and cells.

    python benchmarks/attentive_global.py random             100 random problems, keys of two dimensions
    python benchmarks/attentive_global.py digits             five sets of digits, of 2x2 pixels
    python benchmarks/attentive_global.py cifar --store DIR  five sets of 10 classes of CIFAR-100, inner tokens

Writes benchmarks/results/attentive_global.csv and prints what it adds up to. A row has the certified relative gap to
the best attentive probe with queries in the ball, and of the bound on the dual norm at its dual point, asked to 1e-3,
the interval and the cells. Seconds are of processor time on one thread: other programs run on the machine.
"""

from __future__ import annotations

import argparse
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

import convexhead as ch
from common import Row, Table, cpu_name, versions
from convexhead.dual_norm.query_bound import largest_reward
from convexhead.runtime.clock import count_processor_time, now

TOL = 1e-2
CLASSES, CHANNELS, IMAGES = 10, 8, 300


def random_problem(seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64], Row]:
    """Normal tokens; labels that a token which a query can find decides, with noise."""
    rng = np.random.default_rng(seed)
    n, s, d, c = (int(rng.integers(low, high)) for low, high in ((12, 41), (3, 9), (2, 7), (2, 5)))
    X = rng.normal(size=(n, s, d))
    loud = X[np.arange(n), (X @ rng.normal(size=d)).argmax(1)]
    y = (loud @ rng.normal(size=(d, c)) + rng.normal(size=(n, c))).argmax(1)
    y[:c] = np.arange(c)
    return X, y, {"beta_ratio": float(rng.choice([0.1, 0.3])), "query_scale": float(rng.choice([1.0, 2.0, 4.0]))}


def digits(seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64], Row]:
    """200 digits as 16 tokens of 2x2 pixels, standardised."""
    data = load_digits()
    pick = np.random.default_rng(seed).permutation(len(data.images))[:200]
    X = data.images[pick].reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
    return (X - X.mean((0, 1))) / X.std((0, 1)), data.target[pick], {"beta_ratio": 0.3, "query_scale": 2.0}


def cifar(seed: int, store: str) -> tuple[NDArray[np.float64], NDArray[np.int64], Row]:
    """300 images of ten classes: 49 tokens of the leading principal channels, half-whitened."""
    train = ch.TokenStore.open(store)["train"]
    labels = np.asarray(train.labels)
    rng = np.random.default_rng(seed)
    classes = rng.permutation(labels.max() + 1)[:CLASSES]
    pick = np.sort(rng.permutation(np.flatnonzero(np.isin(labels, classes)))[:IMAGES])
    X = np.asarray(train.read()[pick], np.float64)
    X -= X.mean((0, 1))
    variances, directions = np.linalg.eigh(np.einsum("nsd,nse->de", X, X) / X[..., 0].size)
    X = X @ (directions[:, -CHANNELS:] / variances[-CHANNELS:] ** 0.25)
    return X / X.std(), labels[pick], {"beta_ratio": 0.3, "query_scale": 2.0}


def measure(X: NDArray[np.float64], y: NDArray[np.int64], settings: Row) -> Row:
    """Fit, certify, and bound the dual norm at the residual of the fit once more."""
    began = now()
    fit = ch.ConvexHeadClassifier(
        "attentive", queries="search", key_dim=2, query_position=False, tol=TOL, fit_intercept=True, random_state=0,
        **settings,
    ).fit(X, y)  # fmt: skip
    seconds, certificate, ball = now() - began, fit.certificate_, fit.model_.head.ball
    classes = np.unique(y)
    R = torch.from_numpy((fit.predict_proba(X) - (y[:, None] == classes)) / len(X))
    began = now()
    norm = largest_reward(torch.from_numpy(X), R, ball.basis, ball.radius, rtol=1e-3)
    return {
        "n": len(X), "s": X.shape[1], "d": X.shape[2], "c": len(classes), **settings,
        "beta": f"{fit.beta_:.6g}", "objective": f"{certificate.primal:.6g}", "lower_bound": f"{certificate.dual:.6g}",
        "relative_gap": f"{certificate.relative_gap:.3g}", "scope": certificate.scope, "queries": len(fit.queries_),
        "fit_seconds": f"{seconds:.3g}", "norm_interval": f"{norm.upper / norm.lower - 1:.3g}", "cells": norm.cells,
        "norm_seconds": f"{now() - began:.3g}",
    }  # fmt: skip


def summary(table: Table, source: str) -> None:
    rows = list(table.where(source=source))
    gaps, cells = ([float(row[name]) for row in rows] for name in ("relative_gap", "cells"))
    times = [float(row["fit_seconds"]) for row in rows]
    proven = sum(row["scope"] == "global" for row in rows)
    print(
        f"{source}: {len(rows)} problems, {proven} global, gap median {median(gaps):.2g}, largest {max(gaps):.2g}; "
        f"cells {median(cells):.0f}; seconds {median(times):.2g}, largest {max(times):.2g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", choices=("random", "digits", "cifar"))
    parser.add_argument("--problems", type=int)
    parser.add_argument("--store")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count_processor_time()
    machine = {"cpu": cpu_name(), "threads": 1, "precision": "float64", "versions": versions("torch", "numpy")}
    table = Table("attentive_global", ("source", "seed"), machine)
    make = {"random": random_problem, "digits": digits, "cifar": lambda seed: cifar(seed, options.store)}
    for seed in range(options.problems or (100 if options.source == "random" else 5)):
        table.run(lambda seed=seed: measure(*make[options.source](seed)), source=options.source, seed=seed)
    summary(table, options.source)


if __name__ == "__main__":
    main()
