"""What a training run asks of its network: gradients over some samples, and the objective on all data.

`ProblemPasses` takes the problem's own passes over prepared tokens: nothing is prepared twice, and Adam pays for
exactly the arithmetic that the convex solver pays for. `QueryPasses` trains the queries of an attentive head too, by
autograd.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy

import torch
from jaxtyping import Int
from torch import Tensor

from convexhead.modules import HeadModule
from convexhead.program.atoms import Atoms
from convexhead.program.problem import Problem

SCORED = 500
"""Samples that a network with trained queries scores at a time. Chosen by hand."""


class ProblemPasses:
    """The network of a problem: mixing weights, values and intercept are trained.

    Parameters
    ----------
    module : HeadModule
    problem : Problem
    """

    def __init__(self, module: HeadModule, problem: Problem) -> None:
        self.module, self.problem = module, problem
        b = module.values.new_zeros(problem.c) if module.intercept is None else module.intercept
        # On the same memory: the optimiser's steps are seen at once.
        self._atoms = Atoms(module.mixing.detach(), module.values.detach(), module.block, b.detach())

    def differentiate(self, index: Int[Tensor, " b"] | None, beta: float) -> None:
        """Set the gradients of Φ over some samples; None: over all."""
        batch = self.problem if index is None else self.problem.take(index)
        at = batch.value_and_gradient(self._atoms, beta).gradient
        gradients = {"mixing": at.U, "values": at.V, "intercept": at.intercept}
        for name, parameter in self.module.named_parameters():
            parameter.grad = gradients[name]

    def objective(self, beta: float) -> float:
        """Φ, in the problem's precision; infinite where it is not a number."""
        return factored_objective(self.problem, self._atoms, beta)

    def objectives(self, beta: float) -> tuple[float, float]:
        """`objectives` of the network."""
        return objectives(self.problem, self.module.to_atoms(), beta)


class QueryPasses:
    """The network of an attentive head whose queries and log-weights of places are trained too, and free.

    They start at those of the problem, and Φ does not penalise them. So Φ can fall below every bound of the problem,
    which is for its own queries.

    Parameters
    ----------
    module : HeadModule
        Its queries become parameters.
    problem : Problem
    """

    def __init__(self, module: HeadModule, problem: Problem) -> None:
        self.module, self.problem = module, problem
        module.train_queries()

    def differentiate(self, index: Int[Tensor, " b"] | None, beta: float) -> None:
        """Set the gradients of Φ over some samples; None: over all."""
        self.module.zero_grad(set_to_none=True)
        rows = torch.arange(self.problem.n) if index is None else index
        for part in rows.split(SCORED):
            (self._losses(self.module, self.problem, part) / len(rows)).backward()
        if beta:
            (beta * self.module.penalty()).backward()

    def objective(self, beta: float) -> float:
        """Φ, in the problem's precision; infinite where it is not a number."""
        value = self._data_term(self.module, self.problem) + beta * float(self.module.penalty().detach())
        return value if math.isfinite(value) else math.inf

    def objectives(self, beta: float) -> tuple[float, float]:
        """`objectives` of the network, with its own queries."""
        exact, module = self.problem.astype(torch.float64), deepcopy(self.module).double()
        return _both(exact, module.to_atoms(), beta, self._data_term(module, exact))

    def _data_term(self, module: HeadModule, problem: Problem) -> float:
        with torch.no_grad():
            parts = torch.arange(problem.n).split(SCORED)
            return sum(float(self._losses(module, problem, part)) for part in parts) / problem.n

    @staticmethod
    def _losses(module: HeadModule, problem: Problem, index: Int[Tensor, " b"]) -> Tensor:
        X = problem.operator.X[index].to(module.values)
        return problem.losses.at(index.to(problem.device)).value(module(X).unsqueeze(1)).sum()


def minibatches(n: int, size: int, generator: torch.Generator) -> Iterator[Int[Tensor, " b"] | None]:
    """One epoch in random order; the last batch may be smaller. None: all samples at once."""
    if size >= n:
        yield None
        return
    yield from torch.randperm(n, generator=generator).split(size)


def factored_objective(problem: Problem, atoms: Atoms, beta: float) -> float:
    """Φ, in the problem's precision; infinite where it is not a number."""
    value = problem.data_term(problem.outputs(atoms)) + beta * problem.penalty(atoms)
    return value if math.isfinite(value) else math.inf


def objectives(problem: Problem, atoms: Atoms, beta: float) -> tuple[float, float]:
    """``(Φ, convex objective)`` of ``atoms`` on all data in float64; infinite for non-finite weights."""
    exact, atoms = problem.astype(torch.float64), atoms.to(problem.device, torch.float64)
    return _both(exact, atoms, beta, exact.data_term(exact.outputs(atoms)))


def _both(exact: Problem, atoms: Atoms, beta: float, data_term: float) -> tuple[float, float]:
    """`objectives` of atoms with this data term."""
    nuclear = penalty = exact.penalty(atoms)
    if not math.isfinite(data_term + beta * penalty):
        return math.inf, math.inf
    if exact.head.learns_mixing:
        nuclear = float(sum(sizes.sum() for sizes in exact.balance(atoms)[1]))
    return data_term + beta * penalty, data_term + beta * min(nuclear, penalty)
