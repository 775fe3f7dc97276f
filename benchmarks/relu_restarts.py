"""Many restarts of a small ReLU network at once: Adam on all of them as one batch, then L-BFGS on the best few.

Every restart minimises the same non-convex objective, ``F + (β/2) Σ_k (‖U_k‖² + ‖V_k‖²)``, from its own start.
"""

from __future__ import annotations

import math

import torch

from convexhead.program.atoms import Atoms
from convexhead.program.problem import Problem
from convexhead.solvers.factored import FactoredDescent


def restarts(
    problem: Problem,
    beta: float,
    *,
    n_restarts: int,
    n_heads: int,
    steps: int = 1500,
    lr: float = 0.05,
    polish: int = 5,
    seed: int = 0,
) -> torch.Tensor:
    """The objectives ``(n_restarts,)`` that the restarts reach, ascending.

    Parameters
    ----------
    n_heads : int
        Atoms of each network, spread evenly over the channel groups.
    steps, lr : int, float
        Of Adam, with a cosine schedule.
    polish : int
        How many of the best are taken on by L-BFGS.
    """
    generator = torch.Generator().manual_seed(seed)
    B, m, (e, c), shape = n_restarts, n_heads, problem.value_shape, problem.head.mixing_shape
    block = torch.arange(B * m) % problem.n_blocks
    sizes = 10 ** torch.empty(B, 1, dtype=torch.float64).uniform_(-1.5, 0.5, generator=generator)
    U = torch.randn(B * m, *shape, generator=generator, dtype=torch.float64) / math.sqrt(math.prod(shape))
    V = torch.randn(B * m, e, c, generator=generator, dtype=torch.float64) / math.sqrt(e * c)
    scale = sizes.expand(B, m).reshape(-1)
    U, V = U * scale.view(-1, *[1] * len(shape)), problem.mask_values(V * scale.view(-1, 1, 1), block)
    data = problem.activation.prepare(problem.operator.tokens(), reuse=True)

    def objective_and_gradient(U, V):
        M, pull_back = problem.activation.mix_with_pull_back(data, U, block)  # (n, r, B·m, e)
        n, r = M.shape[:2]
        f = torch.einsum("nrbx,bxc->bnrc", M.reshape(n, r, B, m * e), V.view(B, m * e, c))
        Y = problem.Y.repeat(B, 1, 1)
        loss, R = problem.loss.value_and_residual(f.reshape(B * n, r, c), Y)
        R = R.view(B, n, r, c) / n
        gV = torch.einsum("nrbx,bnrc->bxc", M.reshape(n, r, B, m * e), R).reshape(V.shape) + beta * V
        T = torch.einsum("bnrc,bxc->nrbx", R, V.view(B, m * e, c)).reshape(M.shape)
        gU = pull_back(T) + beta * U
        penalty = (U.flatten(1).square().sum(1) + V.flatten(1).square().sum(1)).view(B, m).sum(1) / 2
        return loss.view(B, n).mean(1) + beta * penalty, gU, problem.mask_values(gV, block)

    parameters = [U.clone().requires_grad_(), V.clone().requires_grad_()]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.no_grad():
        for _ in range(steps):
            _, parameters[0].grad, parameters[1].grad = objective_and_gradient(*parameters)
            optimizer.step()
            decay.step()
        U, V = (parameter.detach() for parameter in parameters)
        values, *_ = objective_and_gradient(U, V)
        for b in values.argsort()[:polish].tolist():
            mine = slice(b * m, (b + 1) * m)
            start = Atoms(U[mine], V[mine], block[mine], torch.zeros(c, dtype=torch.float64))
            descent = FactoredDescent(problem, start, beta)
            for _ in range(300):
                if not descent.step():
                    break
            values[b] = min(float(values[b]), descent.value)
    return values.sort().values
