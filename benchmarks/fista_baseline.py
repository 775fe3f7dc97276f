"""Plain FISTA with adaptive restart, as a good user of PyTorch would write it for the convex attention head.

    min_Z  (1/n) Σ_i ce(Φ_i Z, y_i) + β ‖Z‖_*            Z (p, e·c),  Φ (n, p·e) dense

Momentum with gradient restart (O'Donoghue & Candès 2015), an exact SVD in every proximal step, float64; the step is
constant, from the Lipschitz constant ``‖Φ‖² / (2 n)``, or adaptive, by backtracking. Every ten iterations a duality
gap: the residuals at the iterate, scaled until the gradient's spectral norm is at most β.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Result:
    """Weights, objective, certified relative gap and iterations of a run."""

    Z: Tensor
    objective: float
    relative_gap: float
    iterations: int


def attention_features(X: Tensor) -> Tensor:
    """``Φ (n, d²·d)`` of the mean-pooled linear attention head: ``Φ[i, (k,l), a] = mean(X_i)_k · (X_iᵀX_i / s)_la``."""
    gram = X.mT @ X / X.shape[1]
    return torch.einsum("nk,nla->nkla", X.mean(1), gram).flatten(1)


def cross_entropy(f: Tensor, y: Tensor) -> float:
    """Mean over samples, for one-hot targets."""
    return float((torch.logsumexp(f, 1) - (f * y).sum(1)).mean())


def fista(
    features: Tensor,
    Y: Tensor,
    p: int,
    beta: float,
    tol: float,
    *,
    adaptive: bool,
    max_iterations: int = 100_000,
    callback: Callable[[float, float], None] = lambda objective, gap: None,
) -> Result:
    """Until the relative gap is certified to be at most ``tol``.

    Parameters
    ----------
    features : Tensor (n, p·e)
    Y : Tensor (n, c)
        One-hot labels.
    p : int
        Rows of ``Z``.
    adaptive : bool
        Follow the local curvature by backtracking instead of the constant step.
    callback : callable (objective, relative gap)
        Called with every gap.
    """
    (n, c), w = Y.shape, features.shape[1]
    gram = features.T @ features if n > w else features @ features.T
    lipschitz = float(torch.linalg.eigvalsh(gram)[-1]) / (2 * n)
    curvature = lipschitz / 8 if adaptive else lipschitz
    Z, f = features.new_zeros(p, w // p * c), torch.zeros_like(Y)
    E, fE, momentum, dual = Z, f, 1.0, -math.inf
    for iteration in range(max_iterations):
        R = (torch.softmax(fE, 1) - Y) / n
        G = (R.T @ features).T.reshape(Z.shape)  # much faster than features.T @ R in this shape
        while True:
            left, sigma, right = torch.linalg.svd(E - G / curvature, full_matrices=False)
            sigma = (sigma - beta / curvature).clamp_min(0)
            new = (left * sigma) @ right
            f_new = features @ new.view(w, c)
            if not adaptive or curvature >= lipschitz:
                break
            step = new - E
            rise = cross_entropy(f_new, Y) - cross_entropy(fE, Y) - float((G * step).sum())
            if rise <= curvature / 2 * float(step.square().sum()) + 1e-15:
                break
            curvature = min(1.5 * curvature, lipschitz)
        if adaptive:
            curvature /= 1.02
        if float(((E - new) * (new - Z)).sum()) > 0:
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        weight, momentum = (momentum - 1) / following, following
        E, fE = new + weight * (new - Z), f_new + weight * (f_new - f)
        Z, f = new, f_new
        if iteration % 10 == 9:
            objective = cross_entropy(f, Y) + beta * float(sigma.sum())
            R = torch.softmax(f, 1) - Y
            norm = float(torch.linalg.matrix_norm((R.T @ features).T.reshape(Z.shape) / n, 2))
            q = Y + min(1.0, beta / norm) * R
            dual = max(dual, -float(torch.xlogy(q, q).sum(1).mean()))
            gap = (objective - dual) / objective
            callback(objective, gap)
            if gap <= tol:
                break
    return Result(Z, objective, gap, iteration + 1)
