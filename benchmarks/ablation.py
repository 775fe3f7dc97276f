"""What each ingredient of column generation is worth: the solver with one of them switched off at a time.

    python benchmarks/ablation.py --store STORE [--images FOLDER] [--every 4] [--variant NAME ...] [--max-time 120]
                                  [--runs 1] [--again]

STORE as for suite.py --cifar8k; --every 4, the default, takes a quarter of the images (20 a class), --every 1 all.
Self-attention linear, certified 1e-3, β/β_max = 0.02; β is given. The library has no switches for this: the script
replaces the piece in question for the time of a run, and says so where a solver has no such piece. Counted beside
seconds: evaluations of value and gradient, and passes of products with the gradient matrix, in the solver (float32 and
bfloat16) and in certificates (float64).
Rows: benchmarks/results/ablation.csv; on 2 cores 15 s a variant at --every 4, 1 to 2 minutes at --every 1.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from common import Row, Skip, Table, hardware, spread
from convexhead.drive import solve
from convexhead.program.atoms import Atoms
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.solvers import column_generation as cg
from convexhead.solvers.increments import Increments
from convexhead.solvers.whitening import Whitening
from instances import Instance, arrays, cifar8k_store

COUNTED = ("adjoint_times_values", "adjoint_times_mixing", "outputs", "pair_covariance")


class PlainCoordinates(Whitening):
    """The weights themselves."""

    def __init__(self, problem: Problem, atoms: Atoms, f: torch.Tensor, beta: float) -> None:
        pass

    def whiten(self, atoms: Atoms) -> Atoms:
        return atoms

    weights = pull = whiten


def settings(**values: Any) -> Callable[[], Any]:
    """Class attributes of the solver replaced."""
    return lambda: patch.multiple(cg.ColumnGeneration, **values)


def never(attribute: str) -> Callable[[], Any]:
    """An attribute of the solver that stays None."""

    def switched() -> Any:
        if attribute not in cg.ColumnGeneration._set_up.__code__.co_names:
            raise Skip(f"the solver has no {attribute}")
        none = property(lambda self: None, lambda self, value: None)
        return patch.object(cg.ColumnGeneration, attribute, none, create=True)

    return switched


def other_keys() -> Any:
    """Queries go through Gram matrices ``XᵀX`` made once where the library takes the tokens, or the other way round."""
    from convexhead.program.heads import SelfAttention

    def prepare(self: Any, X: torch.Tensor, *, reuse: bool) -> dict[str, torch.Tensor]:
        keys = {"X": X} if self.d < 2 * self.s else {"gram": X.mT @ X / self.s}
        return {"queries": self.pool_tokens(X), **keys}

    return patch.object(SelfAttention, "prepare_linear", prepare)


VARIANTS: dict[str, Callable[[], Any]] = {
    "as it is": contextlib.nullcontext,
    "no bfloat16 products, no increments": lambda: patch.object(Problem, "with_half_products", lambda self: None),
    "no whitening": lambda: patch.object(cg, "Whitening", PlainCoordinates),
    "no Newton steps": settings(near=0.0),
    "Newton steps from a gap of 1%": settings(near=0.01),
    "Newton steps from a gap of 100%": settings(near=1.0),
    "16 atoms a pricing": settings(batch=16),
    "64 atoms a pricing": settings(batch=64),
    "rounds of 7 L-BFGS steps": settings(steps=7),
    "rounds of 50 L-BFGS steps": settings(steps=50),
    "dual point at the iterate, not at an average": never("_average"),
    "no warm start of pricing": never("_warm"),
    "Gram matrices of the tokens, or not, the other way round": other_keys,
}


@contextlib.contextmanager
def without(variant: str) -> Iterator[None]:
    """The solver as the variant has it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(VARIANTS[variant]())
        except AttributeError as error:
            raise Skip(f"the solver has no such piece: {error}") from error
        yield


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """Calls of passes over the data, by pass and precision of its products."""
    counts: Counter = Counter()

    def counted(kind: type, name: str, operator_of: Callable[[Any], Operator]) -> Any:
        method = getattr(kind, name)

        def run(self: Any, *args: Any) -> Any:
            counts[name, str(operator_of(self).product_dtype).removeprefix("torch.")] += 1
            return method(self, *args)

        return patch.object(kind, name, run)

    with contextlib.ExitStack() as stack:
        for name in COUNTED:
            stack.enter_context(counted(Operator, name, lambda operator: operator))
        stack.enter_context(counted(Problem, "value_and_gradient", lambda problem: problem.operator))
        stack.enter_context(counted(Increments, "value_and_gradient", lambda passes: passes.rough.operator))
        yield counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--images")
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.02, help="β in units of β_max")
    parser.add_argument("--variant", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--max-time", type=float, default=120)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    X, y = arrays(cifar8k_store(args.store, args.images)["train"])
    X, y = X[:: args.every].contiguous(), y[:: args.every]
    name = f"CIFAR n={len(X)} s={X.shape[1]} d={X.shape[2]} c=100 self-attention linear ratio={args.ratio:g}"
    instance = Instance(name, X, y, args.ratio, 1e-3, small=False)
    machine = hardware() | {"dtype": "float32, certificate float64"}
    table = Table("ablation", ("instance", "variant", "max_time"), machine, again=args.again)

    def row(variant: str) -> Row:
        times = []
        for _ in range(args.runs):
            with without(variant), counting() as counts:
                began = time.perf_counter()
                problem = instance.problem()
                generator = torch.Generator().manual_seed(0)
                solution = solve(problem, instance.beta, tol=1e-3, max_time=args.max_time, generator=generator)
                times.append(time.perf_counter() - began)
        certificate = solution.certificate
        products = {d: sum(counts[p, d] for p in COUNTED[1:3]) for d in ("bfloat16", "float32", "float64")}
        return {
            **spread(times),
            "converged": certificate.converged,
            "objective": f"{certificate.primal:.9f}",
            "relative_gap_certified": f"{certificate.relative_gap:.2g}",
            "heads": len(solution.atoms),
            "evaluations_bfloat16": counts["value_and_gradient", "bfloat16"],
            "evaluations_float32": counts["value_and_gradient", "float32"],
            **{f"products_{dtype}": count for dtype, count in products.items()},
            "newton_hessians": counts["pair_covariance", "float32"] + counts["pair_covariance", "bfloat16"],
            "rows_of_history": len(solution.history),
        }

    _ = instance.beta  # found before the clock runs
    for variant in args.variant:
        table.run(lambda variant=variant: row(variant), instance=name, variant=variant, max_time=f"{args.max_time:g}")


if __name__ == "__main__":
    main()
