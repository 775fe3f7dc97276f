"""What a certificate says, and when it says nothing: the fields, and what they must agree on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from convexhead.errors import InputError
from convexhead.program.identity import PARTS, differences

SCOPES = {
    "global": "global optimum",
    "sampled-gates": "optimum for these gates",
    "sampled-queries": "optimum for these queries",
    "estimated": "global optimum",
}
"""Scopes of a gap, and the words for each in a sentence."""
SAME_BETA = 1e-12
"""Relative difference up to which two values of β are equal. Derived: writing β in decimal digits changes less."""


@dataclass(frozen=True)
class Certificate:
    """A proof that a model's objective is within ``gap`` of the global optimum.

    Attributes
    ----------
    primal : float
        ``P``, the objective of the convex program at the model.
    dual : float
        ``D ≤ P*``, the best lower bound known.
    gap : float
        ``P − D ≥ 0``, slack and rounding included.
    relative_gap : float
        ``gap / |primal|``.
    sigma_slack : float
        By how much, relatively, the largest singular value found was raised to be a bound; 0 for an exact SVD.
    failure_probability : float
        Probability, over the random starts, that the raised value is not a bound; 0 for an exact SVD.
    scope : str
        What the gap is to. ``"global"``: the optimum over all heads of this kind. ``"sampled-gates"``: that of the
        program with these gates, and ``"sampled-queries"``: with these queries. ``"estimated"``: a ReLU head too large
        for a tight proof, or one whose pre-activations float64 cannot tell apart well enough, or queries that were
        searched; ``dual``, ``gap`` and ``relative_gap`` are still proven, but loose, and the last fields say what a
        search suggests.
    converged : bool
        Whether ``relative_gap ≤ tol``; never where ``scope`` is ``"estimated"``.
    bound : str
        How the largest singular value, or a ReLU's dual norm, was bounded.
    estimated_gap : float or None
        Of these: the relative gap if the search found the largest reward there is. Not proven.
    ascents : int
        Starts of that search.
    rewards : list of float
        The highest rewards it found, in units of β, repeats left out: above 1 the head can be improved.
    refuted : bool
        Of a ReLU: whether that search, or the model, exceeded a bound that rounding had spoilt. It was discarded.
    tol : float or None
        The relative gap that was asked for.
    beta : float or None
        ``β`` of the program.
    identity : dict or None
        All else that the optimum depends on, in named parts: see `convexhead.program.identity`. None where it was not
        recorded (models saved before there were identities): then ``dual`` is no bound for any other model.

    Raises
    ------
    InputError
        The fields are not numbers, or contradict each other.
    """

    primal: float
    dual: float
    gap: float
    relative_gap: float
    sigma_slack: float
    failure_probability: float
    scope: str
    converged: bool
    bound: str = ""
    estimated_gap: float | None = None
    ascents: int = 0
    rewards: list[float] = field(default_factory=list)
    refuted: bool = False
    tol: float | None = None
    beta: float | None = None
    identity: dict[str, str] | None = None

    def __post_init__(self) -> None:
        wrong = self._contradiction()
        if wrong:
            raise InputError(f"this is not a certificate: {wrong}")

    def _contradiction(self) -> str | None:
        """What cannot be in the fields, in words; None where they agree."""
        if self.scope not in SCOPES:
            return f"unknown scope {self.scope!r}"
        numbers = ["primal", "dual", "gap", "failure_probability"]
        numbers += [name for name in ("estimated_gap", "tol", "beta") if getattr(self, name) is not None]
        for name in numbers:
            if not _is_number(getattr(self, name)):
                return f"{name} is {getattr(self, name)!r}"
        if not all(_is_number(reward) for reward in self.rewards):
            return f"rewards are {self.rewards!r}"
        rounding = 1e-12 * max(abs(self.primal), abs(self.dual))
        if not self.gap >= 0 or abs(self.gap - (self.primal - self.dual)) > rounding:
            return f"gap {self.gap!r} is not primal {self.primal!r} - dual {self.dual!r}"
        relative = relative_to(self.gap, self.primal)
        if not isinstance(self.relative_gap, (int, float)) or not (
            self.relative_gap == relative or abs(self.relative_gap - relative) <= 1e-12 * relative
        ):
            return f"relative_gap {self.relative_gap!r} is not gap / |primal| = {relative!r}"
        if not isinstance(self.converged, bool) or (self.converged and self.scope == "estimated"):
            return f"converged is {self.converged!r} with scope {self.scope!r}"
        if self.tol is not None and self.converged != (self.relative_gap <= self.tol and self.scope != "estimated"):
            return f"converged is {self.converged} at relative_gap {self.relative_gap!r} and tol {self.tol!r}"
        if not (isinstance(self.sigma_slack, (int, float)) and self.sigma_slack >= 0):
            return f"sigma_slack is {self.sigma_slack!r}"
        if not 0 <= self.failure_probability <= 1:
            return f"failure_probability is {self.failure_probability!r}"
        if self.identity is not None and (
            not isinstance(self.identity, dict)
            or set(self.identity) != set(PARTS)
            or not all(isinstance(text, str) for text in self.identity.values())
        ):
            return "identity lacks parts"
        return None

    def check_is_of(self, identity: dict[str, str], beta: float) -> None:
        """Refuse a certificate of another problem than the one of this ``identity`` at this ``beta``.

        Raises
        ------
        InputError
            It names everything that differs.
        """
        if self.identity is None or self.beta is None:
            raise InputError(
                "this reference does not say which problem it was certified for (an earlier version made it), "
                "so its lower bound cannot be used: fit it again"
            )
        told = differences(self.identity, identity)
        if abs(self.beta - beta) > SAME_BETA * abs(beta):
            told.append(f"another beta: {self.beta:.10g} instead of {beta:.10g}")
        if told:
            raise InputError(
                f"the reference was certified for another problem ({'; '.join(told)}), so its lower bound says nothing "
                "here: take one of the same problem, or none"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.scope == "estimated":
            best = self.rewards[0] if self.rewards else 0.0
            worth = f"{best:.3g} times what it costs" if best >= 2 else f"{100 * (best - 1):.2g}% more than it costs"
            return (
                f"objective {self.primal:.6g}, not proven to be near the global optimum: {self.ascents} searches found "
                + (f"a change worth {worth}" if best > 1.001 else "nothing to improve")
                + f", which suggests a gap of about {100 * (self.estimated_gap or 0.0):.2g}% (an estimate); proven is "
                f"only that no head of this kind goes below {self.dual:.3g}"
                + ("; a tighter bound was refuted by a search and discarded: centre the features" * self.refuted)
            )
        return (
            f"objective {self.primal:.6g} is within {self.gap:.2g} ({100 * self.relative_gap:.2g}%) of the "
            + SCOPES[self.scope]
            + (f", up to probability {self.failure_probability:.0e}" if self.failure_probability else "")
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def relative_to(gap: float, primal: float) -> float:
    """``gap / |primal|``, and where the objective is 0 nothing but a gap of 0 is small."""
    return gap / abs(primal) if primal else (0.0 if gap == 0 else math.inf)
