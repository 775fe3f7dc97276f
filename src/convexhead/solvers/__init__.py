"""Solve a problem to a certified gap: the method is chosen by cost, the certificate computed apart from it.

`approach` only goes as far as the method's own estimate says, for searches that look at many models and keep one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from convexhead.certificate.certify import Certificate, certify_atoms
from convexhead.dual_norm.norm import NormOracle
from convexhead.errors import InputError
from convexhead.program.atoms import Atoms
from convexhead.program.identity import differences
from convexhead.program.intercept import solve_intercept
from convexhead.program.loss_check import check_loss
from convexhead.program.problem import Problem
from convexhead.runtime.checkpoint import Checkpoint, Snapshot
from convexhead.solvers.base import Monitor, Progress, Resumable, Solution, Stop
from convexhead.solvers.column_generation import ColumnGeneration
from convexhead.solvers.fista import Fista
from convexhead.solvers.group_lasso import GroupNewton, is_group_lasso
from convexhead.solvers.relu import ExactRounds, ReLUColumnGeneration, SearchedRounds
from convexhead.solvers.ridge import RidgeDescent

Method = Fista | ColumnGeneration | GroupNewton | RidgeDescent | ReLUColumnGeneration

DENSE_FEATURES = 5e6
"""Numbers that the dense features may take."""
FAILURE_PROBABILITY = 1e-6
"""Of a solve's lower bound, over the random starts of all its certificates together."""
MAX_ATTEMPTS = 20
"""Certificates asked for before a solve gives up; each asks the solver for half the gap of the one before."""
DENSE_ORDER = 128
"""Order of the matrices whose eigendecomposition a proximal step may need."""


def is_small(problem: Problem) -> bool:
    """Whether ``Z`` and the features are small enough for proximal steps on a dense ``Z``."""
    p, q = problem.head.mixing_size, problem.head.value_rows * problem.c
    features = problem.n * problem.head.r * problem.n_blocks * p * problem.head.value_rows
    return features <= DENSE_FEATURES and min(p, q) <= DENSE_ORDER and p * q * problem.n_blocks <= 1e6


def solve(
    problem: Problem,
    beta: float,
    *,
    tol: float,
    start: Atoms | None = None,
    known_dual: float = -float("inf"),
    max_heads: int | None = None,
    max_time: float | None = None,
    callback: Callable[[Progress], None] | None = None,
    generator: torch.Generator,
    checkpoint: Checkpoint | None = None,
) -> Solution:
    """Minimise the convex program of ``problem`` at weight ``beta`` until a certificate says ``relative_gap ≤ tol``.

    Parameters
    ----------
    start : Atoms or None
        Warm start; the zero model where None.
    known_dual : float
        A lower bound on the optimum known beforehand.
    max_heads : int or None
        Bound on the atoms of the model.
    max_time : float or None
        Seconds after which the best model so far is returned.
    callback : callable (Progress) or None
        Called with every new row of the history.
    generator : torch.Generator
        Random starts of pricing and of the bound on the spectral norm.
    checkpoint : Checkpoint or None
        Where the state of the solve is written now and then; what it holds already is gone on from.

    Returns
    -------
    Solution
        The last model with its certificate, whatever ended the run: the gap, the clock, the bound on heads or Ctrl-C.
    """
    check_loss(problem.loss, problem.Y)
    identity = problem.identity  # of the problem in all precisions
    monitor = Monitor(max_time, callback, problem.ranks)
    monitor.dual = known_dual
    method: Method | None = None
    stage, stop = Stage(0.8 * tol, known_dual), Stop.STALLED
    negligible = 1e-3 * min(tol, 1e-2)
    model, certificate = start or _zero_model(problem), None
    saved = None if checkpoint is None else checkpoint.load()
    if saved is not None:
        stage = Stage(**saved.about["stage"])
        monitor.before, monitor.dual = saved.about["seconds"], saved.about["dual"]
        monitor.history = [Progress(**row) for row in saved.about["history"]]
        before = saved.about.get("problem")
        if before is None:  # written before bounds were tied to problems: its weights are a start, its bound is nothing
            stage.dual = monitor.dual = known_dual
        elif before != {"beta": beta, **identity}:
            told = differences(before, identity) or [f"another beta: {before['beta']!r} instead of {beta!r}"]
            raise InputError(
                f"the checkpoint is of another problem ({'; '.join(told)}): choose another folder, or delete that one "
                "to begin anew"
            )

    def snapshot(state: Resumable) -> Snapshot:
        shared, rows = state()
        about = {
            "stage": asdict(stage),
            "seconds": monitor.seconds(),
            "dual": monitor.dual,
            "history": [row.to_dict() for row in monitor.history],
            "problem": {"beta": beta, **identity},
        }
        return Snapshot(problem.n, about, {**shared, "generator": generator.get_state()}, rows)

    if checkpoint is not None:
        monitor.save = lambda state: checkpoint.offer(lambda: snapshot(state))

    def certify(dual_point: Tensor | None = None) -> Certificate:
        stage.share /= 2
        return certify_atoms(
            problem,
            model,
            beta,
            tol=tol,
            known_dual=stage.dual,
            known_failure=stage.failure,
            dual_point=dual_point,
            failure_probability=stage.share,
            generator=generator,
            oracle=method.oracle if isinstance(method, ReLUColumnGeneration) else None,
            found=method.learn if isinstance(method, ColumnGeneration) else None,
        )

    with monitor.interruptible():
        try:
            method = _method(problem, beta, model.to(problem.device, problem.dtype), monitor, max_heads, generator)
            if stage.double:
                problem, method = _in_double(problem, method, model, generator)
            if saved is not None and not isinstance(method, ReLUColumnGeneration):
                generator.set_state(saved.shared.pop("generator"))
                method.restore(
                    *({name: t.to(problem.device) for name, t in part.items()} for part in (saved.shared, saved.rows))
                )
            while stage.attempt < MAX_ATTEMPTS:
                stop = method.advance(stage.target)
                stage.attempt += 1
                if checkpoint is not None and stop is Stop.TIME:
                    checkpoint.flush()
                reached, dual_point = method.atoms(), method.dual_point()
                model = _finish(problem, reached, negligible, max_heads)
                if dual_point is None and len(model) < len(reached):
                    dual_point = problem.outputs(reached)  # what is negligible in the model need not be in its gradient
                certificate = certify(dual_point)
                stage.dual = monitor.dual = certificate.dual  # proven, where the solver's own was an estimate
                stage.failure = certificate.failure_probability
                if certificate.converged or stop in (Stop.TIME, Stop.HEADS):
                    break
                if certificate.scope == "estimated" and stop is Stop.CONVERGED:
                    stop = Stop.SEARCHED  # all that can be had
                    break
                # Rounding can also hide from the solver that there is a gap at all.
                deceived = problem.dtype != torch.float64 and certificate.relative_gap > 0.9 * stage.gap
                stage.gap = certificate.relative_gap
                if stop is Stop.STALLED or deceived:
                    if problem.dtype == torch.float64:
                        break
                    problem, method = _in_double(problem, method, model, generator)
                    stage.double = True
                else:  # what was believed to be small enough was not: the same point must not be certified again
                    last = monitor.history[-1]
                    believed = last.gap / abs(last.objective) if last.objective else 0.0
                    stage.target = min(stage.target, max(believed, 0.01 * tol)) / 2
            if monitor.interrupted:
                stop = Stop.INTERRUPTED
        except KeyboardInterrupt:
            stop, certificate, monitor.interrupted = Stop.INTERRUPTED, None, True
            if checkpoint is not None:
                checkpoint.flush()
            if method is not None:
                model = _finish(problem, method.atoms(), negligible, max_heads)
        certificate = certificate or certify()
    if certificate.converged:
        stop = Stop.CONVERGED
    elif stop is Stop.CONVERGED:
        stop = Stop.STALLED  # by the method's own estimate only
    return Solution(model, certificate, monitor.history, stop, monitor.interrupted)


def approach(
    problem: Problem,
    beta: float,
    *,
    tol: float,
    start: Atoms | None = None,
    max_heads: int | None = None,
    max_time: float | None = None,
    callback: Callable[[Progress], None] | None = None,
    generator: torch.Generator,
) -> tuple[Atoms, list[Progress]]:
    """A model whose relative gap is about ``tol`` by the solver's own estimate, and the history: nothing is proven.

    Parameters are those of `solve`; Ctrl-C is not caught, since there is no certificate to return a model with.
    """
    monitor = Monitor(max_time, callback, problem.ranks)
    with monitor.interruptible():
        model = (start or _zero_model(problem)).to(problem.device, problem.dtype)
        method = _method(problem, beta, model, monitor, max_heads, generator)
        method.advance(tol)
    if monitor.interrupted:
        raise KeyboardInterrupt
    # As far from the optimum as this, atoms that carry as little say nothing about its rank.
    model = _finish(problem, method.atoms(), tol / 2, max_heads).to(problem.device, problem.dtype)
    objective = problem.data_term(problem.outputs(model)) + beta * problem.penalty(model)
    monitor.record(objective, -math.inf, len(model))
    return model, monitor.history


@dataclass
class Stage:
    """Where a solve stands, its method apart: goes into checkpoints."""

    target: float
    """Relative gap asked of the method."""
    dual: float
    """Best certified lower bound."""
    failure: float = 0.0
    """Of all certificates so far, whose best bound is kept: their shares add up to less than the whole."""
    share: float = FAILURE_PROBABILITY
    gap: float = math.inf
    """Relative gap of the last certificate."""
    attempt: int = 0
    double: bool = False
    """Whether single precision has given what it can."""


def _zero_model(problem: Problem) -> Atoms:
    """No atoms, and the intercept that is best without any."""
    model = problem.empty()
    if problem.fit_intercept:
        exact = problem.astype(torch.float64)
        f = torch.zeros(len(problem.Y), problem.head.r, problem.c, dtype=torch.float64, device=problem.device)
        model.intercept = solve_intercept(exact, f).to(problem.dtype)
    return model


def _finish(problem: Problem, atoms: Atoms, negligible: float, max_heads: int | None) -> Atoms:
    """The model that is certified and kept: float64, balanced, no negligible atoms, its intercept solved for.

    Atoms are negligible that together carry the share ``negligible`` of the nuclear norm.
    """
    atoms = atoms.to(problem.device, torch.float64)
    if problem.head.learns_mixing:
        atoms, singular_values = problem.balance(atoms)
        atoms.V = problem.mask_values(atoms.V, atoms.block)  # balancing leaves rounding there
        if len(atoms):
            sigma = torch.cat(singular_values)
            order = sigma.argsort()
            dropped = torch.cumsum(sigma[order], 0) <= negligible * sigma.sum()
            if max_heads is not None:
                dropped[: max(0, len(sigma) - max_heads)] = True
            keep = torch.ones_like(dropped)
            keep[order[dropped]] = False
            # Where tokens are far from 0 a small ReLU atom may move outputs far.
            if max_heads is None and not problem.activation.convex and not bool(keep.all()):
                exact = problem.astype(torch.float64)
                before, after = (exact.data_term(exact.outputs(part)) for part in (atoms, atoms.select(keep)))
                keep |= after > before + negligible * abs(before)
            atoms = atoms.select(keep)
    if problem.fit_intercept:
        exact = problem.astype(torch.float64)
        f = exact.outputs(atoms) - atoms.intercept
        atoms.intercept = solve_intercept(exact, f)
    return atoms


def _in_double(problem: Problem, method: Method, model: Atoms, generator: torch.Generator) -> tuple[Problem, Method]:
    """The same problem in float64, and a method that goes on there."""
    if isinstance(method, ColumnGeneration):
        return method.refine(), method
    problem = problem.astype(torch.float64, reuse=True)
    start = model.to(problem.device, problem.dtype)
    return problem, _method(problem, method.beta, start, method.monitor, None, generator)


def _method(
    problem: Problem,
    beta: float,
    start: Atoms,
    monitor: Monitor,
    max_heads: int | None,
    generator: torch.Generator,
) -> Method:
    if not problem.head.learns_mixing:
        return RidgeDescent(problem, beta, start, monitor)
    if not problem.activation.convex:
        oracle = NormOracle(problem)
        rounds = ExactRounds if oracle.tight else SearchedRounds
        return rounds(problem, oracle, beta, start, monitor, max_heads=max_heads, generator=generator)
    if is_small(problem) and problem.dtype == torch.float64 and max_heads is None:
        return Fista(problem, beta, start, monitor)
    if is_group_lasso(problem):
        return GroupNewton(problem, beta, start, monitor, max_heads=max_heads)
    return ColumnGeneration(problem, beta, start, monitor, max_heads=max_heads, generator=generator)
