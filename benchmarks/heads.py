"""Every head, linear and gated, on CIFAR-8k: seconds from tokens to a certified 1e-3, and what an evaluation costs.

    python benchmarks/heads.py --store STORE [--images FOLDER] [--head NAME ...] [--activation NAME ...] [--gates 50]
                               [--max-time 120] [--every 1] [--runs 1] [--again]
    python benchmarks/heads.py --digits ...        scikit-learn's digits instead: 16 tokens of 2 x 2 pixels, 10 classes

STORE as for suite.py --cifar8k: 8,000 images, 49 tokens x 128 channels, 100 classes; it is made of FOLDER where it is
not there yet. β/β_max = 0.02. A row is one fit from arrays to the certificate, β_max included, the median of --runs.
What is not certified within --max-time has the gap that was reached, and `converged` False. --every 4 takes a quarter
of the images.

`times_the_arithmetic` is the time of one evaluation (value and gradient, 32 atoms, or one for each block of the gates)
divided by what its products would take at the GEMM rate of the same run, counted as evaluation.py says.
Rows: benchmarks/results/heads.csv. On 2 cores about 3 minutes for the linear heads and --max-time for most gated ones.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning

import convexhead as ch
from common import Row, Table, hardware, measure, read_csv, spread, write_csv
from convexhead.fitting import pose
from convexhead.program.heads import HEADS
from evaluation import described
from instances import cifar8k_store, digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--store")
    what.add_argument("--digits", action="store_true", help="every fourth image is a test image")
    parser.add_argument("--images")
    parser.add_argument("--head", nargs="*", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--activation", nargs="*", choices=("linear", "gated-relu"), default=("linear", "gated-relu"))
    parser.add_argument("--gates", type=int, default=50)
    parser.add_argument("--max-time", type=float, default=120)
    parser.add_argument("--every", type=int, default=1, help="of so many images one is taken")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)  # every row says how far it came
    if args.digits:
        tokens, labels = (part.numpy() for part in digits())
        held_out = np.arange(len(labels)) % 4 == 0
        (X, y), (X_test, y_test) = ((tokens[rows], labels[rows]) for rows in (~held_out, held_out))
    else:
        store = cifar8k_store(args.store, args.images)
        (X, y), (X_test, y_test) = ((store[split].read(), store[split].labels) for split in ("train", "test"))
    X, y = X[:: args.every], y[:: args.every]
    n, s, d = X.shape
    name = f"{'digits' if args.digits else 'CIFAR'} n={n} s={s} d={d} c={len(set(y))} ratio=0.02"
    machine = hardware("scikit-learn")
    table = Table("heads", ("instance", "head", "activation", "gates", "max_time"), machine, again=args.again)
    for activation in args.activation:
        for head in args.head:
            if activation == "gated-relu" and not HEADS[head].learns_mixing:
                continue

            def row(head: str = head, activation: str = activation) -> Row:
                clf = ch.ConvexHeadClassifier(
                    head,
                    activation=activation,
                    beta_ratio=0.02,
                    tol=1e-3,
                    n_gates=args.gates,
                    max_time=args.max_time,
                    random_state=0,
                    device="cpu",
                )
                times, _ = measure(lambda: clf.fit(X, y), runs=args.runs, budget=args.runs * 2 * args.max_time)
                certificate = clf.certificate_
                problem = pose(clf, X, y).problem
                gated = activation == "gated-relu"
                atoms = problem.n_blocks if gated else 32
                one = described(problem, atoms, args.gates if gated else 0, machine, repeats=3 if gated else 7)
                return {
                    "dtype": f"{str(problem.dtype).removeprefix('torch.')}, certificate float64",
                    **spread(times),
                    "converged": certificate.converged,
                    "objective": f"{certificate.primal:.9f}",
                    "relative_gap_certified": f"{certificate.relative_gap:.2g}",
                    "failure_probability": f"{certificate.failure_probability:.1g}",
                    "scope": certificate.scope,
                    "heads_found": clf.n_heads_,
                    "test_accuracy": f"{clf.score(X_test, y_test):.4f}",
                    "beta": f"{clf.beta_:.8g}",
                    "evaluation_atoms": atoms,
                    "evaluation_seconds": one["seconds_median"],
                    "evaluation_share_of_gemm_rate": one["share_of_gemm_rate"],
                    "times_the_arithmetic": one["times_the_arithmetic"],
                }

            gates = args.gates if activation == "gated-relu" else 0
            where = {"instance": name, "head": head, "activation": activation, "gates": gates}
            table.run(row, **where, max_time=f"{args.max_time:g}")
    compare()


def compare() -> None:
    """Fill in the ratio to self-attention linear on the same tokens and as many threads."""
    rows = read_csv("heads")
    for row in rows:
        where = {"head": "self-attention", "activation": "linear"}
        where |= {key: row[key] for key in ("instance", "threads")}
        base = [
            float(other["seconds_median"])
            for other in rows
            if all(str(other[key]) == str(value) for key, value in where.items())
        ]
        if base:
            row["ratio_to_self_attention_linear"] = f"{float(row['seconds_median']) / base[-1]:.3g}"
    write_csv("heads", rows)


if __name__ == "__main__":
    main()
