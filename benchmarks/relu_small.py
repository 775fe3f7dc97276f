"""Small ReLU heads: the certified interval against CVXPY and against the best of many restarts.

    python benchmarks/relu_small.py scalar      100 problems with one output; all patterns; 50 restarts each
    python benchmarks/relu_small.py vector      100 problems with 2 to 4 outputs, 4 heads; 100 restarts each
    python benchmarks/relu_small.py starts      from nothing, or from a gated solution through its cone decomposition

Writes benchmarks/results/relu_scalar.csv, relu_vector.csv or relu_starts.csv, and prints what they add up to. Seconds,
those that a run is given too, are of processor time on one thread: other programs run on the machine.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from common import cpu_name, versions, write_csv
from convexhead.drive import solve
from convexhead.dual_norm import cone_decomposition
from convexhead.dual_norm.norm import NormOracle
from convexhead.fitting import beta_max_of
from convexhead.program.activations import GatedReLU, ReLU
from convexhead.program.heads import make_head
from convexhead.program.losses import CrossEntropy, Squared
from convexhead.program.operator import Operator
from convexhead.program.patterns import all_gates, sample_patterns
from convexhead.program.problem import Problem
from convexhead.runtime.clock import count_processor_time, now
from relu_restarts import restarts

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle

SCALAR = [("mlp", 1, 2), ("mlp", 2, 2), ("mlp", 1, 3), ("fno", 2, 1), ("fno", 2, 2)]
"""Head, tokens, channels."""
VECTOR = [("mlp", 2, 2), ("mlp", 3, 3), ("fno", 2, 2), ("mlp-mixer", 3, 2), ("self-attention", 2, 2)]


def random_problem(head: str, s: int, d: int, c: int, seed: int) -> Problem:
    """Normal tokens and targets; with several outputs, class labels every other time."""
    generator = torch.Generator().manual_seed(seed)
    n = 6 + seed % 5
    X = torch.randn(n, s, d, generator=generator, dtype=torch.float64)
    mixer = make_head(head, s, d, pool="mean" if seed % 3 else "cls")
    if c > 1 and seed % 2:
        Y = torch.nn.functional.one_hot(torch.arange(n) % c, c).double().unsqueeze(1)
        return Problem(Operator(X, mixer, ReLU(mixer)), Y, CrossEntropy())
    Y = torch.randn(n, 1, c, generator=generator, dtype=torch.float64)
    return Problem(Operator(X, mixer, ReLU(mixer)), Y, Squared())


def weight(problem: Problem, seed: int) -> float:
    """``β`` as a share of ``β_max`` that changes from problem to problem."""
    R = problem.residual(problem.outputs(problem.empty()))
    norm = NormOracle(problem)
    peaks = norm.search(R, generator=torch.Generator().manual_seed(seed))
    return (0.3, 0.1, 0.05, 0.02)[seed // 5 % 4] * norm.bound(R, peaks).upper


def run(part: str, index: int) -> dict[str, object]:
    """One problem: our interval, the restarts, and CVXPY's optimum where there is one output."""
    cases = SCALAR if part == "scalar" else VECTOR
    head, s, d = cases[index % len(cases)]
    c = 1 if part == "scalar" else 2 + index % 3
    problem = random_problem(head, s, d, c, index)
    beta = weight(problem, index)
    tol = 1e-6 if part == "scalar" else 1e-3
    began = now()
    solution = solve(problem, beta, tol=tol, max_time=60, generator=torch.Generator().manual_seed(index))
    seconds = now() - began
    certificate = solution.certificate
    began = now()
    reached = restarts(problem, beta, n_restarts=50 if c == 1 else 100, n_heads=8, steps=600, seed=index)
    row: dict[str, object] = {
        "problem": index, "head": head, "n": problem.n, "tokens": s, "channels": d, "outputs": c,
        "pool": problem.head.pool, "loss": problem.loss.name, "beta": beta,
        "objective": certificate.primal, "lower_bound": certificate.dual,
        "relative_gap": certificate.relative_gap, "bound": certificate.bound, "scope": certificate.scope,
        "converged": certificate.converged, "heads": len(solution.atoms), "seconds": round(seconds, 2),
        "best_restart": float(reached[0]), "median_restart": float(reached.median()), "restarts": len(reached),
        "restart_seconds": round(now() - began, 2),
    }  # fmt: skip
    if part == "scalar":
        gates = all_gates(problem.head, problem.operator.X).numpy()
        row["patterns"] = len(gates)
        row["cvxpy"] = oracle.relu_optimum(
            head, problem.operator.X.numpy(), problem.Y[:, 0, 0].numpy(), gates,
            pool=problem.head.pool, grid=problem.head.grid, beta=beta,
        )  # fmt: skip
    return row


def digits_problem(head: str, n: int = 300) -> Problem:
    """Digits as 16 tokens of 2×2 pixels, ten classes."""
    images, labels = load_digits(return_X_y=True)
    X = images[:n].reshape(n, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(n, 16, 4) / 16
    Y = torch.nn.functional.one_hot(torch.from_numpy(labels[:n]), 10).double().unsqueeze(1)
    mixer = make_head(head, 16, 4)
    return Problem(Operator(torch.from_numpy(X), mixer, ReLU(mixer)), Y, CrossEntropy())


def compare_starts(name: str, problem: Problem, beta: float, max_time: float, seed: int) -> list[dict[str, object]]:
    """The same problem from nothing and from eight gates; solving for these counts as time, at most half of it."""
    rows: list[dict[str, object]] = []
    for start in ("nothing", "decomposition"):
        generator = torch.Generator().manual_seed(seed)
        began = now()
        atoms, growth = None, math.nan
        if start == "decomposition":
            gates = sample_patterns(problem.head, problem.operator.X, 8, generator)
            gated = Problem(
                Operator(problem.operator.X, problem.head, GatedReLU(problem.head, gates)), problem.Y, problem.loss
            )
            solved = solve(gated, beta, tol=1e-2, max_time=max_time / 2, generator=generator)
            split = cone_decomposition(gated, solved.atoms)
            atoms, growth = split.atoms, split.norm_growth
        left = max(max_time - (now() - began), 1e-3)
        solution = solve(problem, beta, tol=1e-3, start=atoms, max_time=left, generator=generator)
        certificate = solution.certificate
        rows.append({
            "problem": name, "head": problem.head.name, "n": problem.n, "outputs": problem.c, "beta": beta,
            "start": start, "objective": certificate.primal, "scope": certificate.scope,
            "relative_gap": certificate.relative_gap, "estimated_gap": certificate.estimated_gap,
            "heads": len(solution.atoms), "norm_growth": growth,
            "seconds": round(now() - began, 2),
        })  # fmt: skip
    return rows


def study_starts(where: dict[str, object]) -> None:
    """Ten random problems with several outputs, and each head on the digits."""
    cases = [(f"random {i}", *VECTOR[i % 5], i) for i in range(20, 30)]
    rows: list[dict[str, object]] = []
    for name, head, s, d, i in cases:
        problem = random_problem(head, s, d, 2 + i % 3, i)
        rows += compare_starts(name, problem, weight(problem, i), 60, i)
        write_csv("relu_starts", [row | where for row in rows])
    for head in ("mlp", "self-attention", "mlp-mixer", "fno", "block-fno"):
        problem = digits_problem(head)
        rows += compare_starts("digits", problem, 0.05 * beta_max_of(problem, torch.Generator()), 10, 0)
        write_csv("relu_starts", [row | where for row in rows])
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    for a, b in pairs:
        shown = [f"{row['objective']:.6g} in {row['seconds']} s" for row in (a, b)]
        print(a["problem"], a["head"], "; ".join(shown), f"norm growth {b['norm_growth']:.3g}")
    spent = [sum(float(row["seconds"]) for row in part) for part in zip(*pairs[: len(cases)], strict=True)]
    print(f"random problems, processor seconds: {spent[0]:.3g} from nothing, {spent[1]:.3g} from a decomposition")
    print(f"digits: lower from nothing in {sum(a['objective'] < b['objective'] for a, b in pairs[len(cases) :])} of 5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("scalar", "vector", "starts"))
    parser.add_argument("--problems", type=int, default=100)
    args = parser.parse_args()
    count_processor_time()
    where = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "versions": versions("torch", "numpy", "cvxpy")}
    if args.part == "starts":
        return study_starts(where)
    rows = []
    for index in range(args.problems):
        rows.append(run(args.part, index))
        write_csv(f"relu_{args.part}", [row | where for row in rows])
        print({key: rows[-1][key] for key in ("problem", "head", "relative_gap", "seconds")}, flush=True)

    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows], dtype=float)

    ours, lower = column("objective"), column("lower_bound")
    best, median = column("best_restart"), column("median_restart")
    gap = (ours - lower) / ours
    print(f"lower bound above the best value found: {int((lower > np.minimum(ours, best)).sum())} of {len(rows)}")
    print(f"interval: median {np.median(gap):.2g}, 90% at most {np.quantile(gap, 0.9):.2g}, largest {gap.max():.2g}")
    print(f"a restart below our objective by more than 1e-6: {int((best < ours - 1e-6).sum())}")
    print(f"a restart that meets it to 1e-5 relative: {int((best <= ours * (1 + 1e-5)).sum())}")
    print(f"ours at least as good as the median restart: {int((ours <= median * (1 + 1e-9)).sum())}")
    print(f"best restart within our interval: {int(((best >= lower) & (best <= ours * (1 + 1e-12))).sum())}")
    if args.part == "scalar":
        print(f"largest difference from CVXPY, relative: {np.abs(ours / column('cvxpy') - 1).max():.2g}")


if __name__ == "__main__":
    main()
