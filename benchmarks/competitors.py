"""Solvers of one `Instance`, each as its user would call it, with the objective along the way.

Every function starts from tokens, labels and β, and returns a `Run`. Its objective is recomputed afterwards by one
formula for all, from what was returned: the convex program's value in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import cvxpy as cp
import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from common import Skip
from convexhead.baselines.adam import make_network, train_adam
from convexhead.baselines.passes import objectives
from convexhead.certificate.certify import Certificate, certify_atoms
from convexhead.drive import solve
from convexhead.program.atoms import Atoms
from convexhead.program.problem import Problem
from convexhead.solvers import Progress
from fista_baseline import attention_features, cross_entropy, fista
from instances import Instance

Point = tuple[float, float, float | None]
"""Seconds since the start, objective, and the relative gap that the solver knows then, if it knows one."""
Audit = Callable[[], Certificate]
"""Makes the certificate of a trained model, which takes as long as a solver's own."""


@dataclass
class Run:
    """What a solver returned.

    Attributes
    ----------
    seconds : float
        From tokens to the result.
    objective : float
        Of the convex program at the result.
    heads : int
        Atoms, after an SVD where ``Z`` is dense.
    gap : float or None
        Relative, that the solver itself can prove at the end.
    dual : float
        A proven lower bound on the optimum; ``-inf`` without one.
    curve : list of Point
    note : str
    solver_seconds : float or None
        Without modelling, where the two can be told apart.
    """

    seconds: float
    objective: float
    heads: int
    gap: float | None = None
    dual: float = -float("inf")
    curve: list[Point] = field(default_factory=list)
    note: str = ""
    solver_seconds: float | None = None


# -- ours -----------------------------------------------------------------------------------------
def ours(instance: Instance, tol: float) -> Run:
    """`convexhead.solvers.solve`; its certificate is part of the time.

    The gaps on the way are the solver's estimates, the one at the end is proven.
    """
    curve: list[Point] = []
    beta = instance.beta
    began = time.perf_counter()
    problem = instance.problem()
    prepared = time.perf_counter() - began

    def note(row: Progress) -> None:
        curve.append((prepared + row.seconds, row.objective, row.gap / abs(row.objective)))

    solution = solve(problem, beta, tol=tol, callback=note, generator=torch.Generator().manual_seed(0))
    seconds = time.perf_counter() - began
    certificate = solution.certificate
    curve.append((seconds, certificate.primal, certificate.relative_gap))
    return Run(
        seconds,
        certificate.primal,
        len(solution.atoms),
        certificate.relative_gap,
        certificate.dual,
        curve,
        note="" if certificate.converged else f"not converged: {solution.stop.value}",
    )


# -- dense convex solvers -------------------------------------------------------------------------
def restarted_fista(instance: Instance, *, adaptive: bool) -> Run:
    """`fista_baseline`, its features included."""
    if not instance.small:
        n, _, d = instance.X.shape
        c = instance.Y.shape[1]
        raise Skip(f"not run: dense features of {n} x {d**3:.1e} and an SVD of {d * d} x {d * c} in every step")
    beta, curve = instance.beta, []
    began = time.perf_counter()
    features, Y = attention_features(instance.X), instance.Y

    def note(objective: float, gap: float) -> None:
        curve.append((time.perf_counter() - began, objective, gap))

    p = instance.X.shape[2] ** 2
    result = fista(features, Y, p, beta, instance.tol, adaptive=adaptive, callback=note)
    seconds = time.perf_counter() - began
    value = dense_objective(instance, result.Z)
    dual = result.objective * (1 - result.relative_gap)
    note_ = f"{result.iterations} iterations"
    return Run(seconds, value, dense_rank(result.Z), result.relative_gap, dual, curve, note_)


def cvxpy(instance: Instance, solver: str, eps: float, limit: float) -> Run:
    """The program as CVXPY's documentation would have it, at one tolerance; end points only."""
    began = time.perf_counter()
    features, Y = attention_features(instance.X).numpy(), instance.Y.numpy()
    (n, c), d = Y.shape, instance.X.shape[2]
    Z = cp.Variable((d * d, d * c))
    f = features @ cp.reshape(Z, (d**3, c), order="C")
    data = (cp.sum(cp.log_sum_exp(f, axis=1)) - cp.sum(cp.multiply(Y, f))) / n
    problem = cp.Problem(cp.Minimize(data + instance.beta * cp.normNuc(Z)))
    options = (
        {"eps_abs": eps, "eps_rel": eps, "max_iters": 200_000, "time_limit_secs": limit}
        if solver == "SCS"
        else {"tol_gap_abs": eps, "tol_gap_rel": eps, "tol_feas": eps}
    )
    problem.solve(solver=solver, **options)
    if Z.value is None:
        raise cp.SolverError(problem.status)
    seconds = time.perf_counter() - began
    found = torch.as_tensor(Z.value)
    value = dense_objective(instance, found)
    return Run(
        seconds,
        value,
        dense_rank(found),
        curve=[(seconds, value, None)],
        note=f"eps={eps:g}",
        solver_seconds=problem.solver_stats.solve_time,
    )


def dense_objective(instance: Instance, Z: Tensor) -> float:
    """The convex program's value at ``Z (d², d·c)``."""
    f = attention_features(instance.X) @ Z.reshape(-1, instance.Y.shape[1])
    return cross_entropy(f, instance.Y) + instance.beta * float(torch.linalg.matrix_norm(Z, "nuc"))


def dense_rank(Z: Tensor) -> int:
    """Singular values above 1e-4 of the largest."""
    sigma = torch.linalg.svdvals(Z)
    return int((sigma > 1e-4 * sigma[0]).sum())


# -- the factored head, as it is trained today ----------------------------------------------------
def adam(instance: Instance, *, heads: int, lr: float, epochs: int, batch: int | None, seed: int) -> tuple[Run, Audit]:
    """Adam with the L2 term in the loss; recording objectives is not charged."""
    problem, prepared = _prepared(instance)
    result = train_adam(problem, instance.beta, n_heads=heads, lr=lr, epochs=epochs, batch_size=batch, seed=seed)
    curve: list[Point] = [(prepared + row.seconds, row.objective, None) for row in result.history]
    run = Run(prepared + result.seconds, result.convex_objective, heads, curve=curve)
    if not np.isfinite(run.objective):
        run.note = "diverged"
    return run, partial(audit, problem, result.module.to_atoms(), instance)


def lbfgs(instance: Instance, *, heads: int, seed: int, iterations: int) -> tuple[Run, Audit]:
    """scipy's L-BFGS-B on all factors at once, from the start that Adam has."""
    problem, prepared = _prepared(instance)
    beta = instance.beta
    start = make_network(problem, heads, seed).to_atoms()
    split = start.U.numel()

    def atoms(x: np.ndarray) -> Atoms:
        w = torch.from_numpy(x).to(problem.dtype)
        return Atoms(w[:split].view(start.U.shape), w[split:].view(start.V.shape), start.block, start.intercept)

    curve: list[Point] = []
    began = time.perf_counter()

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, at, _ = problem.value_and_gradient(atoms(x), beta)
        curve.append((prepared + time.perf_counter() - began, value, None))
        return value, torch.cat([at.U.flatten(), at.V.flatten()]).double().numpy()

    x0 = torch.cat([start.U.flatten(), start.V.flatten()]).double().numpy()
    options = {"maxiter": iterations, "maxfun": 2 * iterations, "maxcor": 20, "ftol": 1e-12, "gtol": 1e-10}
    found = minimize(function, x0, jac=True, method="L-BFGS-B", options=options)
    seconds = prepared + time.perf_counter() - began
    lowest = np.minimum.accumulate([value for _, value, _ in curve])
    curve = [(t, float(value), None) for (t, _, _), value in zip(curve, lowest, strict=True)]
    model = atoms(found.x)
    run = Run(seconds, objectives(problem, model, beta)[1], heads, curve=curve, note=f"{found.nfev} evaluations")
    return run, partial(audit, problem, model, instance)


def audit(problem: Problem, atoms: Atoms, instance: Instance) -> Certificate:
    """What can be proven of weights that anyone trained; not part of any time."""
    return certify_atoms(problem, atoms, instance.beta, tol=0.1, generator=torch.Generator().manual_seed(0))


def _prepared(instance: Instance) -> tuple[Problem, float]:
    """The problem with its tokens prepared for many passes, and the seconds that took."""
    began = time.perf_counter()
    return instance.problem(), time.perf_counter() - began
