"""Directions in which a model may gain: leading singular triples of the gradient matrices, as estimates.

Both searches begin at the vectors that the last one ended with, and at some random ones: what those do not see would
never be found.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor

from convexhead.linalg.deflation import Deflated, top_singular
from convexhead.linalg.gradient_matrices import GradientMatrices
from convexhead.linalg.krylov import BlockKrylov
from convexhead.program.atoms import Atoms
from convexhead.program.problem import Problem

FORMED_STEPS = 12
"""Number of Krylov steps on formed matrices, where a step costs next to nothing. Chosen by hand."""


class Directions(NamedTuple):
    """Singular triples of every block, falling: ``sigma (j, m)``, ``left (j, p, m)``, ``right (j, q, m)``."""

    sigma: Tensor
    left: Tensor
    right: Tensor


def lacking_directions(
    model: Deflated, warm: Float[Tensor, "j big w"] | None, first: int, generator: torch.Generator
) -> tuple[Directions, Float[Tensor, "j big v"]]:
    """Find the directions of the matrices without the model's own, and what to begin the next search with.

    Parameters
    ----------
    model : Deflated
        With the model's directions split off.
    warm : Tensor (j, N, w) or None
        What the last search returned.
    first : int
        Directions that a first search looks for where there is one block.
    """
    G, several = model.G, model.G.operator.n_blocks > 1
    blocks = torch.arange(G.operator.n_blocks, device=G.R.device)
    if warm is None:
        start = G.random_start(blocks, min(4 if several else first, G.order), generator)
    else:
        fresh = G.random_start(blocks, min(2, G.order), generator) / warm.shape[1] ** 0.5
        start = torch.cat([warm, fresh], 2)[:, :, : G.order]
    rtol = 2e-3 if G.formed is None else 1e-4
    sigma, left, right, warm = top_singular(model, start, rtol=rtol, max_steps=30)
    return Directions(sigma, left, right), warm[:, :, : min(2 if several else 8, warm.shape[2])]


def leading_directions(
    model: Deflated,
    exact: GradientMatrices,
    warm: Float[Tensor, "j big w"] | None,
    extra: int,
    generator: torch.Generator,
) -> tuple[Directions, Float[Tensor, "j big v"]]:
    """Find the directions of every block, ``extra`` more than the widest has atoms, and the next search's start.

    They are looked for in the products of ``model``'s operator, which may be rough; their sizes are then taken from
    ``exact`` ones.
    """
    G = model.G
    blocks = torch.arange(G.operator.n_blocks, device=G.R.device)
    near = model.B if G.on_values else model.A
    known = [near] if warm is None else [near, warm]
    noise = G.random_start(blocks, extra, generator)
    start = torch.linalg.qr(torch.cat([*known, noise], 2)[:, :, : G.order]).Q
    krylov = BlockKrylov(G.gram, start, blocks, G.order)
    krylov.step()
    while krylov.steps < (3 if G.formed is None else FORMED_STEPS) and krylov.can_step():
        krylov.step()
    x = krylov.vectors(min(near.shape[2] + extra, G.order))
    y = exact.times(x, blocks) if G.on_values else exact.transpose_times(x, blocks)
    other = torch.linalg.qr(y).Q
    left, right = (other, x) if G.on_values else (x, other)
    return Directions(torch.linalg.svdvals(y), left, right), x[:, :, -extra:]


def with_best_step(
    problem: Problem, f: Float[Tensor, "n r c"], new: Atoms, excess: Float[Tensor, " k"], beta: float
) -> Atoms:
    """``new`` atoms times ``√t`` on both sides, with the common ``t`` that lowers the objective most.

    Outputs are linear in ``t``, also those of a ReLU head.

    Parameters
    ----------
    f : Tensor (n, r, c)
        Outputs of the model that they are added to.
    new : Atoms
        Of sizes ``excess``.
    excess : Tensor (k,)
        ``σ_k − β``: what each gains, to first order, in units of its size.
    """
    change = problem.outputs(new)
    added, slope = beta * float(excess.sum()), float(excess.square().sum())
    step = slope / max(problem.mean_of(lambda _, change: change.double().square().sum((1, 2)), change), 1e-300)
    t = minimize_scalar(
        lambda t: problem.mean_of(lambda losses, f, change: losses.value(f + t * change), f, change) + t * added,
        bounds=(0.0, 20 * step),
        method="bounded",
        options={"maxiter": 30},
    ).x
    return replace(new, U=float(t) ** 0.5 * new.U, V=float(t) ** 0.5 * new.V)
