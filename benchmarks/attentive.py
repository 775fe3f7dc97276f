"""The attentive head on inner tokens: numbers of queries, their scale, places and norm, beside self-attention.

    convexhead extract IMAGES --layer 4 --token-pool 7 --crop-pct 1.0 --no-standardize --dtype float32 --out STORE
    python benchmarks/attentive.py STORE [--per-class 20 64] [--beta-ratio 0.02] [--only NAME …]

Tokens are standardised, half-whitened on the training part and get a channel of ones. Of each class ``--per-class``
train images are for training and 16 others for validation; test images are the store's. Every fit is one row of
results/attentive.csv; seconds are of the processor, since other work may share the machine. Rows that are there are
not measured again.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import convexhead as ch
from common import RESULTS, hardware, write_csv

VALIDATION = 16
"""Images of a class."""
FITS: dict[str, dict[str, Any]] = {
    "self-attention": {"head": "self-attention"},
    "mlp": {"head": "mlp"},
    **{f"{j} queries": {"n_queries": j} for j in (8, 32, 96, 192, 384)},
    "192 queries, no places": {"n_queries": 192, "query_position": False},
    "192 queries, scale 1": {"n_queries": 192, "query_scale": 1.0},
    "192 queries, scale 4": {"n_queries": 192, "query_scale": 4.0},
    "32 queries, a norm for each": {"n_queries": 32, "query_norm": "each"},
    **{f"192 queries, seed {seed}": {"n_queries": 192, "random_state": seed} for seed in (1, 2)},
}


def parts(store: Path, per_class: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tokens and labels of ``train``, ``validation`` and ``test``."""
    views, rng = ch.TokenStore.open(str(store)), np.random.default_rng(0)
    labels, rows = np.asarray(views["train"].labels), {"train": [], "validation": []}
    for label in np.unique(labels):
        shuffled = rng.permutation(np.flatnonzero(labels == label))
        rows["validation"] += shuffled[:VALIDATION].tolist()
        rows["train"] += shuffled[VALIDATION : VALIDATION + per_class].tolist()
    X = np.asarray(views["train"][:], np.float32)
    found = {name: (X[np.sort(some)], labels[np.sort(some)]) for name, some in rows.items()}
    found["test"] = np.asarray(views["test"][:], np.float32), np.asarray(views["test"].labels)
    flat = found["train"][0].reshape(-1, X.shape[2]).astype(np.float64)
    mean, scale = flat.mean(0), flat.std(0)
    variances, directions = np.linalg.eigh(np.corrcoef(flat.T))
    metric = (directions * np.maximum(variances, 1e-6) ** -0.25) @ directions.T

    def prepared(tokens: np.ndarray) -> np.ndarray:
        Z = ((tokens - mean) / scale) @ metric
        return np.concatenate([Z, np.ones_like(Z[..., :1])], axis=2).astype(np.float32)

    return {name: (prepared(tokens), y) for name, (tokens, y) in found.items()}


def measure(data: dict[str, tuple[np.ndarray, np.ndarray]], settings: dict[str, Any]) -> dict[str, Any]:
    """One fit."""
    began = time.process_time()
    clf = ch.ConvexHeadClassifier(**{"head": "attentive", "random_state": 0, **settings}).fit(*data["train"])
    seconds = time.process_time() - began
    certificate = clf.certificate_
    return {
        "images": len(data["train"][0]),
        "tokens": "x".join(map(str, data["train"][0].shape[1:])),
        "beta_ratio": settings["beta_ratio"],
        "validation_accuracy": round(clf.score(*data["validation"]), 4),
        "test_accuracy": round(clf.score(*data["test"]), 4),
        "certified_gap": f"{certificate.relative_gap:.2g}",
        "scope": certificate.scope,
        "heads": clf.n_heads_,
        "cpu_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--per-class", type=int, nargs="*", default=[20])
    parser.add_argument("--beta-ratio", type=float, nargs="*", default=[0.02])
    parser.add_argument("--only", nargs="*", choices=FITS, default=list(FITS))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    out, machine = RESULTS / "attentive.csv", hardware("convexhead")
    rows = list(csv.DictReader(out.open())) if out.exists() else []
    for per_class in given.per_class:
        data = parts(given.store, per_class)
        for name in given.only:
            for ratio in given.beta_ratio:
                key = {"fit": name, "images": str(len(data["train"][0])), "beta_ratio": str(ratio)}
                if any(all(row[part] == value for part, value in key.items()) for row in rows):
                    continue
                row = {"fit": name, **measure(data, {**FITS[name], "beta_ratio": ratio}), **machine}
                print({part: row[part] for part in list(row)[:11]}, flush=True)
                rows.append({part: str(value) for part, value in row.items()})
                write_csv("attentive", rows)


if __name__ == "__main__":
    main()
