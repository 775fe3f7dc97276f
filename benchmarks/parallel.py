"""Two processes with half of the samples each against one with all of them: efficiency, and bytes that travel.

    python benchmarks/parallel.py [--samples 8000] [--runs 5] [--processes 2]

Self-attention linear on tokens 49 x 128 with 100 classes, one thread a process. Efficiency is T_1 / (K T_K): of one
evaluation of value and gradient at 32 heads, and of a solve to a certified 1% (same seed, so the same iterates up to
rounding; the certificate counts). One process and K alternate; medians over the runs. ``apart`` is the efficiency of
an evaluation in K runs at once that know nothing of each other: what the machine's cores and memory allow. Bytes are
what each process hands to an all-reduce, counted by `Ranks`. Appends a row to benchmarks/results/parallel.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from common import hardware, read_csv, write_csv
from convexhead.drive import solve
from convexhead.fitting import beta_max_of
from convexhead.program.activations import make_activation
from convexhead.program.atoms import Atoms
from convexhead.program.heads import make_head
from convexhead.program.losses import CrossEntropy
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.runtime.ranks import Ranks, join_ranks

TOKENS, CHANNELS, CLASSES, HEADS, EVALUATIONS, TOL = 49, 128, 100, 32, 5, 1e-2


def build(n: int, ranks: Ranks) -> Problem:
    """This process's share of a problem that is the same for every number of processes."""
    means = torch.randn(CLASSES, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    rows = range(n)[ranks.share(n)]
    y = torch.tensor(rows) % CLASSES
    noise = [torch.randn(TOKENS, CHANNELS, generator=torch.Generator().manual_seed(1 + i)) for i in rows]
    X = 0.2 * means[y] + torch.stack(noise)
    head = make_head("self-attention", TOKENS, CHANNELS)
    Y = (y.unsqueeze(1) == torch.arange(CLASSES)).unsqueeze(1)
    return Problem(
        Operator(X, head, make_activation("linear", head, None), dtype=torch.float32, ranks=ranks), Y, CrossEntropy()
    )


class Count:
    """Calls of a pass of `Problem` or `Operator`, and the bytes that they sum over the processes."""

    def __init__(self, ranks: Ranks, of: type, *names: str) -> None:
        self.calls = self.bytes = 0
        for name in names:
            setattr(of, name, self._counted(ranks, getattr(of, name)))

    def _counted(self, ranks: Ranks, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            before = ranks.bytes
            result = method(*args)
            self.calls, self.bytes = self.calls + 1, self.bytes + ranks.bytes - before
            return result

        return counted


def child(n: int, out: str) -> None:
    """One process of one run; the first writes what was measured."""
    torch.set_num_threads(1)
    ranks = join_ranks()
    problem = build(n, ranks)
    generator = torch.Generator().manual_seed(0)
    atoms = problem.empty()
    atoms = Atoms(
        0.01 * torch.randn(HEADS, CHANNELS, CHANNELS, generator=generator),
        0.01 * torch.randn(HEADS, CHANNELS, CLASSES, generator=generator),
        torch.zeros(HEADS, dtype=torch.int64),
        atoms.intercept,
    )
    problem.value_and_gradient(atoms, 0.1)
    before = ranks.bytes
    seconds = []
    for _ in range(EVALUATIONS):
        ranks.wait()
        began = time.perf_counter()
        problem.value_and_gradient(atoms, 0.1)
        seconds.append(time.perf_counter() - began)
    sent = ranks.bytes - before - 8 * EVALUATIONS  # without the waits
    beta = 0.5 * beta_max_of(problem, generator)
    ranks.wait()
    evaluations = Count(ranks, Problem, "value_and_gradient")
    products = Count(ranks, Operator, "adjoint_times_values", "adjoint_times_mixing")
    before, sums, began = ranks.bytes, ranks.sums, time.perf_counter()
    solution = solve(problem, beta, tol=TOL, generator=generator)
    if ranks.rank == 0:
        result = {
            "evaluation": statistics.median(seconds),
            "bytes_an_evaluation": sent // EVALUATIONS,
            "solve": time.perf_counter() - began,
            "bytes_a_solve": ranks.bytes - before,
            "sums_a_solve": ranks.sums - sums,
            "evaluations": evaluations.calls,
            "bytes_of_evaluations": evaluations.bytes,
            "products": products.calls,
            "bytes_of_products": products.bytes,
            "objective": solution.certificate.primal,
            "relative_gap_certified": solution.certificate.relative_gap,
            "heads": len(solution.atoms),
        }
        Path(out).write_text(json.dumps(result))


def run(processes: int, n: int) -> dict[str, float]:
    """One run of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, __file__, "--child", out, "--samples", str(n)], env=environment, check=True)
        return json.loads(Path(out).read_text())


def run_apart(processes: int, n: int) -> float:
    """Seconds of an evaluation where so many runs of one process each go on at once, with their part of the samples."""
    with ThreadPoolExecutor(processes) as pool:
        results = list(pool.map(run, [1] * processes, [n // processes] * processes))
    return max(result["evaluation"] for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        child(args.samples, args.child)
        return
    one, several, apart = [], [], []
    for _ in range(args.runs):
        one.append(run(1, args.samples))
        several.append(run(args.processes, args.samples))
        apart.append(run_apart(args.processes, args.samples))
        print(one[-1], several[-1], apart[-1], sep="\n", flush=True)
    row: dict[str, object] = {"samples": args.samples, "processes": args.processes, "runs": args.runs}
    for what in ("evaluation", "solve"):
        alone, together = (statistics.median(result[what] for result in results) for results in (one, several))
        row[f"{what}_seconds_one"], row[f"{what}_seconds_several"] = round(alone, 4), round(together, 4)
        row[f"{what}_efficiency"] = round(alone / together / args.processes, 3)
    alone, beside = row["evaluation_seconds_one"], statistics.median(apart)
    row["evaluation_efficiency_apart"] = round(float(alone) / beside / args.processes, 3)
    last = several[-1]
    row |= {name: value for name, value in last.items() if name not in ("evaluation", "solve", "objective")}
    row["relative_objective_difference"] = abs(last["objective"] / one[-1]["objective"] - 1)
    row |= hardware()
    write_csv("parallel", [*read_csv("parallel"), row])
    print(row)


if __name__ == "__main__":
    main()
