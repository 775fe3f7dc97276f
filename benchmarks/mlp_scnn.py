"""scnn's problem: two-layer gated ReLU, squared loss, one output. Time for both to come within 1e-6 of the optimum.

    python benchmarks/mlp_scnn.py --scnn-python ENV/bin/python [--quick]

ENV is an environment of its own with `pip install pyscnn`; scnn_worker.py runs in it and arrays travel as npz. Digits 8
against the others (±1) from 64 pixels, columns scaled to norm 1 (scnn's own default), constant ones left out; 100
gates, the same for both. scnn minimises ``(1/2n)‖Σ_j D_j X w_j − y‖² + λ Σ_j ‖w_j‖``, which is our program of the MLP
head with ``s = 1``, ``c = 1``, ``β = λ``: the script recomputes both objectives from the weights by one formula.

``seconds_median`` is when the objective first came within 1e-6 of the optimum: by scnn's own clock, data and patterns
prepared already, in float64 (asked for float32 it computes the same); by ours from arrays. ``whole_call_seconds`` go on
to scnn's stopping rule, and to our certificate of 1e-6. The optimum is our solve certified to 1e-8. Rows:
benchmarks/results/mlp_scnn.csv; about 4 minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

import convexhead as ch
from common import Row, Skip, Table, hardware, measure, spread
from convexhead.solvers import Progress

TOL = 1e-6


def data(n_gates: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``X (n, d)``, ``y (n,)``, gates ``(J, d)`` that give every sample a mask without ties."""
    X, labels = load_digits(return_X_y=True)
    X = X[:, X.std(0) > 0]
    X = X / np.linalg.norm(X, axis=0)
    gates = np.random.default_rng(0).normal(size=(n_gates, X.shape[1]))
    assert (np.abs(X @ gates.T) > 1e-12).all(), "a tie: the two libraries would disagree about its mask"
    return X, np.where(labels == 8, 1.0, -1.0), gates


def objective(X: np.ndarray, y: np.ndarray, gates: np.ndarray, weights: np.ndarray, beta: float) -> float:
    """``(1/2n) ‖Σ_j D_j X w_j − y‖² + β Σ_j ‖w_j‖``, ``weights (J, d)`` of the ``gates (J, d)``."""
    f = ((X @ gates.T > 0) * (X @ weights.T)).sum(1)
    return float(((f - y) ** 2).mean() / 2 + beta * np.linalg.norm(weights, axis=1).sum())


def ours(
    X: np.ndarray, y: np.ndarray, gates: np.ndarray, beta: float, tol: float, callback: Callable | None = None
) -> ch.ConvexHeadRegressor:
    """The same program by the library."""
    model = ch.ConvexHeadRegressor(
        "mlp", activation="gated-relu", gates=gates, beta=beta, tol=tol, random_state=0, device="cpu"
    )
    return model.fit(X[:, None], y, callback=callback)


def weights_of(model: ch.ConvexHeadRegressor) -> np.ndarray:
    """``w_j = Σ_k u_k v_k``, ``(J, d)``."""
    pairs = zip(model.mixing_, model.values_, strict=True)
    return np.stack([U.T @ V[:, 0, 0] for U, V in pairs])


def scnn(python: str, X: np.ndarray, y: np.ndarray, gates: np.ndarray, beta: float, **settings: Any) -> dict[str, Any]:
    """A run in the other environment."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, name)) for name in ("in.npz", "out.npz")]
        np.savez(paths[0], X=X, y=y, G=gates.T, lam=beta, **settings)
        worker = str(Path(__file__).with_name("scnn_worker.py"))
        done = subprocess.run([python, worker, *paths], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Skip(f"scnn failed: {done.stderr.strip().splitlines()[-1]}")
        return dict(np.load(paths[1]))


def scnn_version(python: str) -> str:
    """As its environment knows it."""
    command = "from importlib.metadata import version as v; print('pyscnn', v('pyscnn'), 'numpy', v('numpy'))"
    return subprocess.run([python, "-c", command], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scnn-python", help="interpreter of an environment with pyscnn; without it only ours is timed"
    )
    parser.add_argument("--gates", type=int, default=100)
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.1, 0.01])
    parser.add_argument("--quick", action="store_true", help="20 gates, one weight")
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    n_gates, ratios = (20, [0.1]) if args.quick else (args.gates, args.ratios)
    warnings.simplefilter("ignore")
    table = Table(
        "mlp_scnn_quick" if args.quick else "mlp_scnn",
        ("instance", "beta_ratio", "solver", "settings"),
        hardware(),
        again=args.again,
    )
    X, y, gates = data(n_gates)
    name = f"digits 8 or not, n={len(X)} d={X.shape[1]}, {n_gates} gates, squared loss"
    kind = {"head": "mlp", "activation": "gated-relu", "gates": gates, "loss": "squared"}
    beta_max = ch.beta_max(X[:, None], y, **kind)
    for ratio in ratios:
        beta = ratio * beta_max
        reference = ours(X, y, gates, beta, 1e-8)
        optimum = objective(X, y, gates, weights_of(reference), beta)
        assert abs(optimum - reference.certificate_.primal) < 1e-9 * optimum, "the two formulas differ"
        print(f"{name}, beta/beta_max={ratio:g}: optimum {optimum:.9f}, {reference.certificate_}", flush=True)

        def excess(weights: np.ndarray, beta: float = beta, optimum: float = optimum) -> Row:
            value = objective(X, y, gates, weights, beta)
            return {"objective": f"{value:.10f}", "excess": f"{value / optimum - 1:.2g}"}

        def our_row(beta: float = beta, optimum: float = optimum, excess=excess) -> Row:
            reached = []

            def fit() -> ch.ConvexHeadRegressor:
                near, began = [], time.perf_counter()

                def note(row: Progress) -> None:
                    if row.objective <= optimum * (1 + TOL):
                        near.append(time.perf_counter() - began)

                model = ours(X, y, gates, beta, TOL, note)
                reached.append(near[0] if near else time.perf_counter() - began)
                return model

            times, model = measure(fit)
            gap = f"{model.certificate_.relative_gap:.2g}"
            certified = {"whole_call_seconds": f"{median(times):.4g}", "relative_gap_certified": gap}
            return {**spread(reached[-len(times) :]), **excess(weights_of(model)), **certified}

        def scnn_row(beta: float = beta, optimum: float = optimum, excess=excess) -> Row:
            settings = {"tol": 1e-14, "max_iters": 5000 if args.quick else 20_000}
            run = scnn(args.scnn_python, X, y, gates, beta, **settings)
            order = [int(np.abs(gates - g).sum(1).argmin()) for g in run["G"].T]
            weights = np.zeros_like(gates)
            weights[order] = run["weights"]  # gates with equal patterns it has merged
            close = np.flatnonzero(run["objectives"] <= optimum * (1 + TOL))
            reached = {
                "note": f"not within 1e-6: {run['objectives'].min() / optimum - 1:.1e} after {run['seconds']:.0f} s"
            }
            if len(close):
                reached = spread([float(run["times"][close[0]])])
            return {**reached, **excess(weights), "whole_call_seconds": f"{float(run['seconds']):.4g}"}

        where = {"instance": name, "beta_ratio": f"{ratio:g}"}
        table.run(our_row, **where, solver="convexhead", settings=f"tol={TOL:g}")
        if args.scnn_python:
            version = scnn_version(args.scnn_python)
            table.run(scnn_row, **where, solver="scnn", settings=version)


if __name__ == "__main__":
    main()
