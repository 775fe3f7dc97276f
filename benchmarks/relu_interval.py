"""The picture of docs/activations.md: the certified interval of a ReLU head closing, and where training runs end.

python benchmarks/relu_interval.py          writes docs/images/relu-interval.svg
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from convexhead.drive import solve
from convexhead.program.activations import GatedReLU, ReLU
from convexhead.program.heads import make_head
from convexhead.program.losses import CrossEntropy
from convexhead.program.operator import Operator
from convexhead.program.patterns import all_gates
from convexhead.program.problem import Problem
from relu_restarts import restarts

OUT = Path(__file__).parents[1] / "docs" / "images" / "relu-interval.svg"
UPPER, LOWER, RUNS = "#0072b2", "#009e73", "#999999"


def main() -> None:
    generator = torch.Generator().manual_seed(4)
    n, c = 12, 3
    X = torch.randn(n, 2, 2, generator=generator, dtype=torch.float64)
    Y = torch.nn.functional.one_hot(torch.randint(c, (n, 1), generator=generator), c).double()
    head = make_head("mlp", 2, 2)
    beta = 0.015
    relu = Problem(Operator(X, head, ReLU(head)), Y, CrossEntropy())
    solution = solve(relu, beta, tol=1e-5, generator=torch.Generator().manual_seed(0))
    gated = Problem(Operator(X, head, GatedReLU(head, all_gates(head, X))), Y, CrossEntropy())
    relaxed = solve(gated, beta, tol=1e-4, generator=torch.Generator().manual_seed(0)).certificate
    runs = restarts(relu, beta, n_restarts=100, n_heads=8, steps=400, polish=0).numpy()

    # Rounds end where the history has a new lower bound.
    upper, lower = [], []
    for row in solution.history:
        bound = row.objective - row.gap
        if not lower or bound > lower[-1] + 1e-12 or row.objective < upper[-1] - 1e-12:
            upper.append(row.objective)
            lower.append(max(bound, lower[-1] if lower else 0.0))
    steps = np.arange(len(upper))

    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(7.2, 3.0), sharey=True, gridspec_kw={"width_ratios": [3, 1.2]}, layout="constrained"
    )
    left.fill_between(steps, lower, upper, color=UPPER, alpha=0.12, lw=0)
    left.plot(steps, upper, color=UPPER, lw=1.6, label="objective of our network")
    left.plot(steps, lower, color=LOWER, lw=1.6, label="proven lower bound")
    left.axhline(relaxed.primal, color="#cc79a7", lw=1.2, ls="--", label="gated ReLU, all patterns")
    left.set_xlabel("progress of the solver")
    left.set_ylabel("objective")
    left.set_ylim(0, upper[0] * 1.05)
    left.legend(frameon=False, loc="lower right")
    left.set_title(
        f"certified within {100 * solution.certificate.relative_gap:.1g}%, {len(solution.atoms)} heads", fontsize=9
    )
    jitter = np.random.default_rng(0).uniform(-0.35, 0.35, len(runs))
    right.scatter(jitter, runs, s=9, color=RUNS, lw=0)
    right.axhline(solution.certificate.primal, color=UPPER, lw=1.6)
    right.set_xticks([])
    right.set_title("100 Adam runs", fontsize=9)
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT)
    print(f"{solution.certificate}; gated {relaxed.primal:.5f}; runs {runs.min():.5f} to {runs.max():.5f}")


if __name__ == "__main__":
    main()
