"""The figure of an instance: how far each solver is above the best proven lower bound, and what it can prove itself.

python benchmarks/curves.py        draws all figures again from the CSVs
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common import RESULTS, Row, read_csv

LOOKS = {
    "convexhead": ("#0072b2", "convexhead"),
    "fista": ("#d55e00", "FISTA with restart"),
    "adam": ("#009e73", "Adam, L2 in the loss: every run"),
    "lbfgs": ("#cc79a7", "L-BFGS on the factors: every run"),
    "scs": ("#e69f00", "CVXPY SCS"),
    "clarabel": ("#56b4e9", "CVXPY Clarabel"),
}


def draw(instance: str, name: str, rows: Iterable[Row], curves: Iterable[Row]) -> Path:
    """``benchmarks/results/<name>.svg``, from the rows and curves of one instance."""
    rows = [row for row in rows if row["instance"] == instance and "objective" in row]
    curves = [point for point in curves if point["instance"] == instance]
    dual = max(float(row["dual"]) for row in rows if "dual" in row)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained", sharex=True)
    for solver, (color, label) in LOOKS.items():
        mine = [row for row in rows if row["solver"] == solver]
        first = True
        for row in mine[-1:] if solver == "convexhead" else mine:  # its last run is the one to the tightest tolerance
            points = [p for p in curves if (p["solver"], p["settings"]) == (solver, row["settings"])]
            seconds = [float(p["seconds"]) for p in points]
            excess = [max(float(p["objective"]) / dual - 1, 1e-9) for p in points]
            style = {"color": color, "label": label if first else None}
            several = solver in ("adam", "lbfgs")
            thin = {"lw": 0.7, "alpha": 0.6} if several else {"lw": 1.6}
            left.plot(seconds, excess, marker="o" if len(points) == 1 else "", **thin, **style)
            known = [(float(p["seconds"]), float(p["relative_gap"])) for p in points if "relative_gap" in p]
            if known:
                right.plot(*zip(*known, strict=True), lw=1.6, ls=":" if solver == "convexhead" else "-", **style)
            first = False
        proven = [
            (float(row["seconds_median"]), float(row["relative_gap_certified"]))
            for row in mine
            if "relative_gap_certified" in row
        ]
        if proven:
            right.plot(*zip(*proven, strict=True), ls="", marker="o", color=color)
    for axes, title in (
        (left, "objective above the best proven lower bound"),
        (right, "gap that the solver knows (points: proven by a run of its own;\ndotted: estimated on the way)"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="seconds", title=title)
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.25, which="both", lw=0.4)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    left.set_ylim(top=10)
    right.set_ylim(top=1.5)
    left.set_ylabel("relative")
    left.legend(fontsize=7, frameon=False)
    machine = rows[-1]
    figure.suptitle(
        f"{instance}    ({machine['cpu']}, threads: {machine['threads']}, {machine['gemm_gflops_float32']} GFLOP/s)",
        fontsize=9,
    )
    path = RESULTS / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def main() -> None:
    rows, curves = read_csv("suite"), read_csv("suite_curves")
    short = {"synthetic n=200": "synthetic-200", "digits": "digits", "synthetic n=1000": "synthetic-1000",
             "CIFAR-2k": "cifar2k", "CIFAR-8k": "cifar8k", "CIFAR-50k": "cifar50k"}  # fmt: skip
    for name in dict.fromkeys(row["instance"] for row in rows):
        found = next(s for start, s in short.items() if name.startswith(start))
        print(draw(name, f"suite-{found}", rows, curves))


if __name__ == "__main__":
    main()
