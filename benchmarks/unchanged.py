"""Sixty fits, fixed beforehand, before and after a change that should change no number.

    python benchmarks/unchanged.py record before.json       once with the old code, once with the new
    python benchmarks/unchanged.py compare before.json after.json

The fits are every head with every activation at a small and a mid size, intercepts, losses, pools and gates, two
regularisation paths, and one fit that resumes from its checkpoint. Comparing writes benchmarks/results/unchanged.csv:
the relative difference of objectives, bounds and heads, and whether the worst is below 1e-9. One thread, one seed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

import convexhead as ch
from common import cpu_name, versions, write_csv

AGREE = 1e-9
"""Relative difference that rounding may make, of numbers that are not smaller than `SMALL`."""
SMALL = 1e-3
Numbers = dict[str, float]


class Stop(Exception):
    """Ends a fit from its callback."""


def small() -> tuple[np.ndarray, np.ndarray]:
    """40 samples of 4 tokens with 3 channels, 3 classes."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 4, 3))
    return X, ((X[:, :, 0] * X[:, :, 1]).mean(1) > 0).astype(int) + (X[:, 0, 2] > 0)


def mid() -> tuple[np.ndarray, np.ndarray]:
    """The first 400 digits as 16 tokens of 2 x 2 pixels."""
    digits = load_digits()
    X = digits.images[:400].reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4) / 16
    return X, digits.target[:400]


def numbers(model: Any) -> Numbers:
    """What must not change."""
    certificate = model.certificate_
    return {
        "objective": certificate.primal, "dual": certificate.dual, "heads": model.n_heads_,
        "beta_max": model.beta_max_, "norm": float(sum(np.sum(values) for values in model.singular_values_)),
    }  # fmt: skip


def fit(data: Callable[[], tuple[np.ndarray, np.ndarray]], **settings: Any) -> Callable[[], Numbers]:
    def run() -> Numbers:
        X, y = data()
        if "loss" in settings:
            targets = np.stack([X[:, 0, 0] * X[:, -1, 1], y], axis=1)
            return numbers(ch.ConvexHeadRegressor(**settings, random_state=0).fit(X, targets))
        return numbers(ch.ConvexHeadClassifier(**settings, random_state=0).fit(X, y))

    return run


def path(**settings: Any) -> Callable[[], Numbers]:
    def run() -> Numbers:
        X, y = small()
        rows = ch.regularization_path(X, y, beta_ratios=[0.5, 0.2, 0.05], random_state=0, **settings)
        return {f"{name} {i}": float(row[name]) for i, row in enumerate(rows) for name in ("objective", "n_heads")}

    return run


def resumed() -> Numbers:
    """A fit that is stopped after its third row and goes on from its checkpoint."""
    X, y = mid()
    settings: dict[str, Any] = {"head": "self-attention", "beta_ratio": 0.02, "tol": 1e-5, "random_state": 0}
    rows = 0

    def stop(row: Any) -> None:
        nonlocal rows
        rows += 1
        if rows > 3:
            raise Stop

    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(Stop):
            ch.ConvexHeadClassifier(**settings).fit(X, y, callback=stop, checkpoint=folder, checkpoint_minutes=0.0)
        return numbers(ch.ConvexHeadClassifier(**settings).fit(X, y, checkpoint=folder, checkpoint_minutes=0.0))


def fits() -> Iterator[tuple[str, Callable[[], Numbers]]]:
    """Names and runs."""
    heads = ("self-attention", "mlp-mixer", "fno", "block-fno", "mlp")
    shapes = {"small": small, "mid": mid}
    for size, data in shapes.items():
        for head in heads:
            common: dict[str, Any] = {"head": head, "n_blocks": 3 if size == "small" else 4}
            for activation in ("linear", "gated-relu", "relu"):
                # Neither a clock nor a search may decide where a fit ends.
                own = {"beta_ratio": 0.6, "max_heads": 2} if activation == "relu" else {"beta_ratio": 0.1}
                own |= {"n_gates": 3} if activation == "gated-relu" else {}
                yield f"{size} {head} {activation}", fit(data, **common, activation=activation, tol=1e-3, **own)
        yield f"{size} linear", fit(data, head="linear", beta_ratio=0.01, tol=1e-6)
        yield f"{size} linear intercept", fit(data, head="linear", beta_ratio=0.01, fit_intercept=True)
    for head in heads:
        blocks = {"n_blocks": 3} if head == "block-fno" else {}
        yield f"{head} intercept", fit(small, head=head, beta_ratio=0.05, tol=1e-5, fit_intercept=True, **blocks)
        yield f"{head} cls", fit(small, head=head, beta_ratio=0.05, tol=1e-5, pool="cls", **blocks)
        yield f"{head} squared", fit(small, head=head, beta_ratio=0.05, loss="squared", **blocks)
        yield f"{head} tight", fit(mid, head=head, beta_ratio=0.05, tol=1e-5)
    yield "huber", fit(small, head="mlp", beta_ratio=0.05, loss="huber")
    yield "grouped", fit(mid, head="block-fno", beta_ratio=0.1, outputs="grouped", n_blocks=2)
    yield "few heads", fit(mid, head="self-attention", beta_ratio=0.02, max_heads=3, max_time=None)
    yield "path linear", path(head="self-attention")
    yield "path gated", path(head="mlp", activation="gated-relu", n_gates=3)
    yield "resumed", resumed


def record(out: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Numbers] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, run in fits():
            found[name] = run()
            print(name, found[name], file=sys.stderr, flush=True)
    out.write_text(json.dumps({"cpu": cpu_name(), "versions": versions("torch", "numpy", "scipy"), "fits": found}))


def compare(before: Path, after: Path) -> bool:
    """Whether all numbers agree; writes the table."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    rows = []
    for name, numbers in old["fits"].items():
        other = new["fits"][name]
        worst = max(abs(other[key] - value) / max(abs(value), SMALL) for key, value in numbers.items())
        rows.append({"fit": name, **numbers, "worst_relative_difference": f"{worst:.1e}", "agrees": worst <= AGREE})
    print(write_csv("unchanged", [{**row, "cpu": new["cpu"], "versions": new["versions"]} for row in rows]))
    worst_row = max(rows, key=lambda row: float(row["worst_relative_difference"]))
    print(f"{len(rows)} fits, worst: {worst_row['fit']} {worst_row['worst_relative_difference']}")
    return all(row["agrees"] for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record").add_argument("out", type=Path)
    two = commands.add_parser("compare")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    told = parser.parse_args()
    if told.command == "record":
        record(told.out)
    else:
        sys.exit(not compare(told.before, told.after))
