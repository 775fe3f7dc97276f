"""Certified self-attention on 8,000 CIFAR-100 images: time to a certified 1e-3, and the arithmetic of one evaluation.

    python benchmarks/cifar8k.py --images FOLDER [--tokens STORE]

FOLDER holds train/ and test/ with 80 and 20 images of each of the 100 classes. Tokens are EfficientNet-Lite0's last map
(7 x 7 x 1280 at 224 px), standardised, 128 principal components; self-attention linear, beta/beta_max = 0.02.
Appends to benchmarks/results/cifar8k.csv; everything is timed in one process, GEMM rate included.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression

import convexhead as ch
from convexhead.experiments.comparison import environment
from convexhead.tokens import extract

RESULTS = Path(__file__).parent / "results" / "cifar8k.csv"


def seconds(run, repeats: int) -> float:
    """Median wall time of ``run`` after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def gemm_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """GFLOP/s of a square matrix product."""
    A, B = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: A @ B, 9) / 1e9


def evaluation_rate(clf: ch.ConvexHeadClassifier, X, y, heads: int) -> tuple[float, float]:
    """Seconds and GFLOP/s of value and gradient in float32, counting the products the factored form needs.

    Per sample and head: ``q U`` and its adjoint ``2·2d²``, through the keys and back ``2·min(2d², 4sd)``, and three
    products with values ``3·2dc``.
    """
    problem, _ = clf._prepare(X, y)
    n, s, d = X.shape
    c = problem.c
    generator = torch.Generator().manual_seed(0)
    atoms = problem.empty()
    atoms.U = 0.01 * torch.randn(heads, d, d, generator=generator)
    atoms.V = 0.01 * torch.randn(heads, d, c, generator=generator)
    atoms.block = torch.zeros(heads, dtype=torch.int64)
    taken = seconds(lambda: problem.value_and_gradient(atoms, 0.1), 7)
    flop = n * heads * (4 * d * d + 2 * min(2 * d * d, 4 * s * d) + 6 * d * c)
    return taken, flop / taken / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--tokens", default="cifar8k-tokens")
    parser.add_argument("--runs", type=int, default=1)
    args = parser.parse_args()
    store = extract(args.images, "packaged:efficientnet-lite0", args.tokens, channels=128, reduce="pca", crop_pct=1.0)
    X, y = store["train"].read(), store["train"].labels
    X_test, y_test = store["test"].read(), store["test"].labels

    parameters = {"head": "self-attention", "beta_ratio": 0.02, "tol": 1e-3, "random_state": 0}
    rate32 = gemm_rate(torch.float32)
    evaluation, rate = evaluation_rate(ch.ConvexHeadClassifier(**parameters), X, y, 32)
    print(f"GEMM {rate32:.0f} GFLOP/s; an evaluation of 32 heads {evaluation:.3f} s, {rate:.0f} GFLOP/s", flush=True)
    times = []
    for _ in range(args.runs):
        began = time.perf_counter()
        clf = ch.ConvexHeadClassifier(**parameters).fit(X, y)
        times.append(time.perf_counter() - began)
        print(f"{times[-1]:.1f} s: {clf.certificate_}; {clf.n_heads_} heads", flush=True)
    probe = max(
        LogisticRegression(C=C, max_iter=500).fit(X.mean(1), y).score(X_test.mean(1), y_test) for C in (0.01, 0.1, 1.0)
    )
    fitted = statistics.median(times)
    row = {
        "instance": "CIFAR-8k, Lite0 last map, PCA 128, self-attention linear, beta_ratio 0.02",
        "seconds_median": round(fitted, 1),
        "seconds_min": round(min(times), 1),
        "seconds_max": round(max(times), 1),
        "runs": args.runs,
        "tflop_equivalents_of_float32_gemm": round(fitted * rate32 / 1000, 2),
        "objective": clf.certificate_.primal,
        "relative_gap_certified": clf.certificate_.relative_gap,
        "failure_probability": clf.certificate_.failure_probability,
        "heads": clf.n_heads_,
        "test_accuracy": clf.score(X_test, y_test),
        "linear_probe_best_of_three_on_test": probe,
        "evaluation_seconds_32_heads": round(evaluation, 4),
        "evaluation_gflops": round(rate, 1),
        "gemm_gflops_float32": round(rate32, 1),
        "gemm_gflops_float64": round(gemm_rate(torch.float64), 1),
        "share_of_gemm_rate": round(rate / rate32, 3),
        "dtype": "solver float32, certificate float64",
        "threads": torch.get_num_threads(),
        **environment(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
