"""Where to begin at the next β of a falling grid: from the models of those before."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from convexhead.model import Model
from convexhead.program.atoms import Atoms
from convexhead.program.linear_passes import LinearPasses, as_atoms, as_matrix
from convexhead.program.problem import Problem
from convexhead.solvers.span import Span


@dataclass
class Trail:
    """The models of falling β, of which the last two are kept.

    The optimum of the linear head is a smooth curve in ``log β``. The start is the best model in the span of the last
    two: a line through them that errors of the models do not lead astray, as they do a curve through more. The atoms
    of other heads come and go: there the last model is the start.
    """

    _last: list[tuple[float, Atoms]] = field(default_factory=list)
    _smooth: bool = False

    def add(self, model: Model) -> None:
        """Note the model of the next β."""
        self._smooth = not model.head.learns_mixing
        self._last = [*self._last, (model.beta, model.atoms)][-2:]

    def start(self, beta: float, problem: Problem) -> Atoms | None:
        """Where to begin at a smaller ``beta``, in the user's coordinates; None before there is a model."""
        if not self._last:
            return None
        several = len({place for place, _ in self._last}) > 1  # where β_max is 0 all β are the same
        return self._in_span(beta, problem) if self._smooth and several else self._last[-1][1]

    def _in_span(self, beta: float, problem: Problem) -> Atoms:
        """The best model in the span."""
        (first, _), (second, _) = self._last
        ahead = math.log(second / beta) / math.log(first / second)  # in steps of the grid
        passes = LinearPasses(problem)
        before, last = (problem.enter(atoms.to(problem.device, torch.float64)) for _, atoms in self._last)
        B, f = as_matrix(last), passes.outputs_of(last)
        weights = [B, B - as_matrix(before)]
        step = f - passes.outputs_of(before)
        outputs = [f.to(problem.dtype), step.to(problem.dtype)]
        span = Span(passes.problem, problem.coordinates.beta(beta), outputs, weights)
        on_line, there = ((shares, span.value(shares)) for shares in torch.tensor([[1.0, ahead], [1.0, 0.0]]).double())
        of_last, of_step = span.minimise(*(on_line if on_line[1] < there[1] else there))[0].tolist()
        start = as_atoms(of_last * B + of_step * weights[1], last)
        if (recent := problem.operator.samples.recent) is not None:
            recent.keep(start, of_last * f + of_step * step)
        return problem.leave(start)
