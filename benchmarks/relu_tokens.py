"""True ReLU heads on image tokens: our network, the gated program at the same β, and Adam on the ReLU network.

    python benchmarks/relu_tokens.py NAME --store STORE [--heads mlp,...] [--classes N --channels D] [--max-time S]

STORE is a token store with a train and a test split: of `convexhead demo` (digits), or of CIFAR-100 images. Three seeds
of everything; Adam's learning rate is the best of three for the first seed's training objective, and its network is as
wide as the widest of ours. Adds rows to benchmarks/results/relu_tokens.csv.

All seconds, --max-time's too, are of processor time, so that other programs on the machine do not matter; take one
thread. Ours include the certificate, which the limit does not shorten. Every fit of ours, whatever the head and the
activation, may take --max-time.

The table there, all of it with --max-time 40: digits as they are, and with --classes 20 --channels 32 --epochs 40 the
store of 8,000 CIFAR-100 images that `heads.py --images` makes.
"""

from __future__ import annotations

import argparse
import csv
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

import convexhead as ch
from common import RESULTS, cpu_name, versions, write_csv
from convexhead.baselines.adam import train_adam, tune_learning_rate
from convexhead.fitting import pose
from convexhead.runtime.clock import count_processor_time, now

HEADS = "mlp,self-attention,mlp-mixer,fno,block-fno"
METHODS = {"relu": ("ours, relu", "Adam, relu"), "gated-relu": ("ours, gated-relu",)}
"""Activations, and the rows that they make: Adam's network has the width of ours."""
SEEDS = (0, 1, 2)


def split(store: ch.TokenStore, name: str, classes: int | None, channels: int | None):
    """Tokens and labels of the first classes and channels, in float32."""
    part = store[name]
    X, y = part.read(), np.asarray(part.labels)
    kept = slice(None) if classes is None else np.isin(y, np.unique(y)[:classes])
    return X[kept][:, :, :channels], y[kept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--store", required=True)
    parser.add_argument("--heads", default=HEADS)
    parser.add_argument("--classes", type=int)
    parser.add_argument("--channels", type=int)
    parser.add_argument("--beta-ratio", type=float, default=0.03)
    parser.add_argument("--max-time", type=float, default=40)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--activations", default=",".join(METHODS), help="activations; the others keep their rows")
    args = parser.parse_args()
    count_processor_time()
    activations = args.activations.split(",")
    warnings.simplefilter("ignore", ConvergenceWarning)  # every row says how far it came
    store = ch.TokenStore.open(args.store)
    X, y = split(store, "train", args.classes, args.channels)
    X_test, y_test = split(store, "test", args.classes, args.channels)
    grid = tuple(store["train"].grid)
    path = RESULTS / "relu_tokens.csv"
    rows: list[dict[str, object]] = []
    if path.exists():
        with path.open() as file:
            rows = [
                row
                for row in csv.DictReader(file)
                if row["data"] != args.name
                or row["head"] not in args.heads.split(",")
                or not any(row["method"] in METHODS[name] for name in activations)
            ]
    where = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "versions": versions("torch", "numpy")}

    def note(head: str, method: str, seed: int, objective: float, model, seconds: float, **more: object) -> None:
        row = {
            "data": args.name, "n": len(X), "tokens": X.shape[1], "channels": X.shape[2], "classes": len(set(y)),
            "head": head, "method": method, "seed": seed, "objective": objective,
            "test_accuracy": model.score(X_test, y_test), "seconds": round(seconds, 1), "clock": "processor", **more,
        }  # fmt: skip
        shown = ("head", "method", "seed", "objective", "test_accuracy", "seconds")
        print({key: row[key] for key in shown}, flush=True)
        rows.append(row | where)
        write_csv("relu_tokens", rows)

    for head in args.heads.split(","):
        common = {"grid": grid, "tol": 1e-3, "n_blocks": 4, "n_gates": 8, "max_time": args.max_time}
        beta_max = ch.beta_max(X, y, head=head, activation="relu", random_state=0, **common)
        beta = args.beta_ratio * beta_max
        fits = []
        for seed in SEEDS:
            for activation in activations:
                clf = ch.ConvexHeadClassifier(head, activation=activation, beta=beta, random_state=seed, **common)
                began = now()
                task = pose(clf, X, y)
                task.beta_max = beta_max  # the same for all seeds
                clf = ch.ConvexHeadClassifier.from_model(task.solve()[0])
                certificate = clf.certificate_
                note(
                    head, "ours, " + activation, seed, certificate.primal, clf, now() - began,
                    beta=beta, heads=clf.n_heads_, scope=certificate.scope, proven_gap=certificate.relative_gap,
                    estimated_gap=certificate.estimated_gap, ascents=certificate.ascents,
                    largest_reward=certificate.rewards[0] if certificate.rewards else None,
                )  # fmt: skip
                if activation == "relu":
                    fits.append(clf)
        if not fits:
            continue
        task = pose(fits[0], X, y)
        task.beta_max = beta_max
        problem = task.problem
        n_heads = max(20, *(fit.n_heads_ for fit in fits))

        def train(lr: float, seed: int, problem=problem, beta=beta, n_heads=n_heads):
            return train_adam(
                problem, beta, n_heads=n_heads, lr=lr, epochs=args.epochs, batch_size=256, seed=seed
            )  # fmt: skip

        tuning = tune_learning_rate(lambda lr: train(lr, SEEDS[0]), (0.003, 0.01, 0.03))
        for run in (tuning.best, *(train(tuning.learning_rate, seed) for seed in SEEDS[1:])):
            trained = task.model(run.module.to_atoms(), None, [], "", run.optimizer)
            same = ch.ConvexHeadClassifier.from_model(trained)
            note(
                head, "Adam, relu", run.seed, run.convex_objective, same, run.seconds,
                beta=beta, heads=n_heads, learning_rate=run.learning_rate,
            )  # fmt: skip


if __name__ == "__main__":
    main()
