"""The unpenalised intercept at fixed outputs: ``min_b (1/n) Σ_i ℓ(f_i + b, y_i)``, to high precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

if TYPE_CHECKING:
    from convexhead.problem import Problem


def solve_intercept(problem: Problem, f: Float[Tensor, "n r c"]) -> Float[Tensor, " c"]:
    """The minimising ``b (c,)``; where it is not unique or infinite, one with a small gradient.

    L-BFGS comes near, then Newton steps on the ``c × c`` Hessian bring the mean residual to rounding level.

    Parameters
    ----------
    problem : Problem
        Loss and targets, in the precision of ``f``.
    f : Tensor (n, r, c)
        Outputs without the intercept.
    """
    loss, Y = problem.loss, problem.Y

    def shifted(b: np.ndarray) -> Tensor:
        return f + torch.as_tensor(b, dtype=f.dtype, device=f.device)

    def value_and_gradient(b: np.ndarray) -> tuple[float, np.ndarray]:
        return problem.data_term(shifted(b)), mean_residual(b)

    def mean_residual(b: np.ndarray) -> np.ndarray:
        total = loss.residual(shifted(b), Y).sum((0, 1))
        return problem.sum(total)[0].cpu().numpy() / problem.n

    c = f.shape[-1]
    b = minimize(value_and_gradient, np.zeros(c), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    g = mean_residual(b)
    for _ in range(4):
        if np.abs(g).sum() <= 1e-15 * c:
            break
        H = problem.sum(loss.mean_hessian(shifted(b), Y) * len(f))[0].cpu().numpy() / problem.n
        trial = b - np.linalg.lstsq(H, g, rcond=1e-10)[0]
        trial_g = mean_residual(trial)
        if np.abs(trial_g).sum() >= np.abs(g).sum():
            break
        b, g = trial, trial_g
    return torch.as_tensor(b, dtype=f.dtype, device=f.device)
