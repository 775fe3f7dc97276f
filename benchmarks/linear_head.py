"""The linear head against scikit-learn's logistic regression: seconds to an objective within 1e-6 of the optimum.

    python benchmarks/linear_head.py --store STORE [--images FOLDER] [--ratios 0.02 0.002] [--quick] [--again]

STORE as for suite.py --cifar8k; its stored 1280 channels are standardised and averaged over the tokens: 8,000 x 1280,
100 classes, no intercept. scikit-learn minimises ``½‖W‖² + C Σ_i ℓ_i``: ours times ``n C``, ``β = 1/(n C)``.
Both solvers are timed at the loosest power of ten of their own tolerance whose objective, recomputed in float64, is
within 1e-6; the optimum is our fit certified to 1e-8. Tokens in float32 and in float64 are both tried. Medians of up to
5 runs. Rows: benchmarks/results/linear_head.csv; 3 minutes on 2 cores. A last row has the L2 weight that is best of
five on the test images: the linear probe that heads are compared with.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import convexhead as ch
from common import Row, Skip, Table, hardware, measure, spread
from instances import cifar8k_store

TOL = 1e-6


def mean_tokens(view) -> np.ndarray:
    """``(n, 1280)``: stored channels, averaged over the tokens."""
    parts = [chunk.astype(np.float32).mean(1) for chunk in view.raw_chunks(200)]
    return np.concatenate(parts).astype(np.float64)


def objective(W: np.ndarray, X: np.ndarray, y: np.ndarray, beta: float) -> float:
    """``(1/n) Σ_i ℓ_i + β/2 ‖W‖²``, ``W (d, c)``."""
    f = X @ W
    largest = f.max(1)
    log_sum = np.log(np.exp(f - largest[:, None]).sum(1)) + largest
    return float((log_sum - f[np.arange(len(y)), y]).mean() + beta / 2 * (W**2).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--images")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.02, 0.002])
    parser.add_argument("--quick", action="store_true", help="1,000 samples, one run")
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    store = cifar8k_store(args.store, args.images)
    scaler = StandardScaler()
    X, y = scaler.fit_transform(mean_tokens(store["train"])), np.asarray(store["train"].labels)
    X_test, y_test = scaler.transform(mean_tokens(store["test"])), np.asarray(store["test"].labels)
    if args.quick:
        X, y = X[::8], y[::8]
    name = f"mean tokens of Lite0, {len(X)} x {X.shape[1]}, 100 classes"
    table = Table(
        "linear_head_quick" if args.quick else "linear_head",
        ("instance", "beta_ratio", "solver", "dtype"),
        hardware("scikit-learn"),
        again=args.again,
    )
    beta_max = ch.beta_max(X, y, head="linear")

    def fit_ours(X: np.ndarray, beta: float, tol: float) -> ch.ConvexHeadClassifier:
        return ch.ConvexHeadClassifier("linear", beta=beta, tol=tol, random_state=0, device="cpu").fit(X, y)

    def fit_theirs(X: np.ndarray, beta: float, tol: float) -> LogisticRegression:
        C = 1 / (len(X) * beta)
        return LogisticRegression(C=C, tol=tol, fit_intercept=False, max_iter=20_000).fit(X, y)

    for ratio in args.ratios:
        beta = ratio * beta_max
        optimum = fit_ours(X, beta, 1e-8).certificate_.primal

        def loosest(
            fit: Callable, X_: np.ndarray, tolerances: tuple[float, ...], beta: float = beta, optimum: float = optimum
        ) -> Row:
            """The first tolerance that is good enough, timed."""
            for tol in tolerances:
                model = fit(X_, beta, tol)
                coef = model.coef_ if isinstance(model, ch.ConvexHeadClassifier) else model.coef_.T
                value = objective(coef.astype(np.float64), X, y, beta)
                if value - optimum <= TOL * optimum:
                    times, model = measure(lambda tol=tol: fit(X_, beta, tol), runs=1 if args.quick else 5)
                    proven = getattr(model, "certificate_", None)
                    return {
                        **spread(times),
                        "settings": f"tol={tol:g}",
                        "objective": f"{value:.9f}",
                        "excess": f"{value / optimum - 1:.2g}",
                        "relative_gap_certified": "" if proven is None else f"{proven.relative_gap:.2g}",
                        "test_accuracy": f"{(model.predict(X_test) == y_test).mean():.4f}",
                        "C": f"{1 / (len(X) * beta):.6g}",
                    }
            raise Skip(f"not within 1e-6 at tol={tolerances[-1]:g}: {value / optimum - 1:.1e}")

        where = {"instance": name, "beta_ratio": f"{ratio:g}"}
        for X_ in (X, X.astype(np.float32)):
            kind = {"dtype": str(X_.dtype)}
            ours, theirs = (1e-4, 1e-5, 1e-6, 1e-7), (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
            table.run(lambda X_=X_, t=ours: loosest(fit_ours, X_, t), **where, solver="convexhead", **kind)
            table.run(lambda X_=X_, t=theirs: loosest(fit_theirs, X_, t), **where, solver="scikit-learn lbfgs", **kind)

    def best_probe() -> Row:
        scores = {}
        for ratio in (0.1, 0.05, 0.02, 0.01, 0.005):
            scores[ratio] = fit_ours(X, ratio * beta_max, 1e-3).score(X_test, y_test)
        ratio = max(scores, key=scores.get)
        return {"note": f"test accuracies by beta_ratio: {scores}", "test_accuracy": scores[ratio]}

    table.run(best_probe, instance=name, beta_ratio="best of five on test", solver="convexhead", dtype="float64")


if __name__ == "__main__":
    main()
