"""All solvers by name, and which one a problem gets.

    ridge               the linear head
    fista               a dense ``Z``: small problems
    group-newton        one output and one value row a head: a group lasso
    kernel              more features than samples, one vector a sample: an attentive head with many queries
    column-generation   every other convex program
    relu-exact          a ReLU whose dual norm can be bounded tightly
    relu-search         every other ReLU

With ``"auto"`` the choice is by cost.
"""

from __future__ import annotations

import torch

from convexhead.dual_norm.norm import NormOracle
from convexhead.errors import InputError, choose
from convexhead.program.atoms import Atoms
from convexhead.program.problem import Problem
from convexhead.solvers.base import Solver
from convexhead.solvers.column_generation import ColumnGeneration
from convexhead.solvers.fista import Fista, number_of_features
from convexhead.solvers.group_lasso import GroupNewton, is_group_lasso
from convexhead.solvers.kernel import KernelColumnGeneration
from convexhead.solvers.monitor import Monitor
from convexhead.solvers.relu import ExactRounds, SearchedRounds
from convexhead.solvers.ridge import RidgeNewton

SOLVERS: dict[str, type[Solver]] = {
    solver.name: solver
    for solver in (
        RidgeNewton,
        Fista,
        GroupNewton,
        KernelColumnGeneration,
        ColumnGeneration,
        ExactRounds,
        SearchedRounds,
    )
}
AUTO = "auto"
NAMES = (AUTO, *SOLVERS)
"""What ``solver`` may be."""
DENSE_FEATURES = 5e6
"""Numbers that features may take for proximal steps on a dense ``Z`` to be the fastest (`benchmarks/suite.py`)."""
DENSE_ENTRIES = 1e6
"""Entries that ``Z`` may have there."""
DENSE_ORDER = 128
"""Order of the matrices whose eigendecomposition a proximal step may need there."""
LARGEST_COLUMN = 256
"""Entries of a column up to which Newton's method pays: Hessians of single blocks are formed."""


def check_name(name: object) -> str:
    """Return ``name`` if it is a solver's, or ``"auto"``.

    Raises
    ------
    InputError
        It is not; the message lists all names.
    """
    return choose("solver", name, NAMES)


def make_solver(
    name: str,
    problem: Problem,
    beta: float,
    start: Atoms,
    monitor: Monitor,
    *,
    max_heads: int | None,
    generator: torch.Generator,
    oracle: NormOracle | None = None,
    checked: bool = False,
) -> tuple[Problem, Solver]:
    """Return the solver of this ``name``, and the problem in the precision that it needs.

    ``oracle``: of a ReLU, where one is at hand.
    ``checked``: the solver has solved this problem for a while, in a run that is resumed.

    Raises
    ------
    InputError
        This solver cannot solve this problem; the message says which ones can.
    """
    is_relu = problem.head.learns_mixing and not problem.activation.convex
    oracle = (oracle or NormOracle(problem, late=monitor.out_of_time)).on(problem) if is_relu else None
    kind = _cheapest(problem, oracle, max_heads) if name == AUTO else SOLVERS[check_name(name)]
    reason = None if checked or name == AUTO else _refusal(kind, problem, oracle, max_heads)
    if reason is not None:
        able = [other.name for other in SOLVERS.values() if _refusal(other, problem, oracle, max_heads) is None]
        others = " or ".join(f"solver={other!r}" for other in [AUTO, *able])
        raise InputError(f"solver={name!r} {reason}: choose {others}")
    if not kind.in_single:
        problem = problem.astype(torch.float64, reuse=True)
    start = start.to(problem.device, problem.dtype)
    return problem, kind(problem, beta, start, monitor, max_heads=max_heads, generator=generator, oracle=oracle)


def _cheapest(problem: Problem, oracle: NormOracle | None, max_heads: int | None) -> type[Solver]:
    if not problem.head.learns_mixing:
        return RidgeNewton
    if oracle is not None:
        return ExactRounds if oracle.tight else SearchedRounds
    if is_small(problem) and problem.dtype == torch.float64 and max_heads is None:
        return Fista
    if is_group_lasso(problem) and problem.head.mixing_size <= LARGEST_COLUMN:
        return GroupNewton
    if (
        max_heads is None
        and KernelColumnGeneration.pays(problem)
        and KernelColumnGeneration.lacks(problem, oracle) is None
    ):
        return KernelColumnGeneration
    return ColumnGeneration


def is_small(problem: Problem) -> bool:
    """Whether ``Z`` and the features are small enough for proximal steps on a dense ``Z``."""
    p, q = problem.head.mixing_size, problem.head.value_rows * problem.c
    small = number_of_features(problem) <= DENSE_FEATURES and p * q * problem.n_blocks <= DENSE_ENTRIES
    return small and min(p, q) <= DENSE_ORDER


def _refusal(kind: type[Solver], problem: Problem, oracle: NormOracle | None, max_heads: int | None) -> str | None:
    """Why a solver cannot solve this, as the end of a sentence; None where it can."""
    lacks = kind.lacks(problem, oracle)
    if lacks is not None:
        return f"needs {lacks}"
    return "cannot keep max_heads" if max_heads is not None and not kind.bounds_heads else None
