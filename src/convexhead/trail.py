"""Where to begin at the next β of a falling grid: from the models of those before."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from convexhead.model import Model
from convexhead.program.atoms import Atoms
from convexhead.program.problem import Problem

KEPT = 3
"""Models that the next one is predicted from: a parabola through them. Chosen by hand."""
FARTHEST = 1.5
"""Largest step in ``log β`` that is predicted over, in units of the step before. Chosen by hand: a parabola that is
followed further soon leads away."""
ASTRAY = 10.0
"""Gap of what is predicted, in units of its objective, above which the last model is the start. Chosen by hand: from
there on a solver would begin at a larger β."""
FEW = 10_000
"""Number of weights up to which what is predicted is the start whatever its gap. Chosen by hand: a Newton step on so
few repairs it."""


@dataclass
class Trail:
    """The models of falling β, of which the last few are kept.

    The optimum of the linear head is a smooth curve in ``log β``, along which its weights and its intercept are
    extrapolated, if that does not lead astray: errors of the models are larger ones of what is extrapolated. The atoms
    of other heads come and go: there the last model is the start.
    """

    _last: list[tuple[float, Atoms]] = field(default_factory=list)
    _smooth: bool = False

    def add(self, model: Model) -> None:
        """Note the model of the next β."""
        self._smooth = not model.head.learns_mixing
        self._last = [*self._last, (model.beta, model.atoms)][-KEPT:]

    def start(self, beta: float, problem: Problem) -> Atoms | None:
        """Where to begin at a smaller ``beta``; None before there is a model."""
        if not self._last:
            return None
        last, predicted = self._last[-1][1], self._predicted(beta)
        if predicted is None:
            return last
        if predicted.V.numel() <= FEW:
            return predicted
        there = problem.value_and_gradient(predicted.to(problem.device, problem.dtype), beta)
        gap = float(there.gradient.V.double().square().sum()) / (2 * beta)
        return predicted if gap <= ASTRAY * abs(there.value) else last

    def _predicted(self, beta: float) -> Atoms | None:
        """What is extrapolated, where it can be."""
        at, places = math.log(beta), [math.log(place) for place, _ in self._last]
        if not self._smooth or len(places) < 2 or not 0 < places[-1] - at <= FARTHEST * (places[-2] - places[-1]):
            return None
        atoms = self._last[-1][1]
        shares = [math.prod((at - y) / (x - y) for y in places if y != x) for x in places]  # Lagrange's polynomials
        V, intercept = atoms.V * shares[-1], atoms.intercept * shares[-1]
        for share, (_, found) in zip(shares, self._last[:-1], strict=False):
            V, intercept = V + share * found.V, intercept + share * found.intercept
        return replace(atoms, V=V, intercept=intercept)
