"""Queries of an attentive head that are found, not sampled: the program over all queries of a ball.

    min over queries and Z  F(Σ_j φ_jᵀ Z_j) + β Σ_j ‖Z_j‖_*        q_j of the ball, any number of them

A query pays where ``‖Σ_i φ_q(X_i) R_iᵀ‖₂ > β``. So, from the mean of the tokens on,

1. *solve* for the queries at hand, from the last solution;
2. *drop* queries with ``Z_j = 0``, and join those that are nearly one;
3. *price*: ascend the reward from sampled queries, at last from those at hand too; end where none is far above β;
4. *polish*: descend on the objective over queries and weights together;
5. *add* the highest of the local maxima that are not nearly queries at hand.

The number of queries is a result. Nothing bounds the reward of a query that no ascent found: what is left is an
estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from convexhead.drive import approach
from convexhead.dual_norm.query_ascent import NUMBERS, SAME, STARTS, QueryMaxima, price
from convexhead.program.atoms import Atoms
from convexhead.program.heads.attentive import Attentive
from convexhead.program.heads.base import mix_features
from convexhead.program.heads.query_ball import QueryBall
from convexhead.program.heads.token_draw import TokenDraw
from convexhead.program.intercept import solve_intercept
from convexhead.program.problem import Problem

FEW = 8
"""Queries that a round may add, or half as many as there are if that is more. Chosen by hand."""
ROUNDS = 30
"""Rounds, at most. Chosen by hand."""
POLISH = 12
"""Steps of descent over queries and weights together in a round. Chosen by hand."""
WORTH = 5
"""Multiple of the tolerance by which a reward must exceed β: rewards are no better known. Chosen by hand."""
ROUGH = 1e-2
"""Relative gap that the first rounds solve to; later ones to less where nothing new pays. Chosen by hand."""
Pose = Callable[[Tensor], Problem]
"""The problem for queries ``(J, m)``."""


def find_queries(
    pose: Pose,
    ball: QueryBall,
    draw: TokenDraw,
    beta_of: Callable[[float], float],
    tol: float,
    generator: torch.Generator,
    late: Callable[[], bool],
) -> tuple[QueryMaxima, float]:
    """Find queries; ``values`` of the result are their strengths ``‖Z_j‖_*``.

    Parameters
    ----------
    pose : callable
    ball : QueryBall
    draw : TokenDraw
        Where ascents start.
    beta_of : callable (float) -> float
        β, given the highest reward at ``Z = 0``.
    tol : float
        Relative gap of the model that the queries are for.
    generator : torch.Generator
        Decides everything.
    late : callable () -> bool
        Whether to end with the queries at hand.

    Returns
    -------
    queries : QueryMaxima
    beta_max : float
        The highest reward found at ``Z = 0``.
    """
    none = torch.zeros(1, dtype=torch.float64)
    mean = QueryMaxima(none, none.expand(1, ball.basis.shape[1]), torch.zeros(1, dtype=torch.int64), ball.radius)
    problem = pose(ball.queries(mean.z, mean.place))
    atoms, starts = problem.empty(), STARTS // 4
    found = price(problem.operator, ball, _residual(problem, atoms), mean, draw, generator, starts=starts, late=late)
    beta_max, queries = float(found.values[0]), found.select(torch.arange(min(FEW, len(found))))
    beta, gap = beta_of(beta_max), ROUGH
    for _ in range(ROUNDS):
        problem = pose(ball.queries(queries.z, queries.place))
        model, *_ = approach(problem, beta, tol=gap, start=atoms, generator=generator)
        R = _residual(problem, model.to(problem.device, problem.dtype))
        queries, atoms = _kept(queries, model.to(problem.device, problem.dtype))
        known = queries.select(torch.arange(len(queries) if starts == STARTS else 0))  # else `_polished` moves them
        found = price(problem.operator, ball, R, known, draw, generator, starts=starts, late=late)
        worth = found.select(found.values > beta * (1 + WORTH * tol))
        last = gap == tol and starts == STARTS
        if late() or (last and not len(worth)):
            break
        queries = _polished(problem, ball, queries, atoms, beta)
        new = worth.select((worth.distances(queries) > SAME).all(1))
        if not len(new):  # a rough solution rewards what an exact one does not, and few starts miss what many find
            gap, starts = max(tol, gap / 4), STARTS
        queries = queries.merge(new.select(torch.arange(min(len(new), max(FEW, len(queries) // 2)))))
    return queries, beta_max


def _residual(problem: Problem, atoms: Atoms) -> Tensor:
    """``R`` at the model's outputs, with the best intercept where one is fitted."""
    f = problem.outputs(atoms)
    if problem.fit_intercept:
        f = f + solve_intercept(problem, f)
    return problem.residual(f)


def _kept(queries: QueryMaxima, atoms: Atoms) -> tuple[QueryMaxima, Atoms]:
    """The queries that the model uses, the strongest first, and its atoms for these.

    Of those that are nearly one the mean is kept, weighted by strength.
    """
    sizes = (atoms.U.flatten(1).norm(dim=1) * atoms.V.flatten(1).norm(dim=1)).double().cpu()
    strength = torch.zeros(len(queries), dtype=torch.float64).index_add_(0, atoms.block.cpu(), sizes)
    used = strength.argsort(descending=True, stable=True)[: max(1, int((strength > 0).sum()))]
    number = torch.zeros(len(queries), dtype=torch.int64)
    number[used] = torch.arange(len(used))
    queries, strength = queries.select(used), strength[used].clamp_min(torch.finfo(torch.float64).tiny)
    leads = queries.distinct()
    group = queries.distances(leads).argmin(1)
    total = torch.zeros(len(leads), dtype=torch.float64).index_add_(0, group, strength)
    z = torch.zeros_like(leads.z).index_add_(0, group, queries.z * strength.unsqueeze(1)) / total.unsqueeze(1)
    block = group[number[atoms.block.cpu()]].to(atoms.block.device)
    return replace(leads, values=total, z=z), replace(atoms, block=block)


def _polished(problem: Problem, ball: QueryBall, queries: QueryMaxima, atoms: Atoms, beta: float) -> QueryMaxima:
    """The queries after some steps of descent on the objective, over queries and weights together."""
    head, exact = problem.head, problem.astype(torch.float64)
    assert isinstance(head, Attentive)
    parts = [queries.z, *(part.double() for part in (atoms.U, atoms.V, atoms.intercept))]
    z, U, V, b = (part.detach().clone().to(problem.device).requires_grad_() for part in parts)
    moving = [z, U, V, b] if problem.fit_intercept else [z, U, V]
    size = max(1, NUMBERS // (len(queries) * (head.s + head.d)))
    descent = torch.optim.LBFGS(moving, max_iter=POLISH, history_size=POLISH, line_search_fn="strong_wolfe")

    def evaluate() -> Tensor:
        descent.zero_grad()
        penalty = beta / 2 * (U.square().sum() + V.square().sum())
        penalty.backward()
        total = penalty.detach()
        for i in range(0, len(problem.operator), size):
            rows = slice(i, i + size)
            asked = head.asking(ball.queries(ball.inside(z), queries.place))
            features = asked.prepare_linear(exact.operator.X[rows].to(z), reuse=False)["features"]
            f = mix_features(features, U, atoms.block).flatten(2) @ V.flatten(0, 1) + b
            loss = exact.losses.at(rows).value(f).sum() / problem.n
            loss.backward()
            total = total + loss.detach()
        return total

    before = float(evaluate())
    descent.step(evaluate)
    return replace(queries, z=ball.inside(z.detach().cpu())) if float(evaluate()) < before else queries
