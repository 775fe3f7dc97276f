"""The unpenalised intercept at fixed outputs: ``min_b (1/n) Σ_i ω_i ℓ(f_i + b, y_i)``, to high precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

from convexhead.program.losses import Huber, Squared

if TYPE_CHECKING:
    from convexhead.program.problem import Problem

SEPARABLE = (Squared, Huber)
"""Losses of one output ``f_k − y_k`` after another, each with a minimum between the extreme differences."""
ROUNDING = 1e-6
"""Relative amount by which rounding may raise the loss in a step. Chosen by hand: float32 sums are known to less."""


def solve_intercept(problem: Problem, f: Float[Tensor, "n r c"]) -> Float[Tensor, " c"]:
    """The minimising ``b (c,)``; where it is not unique or infinite, one with a small gradient.

    Newton steps on the ``c × c`` Hessian bring the mean residual to rounding level, from 0 or, where that is too far,
    from where L-BFGS comes. Where probabilities saturate the residual is small too, far above the minimum: a step that
    raises the loss is not taken. Where the loss is a sum over outputs, bracketed Newton steps need no start.

    Parameters
    ----------
    problem : Problem
        Loss and targets, in the precision of ``f``.
    f : Tensor (n, r, c)
        Outputs without the intercept.
    """
    if type(problem.loss) in SEPARABLE:
        return _output_by_output(problem, f)

    def value(b: np.ndarray) -> float:
        shift = torch.as_tensor(b, dtype=f.dtype, device=f.device)
        return problem.mean_of(lambda losses, x: losses.value(x + shift), f)

    def mean_residual(b: np.ndarray) -> np.ndarray:
        shift = torch.as_tensor(b, dtype=f.dtype, device=f.device)
        return problem.total_of(lambda losses, x: losses.residual(x + shift).sum((0, 1)), f).cpu().numpy() / problem.n

    def mean_hessian(b: np.ndarray) -> np.ndarray:
        shift = torch.as_tensor(b, dtype=f.dtype, device=f.device)
        return problem.total_of(lambda losses, x: losses.summed_hessian(x + shift), f).cpu().numpy() / problem.n

    def newton(b: np.ndarray) -> tuple[np.ndarray, float]:
        """Steps from ``b`` as long as ``|Σ_i R_i|`` falls and the loss does not rise, and what is left of it."""
        g, least = mean_residual(b), value(b)
        for _ in range(10):
            if np.abs(g).sum() <= 1e-15 * c:
                break
            trial = b - np.linalg.lstsq(mean_hessian(b), g, rcond=1e-10)[0]
            trial_g = mean_residual(trial)
            there = value(trial)
            if not (np.abs(trial_g).sum() < np.abs(g).sum() and there <= least + ROUNDING * (1 + abs(least))):
                break
            b, g, least = trial, trial_g, there
        return b, float(np.abs(g).sum())

    c = f.shape[-1]
    b, left = newton(np.zeros(c))
    if not left <= 1e-13 * c:
        near = minimize(value, b, jac=mean_residual, method="L-BFGS-B", options={"maxiter": 200}).x
        b = newton(near)[0]
    return torch.as_tensor(b, dtype=f.dtype, device=f.device)


def improve_intercept(problem: Problem, f: Float[Tensor, "n r c"], q: Float[Tensor, "n r c"]) -> None:
    """Take one Newton step in the intercept from the outputs ``f``, where ``∇ℓ`` is ``q``, and move both in place; or
    leave them, where their sum is nearer to 0 as it is. Some samples at a time, to save memory."""
    g = problem.total_of(lambda losses, x: losses.weigh(x).sum((0, 1)), q)
    H = problem.total_of(lambda losses, x: losses.summed_hessian(x), f)
    step = torch.as_tensor(np.linalg.lstsq(H.cpu().numpy(), g.cpu().numpy(), rcond=1e-10)[0]).to(f)
    moved = problem.total_of(lambda losses, x: losses.residual(x - step).sum((0, 1)), f)
    if not float(moved.abs().sum()) < float(g.abs().sum()):
        return
    for rows in problem.rows:
        f[rows] -= step
        q[rows] = problem.losses.at(rows).dual_point(f[rows])


def _output_by_output(problem: Problem, f: Float[Tensor, "n r c"]) -> Float[Tensor, " c"]:
    """Roots of ``g_k(b_k) = Σ_i R_ik``, which rises: Newton steps, halvings of the bracket where they leave it."""
    losses, t = problem.losses, (problem.Y - f).flatten(0, 1)
    ends = problem.ranks.largest(*(-t.amin(0)).tolist(), *t.amax(0).tolist())
    low, high = (t.new_tensor(end) for end in (-np.array(ends[: t.shape[1]]), ends[t.shape[1] :]))
    one, b = torch.ones_like(f), (low + high) / 2
    best, least = b, torch.full_like(b, torch.inf)
    for _ in range(200):
        g, h = problem.sum(losses.residual(f + b).sum((0, 1)), losses.hessian_times(f + b, one).sum((0, 1)))
        better = g.abs() < least
        best, least = torch.where(better, b, best), torch.where(better, g.abs(), least)
        low, high = torch.where(g < 0, b, low), torch.where(g > 0, b, high)
        newton = b - g / h
        middle = (low + high) / 2
        following = torch.where((newton > low) & (newton < high), newton, middle)
        if bool(((g == 0) | (following == b)).all()):
            break
        b = torch.where(g == 0, b, following)
    return best
