"""What a metric of the tokens does to heads: ``fit --whiten A`` on CIFAR-100, β and A chosen on validation images.

    python benchmarks/token_metric.py STORE [--scale 2k] [--heads self-attention ...] [--whiten 0 0.5 1] [--again]

STORE holds tokens of CIFAR-100, as for `convexhead cifar100 --tokens`. Images, validation part, pooling, principal
components and standardisation are those of the experiment's scale (`convexhead.experiments.cifar100.SCALES`). One row a
head and metric: the path over β ends a step after the best validation accuracy, as the experiment's does; its best head
goes on to a certified gap of 1% and is tested once. ``chosen`` marks the metric with the best validation accuracy of
each head, the smaller A among equals. Rows: benchmarks/results/token_metric.csv.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning

import convexhead as ch
from common import Row, Table, hardware
from convexhead.experiments.cifar100 import SCALES
from convexhead.experiments.splits import Splits, chosen_splits
from convexhead.path import best
from convexhead.tokens import whitened

HEADS = ("linear", "self-attention", "mlp-mixer", "mlp")
METRICS = (0.0, 0.5, 1.0)
RATIOS = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
SEARCH_TOL, TOL = 0.02, 0.01


def measured(splits: Splits, head: str, whiten: float) -> Row:
    """The head that validation chooses in this metric."""
    train = whitened(splits.train.tokens, whiten)
    held, test = (part.tokens.reduced(train.reduction) for part in (splits.validation, splits.load_test()))
    began, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        rows = ch.regularization_path(
            train.read(), splits.train.labels, X_val=held.read(), y_val=splits.validation.labels, head=head,
            beta_ratios=RATIOS, patience=1, search_tol=SEARCH_TOL, tol=TOL, random_state=0,
        )  # fmt: skip
    row = best(rows)
    right = row["model"].predict(test.read()) == np.asarray(test.labels)
    return {
        "beta_ratio": row["beta_ratio"],
        "n_heads": row["n_heads"],
        "relative_gap": f"{row['relative_gap']:.2g}",
        "validation": f"{row['val_score']:.4f}",
        "train_accuracy": f"{row['train_score']:.4f}",
        "test": f"{right.mean():.4f}",
        "test_standard_error": f"{(right.mean() * (1 - right.mean()) / len(right)) ** 0.5:.4f}",
        "seconds": f"{time.perf_counter() - began:.0f}",
        "cpu_seconds": f"{time.process_time() - cpu:.0f}",
        "precision": "float32, certificate in float64",
    }


def mark_chosen(table: Table, head: str, where: Row) -> None:
    """Say of each row of the head whether validation chose its metric."""
    rows = list(table.where(**where, head=head))
    chosen = max(rows, key=lambda row: (float(row["validation"]), -float(row["whiten"])))
    for row in rows:
        table.add({**row, "chosen": row is chosen})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--scale", choices=list(SCALES), default="2k")
    parser.add_argument("--heads", nargs="+", default=list(HEADS))
    parser.add_argument("--whiten", type=float, nargs="+", default=list(METRICS))
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    splits = chosen_splits(ch.TokenStore.open(args.store), SCALES[args.scale].images)
    where = {"backbone": splits.backbone, "scale": args.scale, "train": len(splits.train.labels)}
    table = Table("token_metric", (*where, "head", "whiten"), hardware("scikit-learn", "timm"), again=args.again)
    for head in args.heads:
        for whiten in args.whiten:
            table.run(
                lambda head=head, whiten=whiten: measured(splits, head, whiten), **where, head=head, whiten=whiten
            )
        mark_chosen(table, head, where)


if __name__ == "__main__":
    main()
