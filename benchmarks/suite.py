"""Objective and gap against time: every solver on every instance, one command, a CSV and a figure an instance.

    python benchmarks/suite.py [--instance NAME ...] [--solver NAME ...] [--cifar8k STORE [--images FOLDER]]
                               [--cifar50k STORE [--channels 128]] [--quick] [--again]

Instances: synthetic-200, digits, synthetic-1000 (all self-attention linear, float64), and where there is a token store
of them cifar2k, cifar8k (see `instances.cifar8k_store`: STORE is made of FOLDER where it is not there yet) and cifar50k
(the train split of any store, reduced to --channels principal components where it has more).
Solvers: convexhead, fista, scs, clarabel, adam, lbfgs. All are given β.

Rows go to benchmarks/results/suite.csv as they are made, curves to suite_curves.csv; what has a row is not run again
unless --again. Repeated runs: the median of up to 5 that fit --budget seconds. Expect, on 2 cores: the small instances
7 minutes (of which CVXPY's solvers take 5), cifar2k 5, cifar8k 8, cifar50k 12.

Columns: `relative_gap_certified` is what the solver itself proves; `excess_certified` is how far its objective is above
the best lower bound that any solver of the instance has proven, so at most that far from the optimum; `audited_gap` is
what `convexhead.certify` proves of a trained model by itself; `seconds_to_1pct` is when the objective came within 1% of
the best one known; `tuning_seconds` are those of all runs of that solver on the instance together, the search for a
tolerance included. tflop_equivalents = seconds · the float32 GEMM rate measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterable
from functools import partial

import cvxpy as cp
import numpy as np
import torch

from common import Row, Skip, Table, hardware, read_csv, spread, write_csv
from competitors import Run, adam, cvxpy, lbfgs, ours, restarted_fista
from curves import draw
from instances import Instance, registry

SOLVERS = ("convexhead", "fista", "scs", "clarabel", "adam", "lbfgs")
EPS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
"""Tolerances tried with CVXPY's solvers, loosest first: timed is the first that comes within the instance's."""
PATIENCE = 150.0
"""Seconds of such trials after which a solver is given up, and the limit of each trial of SCS."""
POINTS = 60
"""Of a curve, kept."""


class Suite:
    """The tables, and how rows get into them."""

    def __init__(self, *, again: bool, quick: bool, budget: float) -> None:
        machine = hardware("cvxpy", "scs", "clarabel", "scikit-learn")
        self.name = "suite_quick" if quick else "suite"
        self.table = Table(self.name, ("instance", "solver", "settings"), machine, again=again)
        self.curves = read_csv(f"{self.name}_curves")
        self.quick, self.budget = quick, budget

    def row(self, instance: Instance, solver: str, settings: str, run: Callable[[], Run], *, repeat: bool) -> None:
        """Run, and note the run; ``run`` may raise `Skip`."""
        self.table.run(
            lambda: self._measured(instance, run, repeat, solver, settings),
            instance=instance.name,
            solver=solver,
            settings=settings,
        )

    def _measured(self, instance: Instance, run: Callable[[], Run], repeat: bool, solver: str, settings: str) -> Row:
        result = run()
        times = [result.seconds]
        if repeat and not self.quick:
            if result.seconds < 2:
                times = []  # that one warmed up
            while len(times) < 5 and sum(times) + result.seconds < self.budget:
                result = run()
                times.append(result.seconds)
        self._keep_curve(instance, solver, settings, result)
        return self.described(instance, result, times)

    def described(self, instance: Instance, run: Run, times: list[float]) -> Row:
        """The columns of a run."""
        given = {
            "solver_seconds": run.solver_seconds and f"{run.solver_seconds:.4g}",
            "relative_gap_certified": run.gap is not None and f"{run.gap:.2g}",
            "dual": np.isfinite(run.dual) and f"{run.dual:.9f}",
            "note": run.note,
        }
        return {
            "beta": f"{instance.beta:.8g}",
            "beta_max_seconds": f"{instance.beta_seconds:.3g}",
            "dtype": "float64" if instance.small else "float32, certificate float64",
            **spread(times),
            "objective": f"{run.objective:.9f}",
            "heads": run.heads,
            **{name: value for name, value in given.items() if value},
        }

    def _keep_curve(self, instance: Instance, solver: str, settings: str, run: Run) -> None:
        key = {"instance": instance.name, "solver": solver, "settings": settings}
        self.curves = [row for row in self.curves if any(row[name] != value for name, value in key.items())]
        picked = sorted({round(i) for i in np.linspace(0, len(run.curve) - 1, min(POINTS, len(run.curve)))})
        for seconds, objective, gap in (run.curve[i] for i in picked):
            self.curves.append(
                {**key, "seconds": f"{seconds:.5g}", "objective": f"{objective:.9g}"}
                | ({} if gap is None else {"relative_gap": f"{gap:.3g}"})
            )
        write_csv(f"{self.name}_curves", self.curves)

    # -- solvers --------------------------------------------------------------------------------------------------
    def convexhead(self, instance: Instance) -> None:
        """Each tolerance is a run of its own, so every gap that is shown as proven was."""
        for tol in (1e-2, 1e-3, 1e-4, 1e-5):
            if tol >= instance.tol:
                self.row(
                    instance, "convexhead", f"tol={tol:g}", partial(ours, instance, tol), repeat=tol == instance.tol
                )

    def fista(self, instance: Instance) -> None:
        for adaptive in (False, True):
            step = "adaptive step" if adaptive else "constant step"
            self.row(instance, "fista", step, partial(restarted_fista, instance, adaptive=adaptive), repeat=True)

    def scs(self, instance: Instance) -> None:
        self._cvxpy(instance, "SCS", instance.scs)

    def clarabel(self, instance: Instance) -> None:
        self._cvxpy(instance, "CLARABEL", instance.clarabel)

    def _cvxpy(self, instance: Instance, solver: str, reason: str) -> None:
        """The loosest good tolerance; long runs are not repeated."""
        key = {"instance": instance.name, "solver": solver.lower(), "settings": "loosest good tolerance"}

        def measured() -> Row:
            if reason or not instance.small:
                raise Skip(reason or "not run: Z has more than 1e8 entries")
            if self.quick:
                raise Skip("left out by --quick (minutes)")
            spent, optimum = 0.0, self.best_objective(instance)
            for eps in EPS:
                try:
                    run = cvxpy(instance, solver, eps, PATIENCE)
                except cp.SolverError as error:
                    raise Skip(f"failed at eps={eps:g}: {error}") from error
                spent += run.seconds
                if run.objective - optimum <= instance.tol * optimum:
                    times = [run.seconds]
                    while len(times) < 5 and sum(times) + run.seconds < self.budget:
                        times.append(cvxpy(instance, solver, eps, PATIENCE).seconds)
                    self._keep_curve(instance, solver.lower(), key["settings"], run)
                    return {**self.described(instance, run, times), "tuning_seconds": f"{spent:.4g}"}
                if spent > PATIENCE:
                    break
            raise Skip(f"not within {instance.tol:g} of the optimum after {spent:.0f} s, down to eps={eps:g}")

        self.table.run(measured, **key)

    def adam(self, instance: Instance) -> None:
        """Small ones: a grid of heads, learning rates and seeds. CIFAR: ever longer runs until one is within 1%."""
        if instance.small:
            heads, rates, seeds, epochs = ((10, 40), (0.01, 0.03, 0.1), (0, 1, 2), 400)
            if self.quick:
                heads, rates, seeds, epochs = (10,), (0.1,), (0,), 50
            for m in heads:
                for lr in rates:
                    for seed in seeds:
                        self._adam(instance, heads=m, lr=lr, epochs=epochs, batch=None, seed=seed)
            return
        shortest = 160_000 / len(instance.X)  # epochs, so that runs are as long whatever the number of images
        rates, lengths = (3e-4, 1e-3, 3e-3), [max(1, round(shortest * factor)) for factor in (1, 2, 4)]
        if self.quick:
            rates, lengths = (1e-3,), [3]
        good: list[tuple[float, float, int]] = []
        for epochs in lengths:
            for lr in rates:
                row = self._adam(instance, heads=32, lr=lr, epochs=epochs, batch=256, seed=0)
                if float(row["objective"]) <= 1.01 * self.best_objective(instance):
                    good.append((float(row["seconds_median"]), lr, epochs))
            if good:
                break
        for seed in (1, 2) if good else ():
            _, lr, epochs = min(good)
            self._adam(instance, heads=32, lr=lr, epochs=epochs, batch=256, seed=seed)

    def _adam(self, instance: Instance, *, heads: int, lr: float, epochs: int, batch: int | None, seed: int) -> Row:
        settings = f"heads={heads} lr={lr:g} epochs={epochs} batch={batch or 'all'} seed={seed}"
        trained = partial(adam, instance, heads=heads, lr=lr, epochs=epochs, batch=batch, seed=seed)
        return self._factored(instance, "adam", settings, trained)

    def lbfgs(self, instance: Instance) -> None:
        grid = [(m, seed) for m in (10, 40) for seed in (0, 1, 2)] if instance.small else [(32, 0)]
        iterations = 500 if instance.small else 150
        if self.quick:
            grid, iterations = grid[:1], 20
        for m, seed in grid:
            settings = f"heads={m} iterations={iterations} seed={seed}"
            self._factored(
                instance, "lbfgs", settings, partial(lbfgs, instance, heads=m, seed=seed, iterations=iterations)
            )

    def _factored(self, instance: Instance, solver: str, settings: str, train: Callable[[], tuple]) -> Row:
        """A run on the factored head; with the audit of its model if that is any good."""
        key = {"instance": instance.name, "solver": solver, "settings": settings}

        def measured() -> Row:
            run, audit = train()
            self._keep_curve(instance, solver, settings, run)
            row = self.described(instance, run, [run.seconds])
            if run.objective > 1.05 * self.best_objective(instance):
                return row  # an audit is long, and would say little
            return {**row, "audited_gap": f"{audit().relative_gap:.2g}"}

        self.table.run(measured, **key)
        return next(self.table.where(**key))

    # -- what compares them ---------------------------------------------------------------------------------------
    def best_objective(self, instance: Instance) -> float:
        """The lowest of all rows; ours is run first where there is none."""
        rows = [row for row in self.table.where(instance=instance.name) if "objective" in row]
        if not any(row["solver"] == "convexhead" for row in rows):
            self.convexhead(instance)
            return self.best_objective(instance)
        return min(float(row["objective"]) for row in rows)

    def compare(self, instance: Instance) -> None:
        """Fill in the columns that need all rows of the instance."""
        rows = [row for row in self.table.where(instance=instance.name) if "objective" in row]
        dual = max((float(row["dual"]) for row in rows if "dual" in row), default=-np.inf)
        best = min((float(row["objective"]) for row in rows), default=np.inf)
        mine = [row for row in rows if row["solver"] == "convexhead" and row["settings"] == f"tol={instance.tol:g}"]
        for row in rows:
            if np.isfinite(dual):
                row["excess_certified"] = f"{float(row['objective']) / dual - 1:.3g}"
            if mine:
                row["ratio_to_ours"] = f"{float(row['seconds_median']) / float(mine[0]['seconds_median']):.3g}"
            near = [float(p["seconds"]) for p in self._curve(row) if float(p["objective"]) <= 1.01 * best]
            row["seconds_to_1pct"] = f"{min(near):.4g}" if near else "never"
        for solver in ("adam", "lbfgs"):
            grid = [row for row in rows if row["solver"] == solver]
            total = sum(float(row["seconds_median"]) for row in grid)
            for row in grid:
                row["tuning_seconds"] = f"{total:.4g}"
        write_csv(self.name, self.table.rows)

    def _curve(self, row: Row) -> Iterable[Row]:
        key = ("instance", "solver", "settings")
        return (point for point in self.curves if all(point[name] == row[name] for name in key))

    def summary(self, instance: Instance) -> None:
        """A few lines for people."""
        rows = [row for row in self.table.where(instance=instance.name) if "objective" in row]
        print(f"\n{instance.name}: beta={instance.beta:.6g}")
        for solver in SOLVERS:
            of_solver = [row for row in rows if row["solver"] == solver]
            if solver in ("adam", "lbfgs") and of_solver:
                seconds = statistics.median(float(row["seconds_median"]) for row in of_solver)
                found = sorted(float(row["excess_certified"]) for row in of_solver)
                several = f"{seconds:9.4g} s a run, {of_solver[0]['tuning_seconds']} s all {len(found)}"
                middle = statistics.median(found)
                print(f"  {solver:>10}  {several}; excess {found[0]:.2g}, median {middle:.2g}, worst {found[-1]:.2g}")
                continue
            for row in of_solver:
                print(f"  {solver:>10}  {float(row['seconds_median']):9.4g} s  {row['settings']}, excess "
                      f"{row.get('excess_certified', '?')}, proven {row.get('relative_gap_certified', '-')}, "
                      f"{row.get('ratio_to_ours', '?')} x ours")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instance", nargs="*", help="default: all there is data for, but cifar50k")
    parser.add_argument("--solver", nargs="*", choices=SOLVERS, default=SOLVERS)
    parser.add_argument("--cifar8k", metavar="STORE")
    parser.add_argument("--images", metavar="FOLDER", help="of which the store is made where it is not there")
    parser.add_argument("--cifar50k", metavar="STORE")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--work", metavar="FOLDER", help="where cifar50k's tokens are written, as growth.py has it")
    parser.add_argument(
        "--quick", action="store_true", help="one short run of each, nothing that takes minutes; files of its own"
    )
    parser.add_argument("--again", action="store_true", help="measure what has a row already")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds that repeated runs of a row may take")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    made = registry(args.cifar8k, args.cifar50k, args.images, args.channels, args.work)
    unknown = set(args.instance or ()) - set(made)
    if unknown:
        parser.error(
            f"no such instance, or no store given for it: {', '.join(sorted(unknown))}; there are {list(made)}"
        )
    suite = Suite(again=args.again, quick=args.quick, budget=args.budget)
    for name in args.instance or [name for name in made if name != "cifar50k"]:
        instance = made[name]()
        print(f"-- {instance.name}", flush=True)
        for solver in SOLVERS:
            if solver in args.solver:
                getattr(suite, solver)(instance)
        suite.compare(instance)
        suite.summary(instance)
        print(draw(instance.name, f"{suite.name}-{name}", suite.table.rows, suite.curves))


if __name__ == "__main__":
    main()
