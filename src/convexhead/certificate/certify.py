"""How far from the optimum a model is, at most: computed in float64 and apart from every solver.

Fenchel duality: for any weights, with ``R_i = ∇ℓ(f_i, y_i)/n`` and ``σ = max_j ‖𝒜_j*(R)‖₂``,

    P* ≥ D(τ) = −(1/n) Σ_i ℓ*(n τ R_i, y_i)      for every  0 ≤ τ ≤ β/σ  that stays in the domain of ℓ*

and ``gap = P − max_τ D(τ)``. For a ReLU ``σ`` is the dual norm ``h(R)`` (`convexhead.dual_norm.norm`). Three things
must be honest about it.

* ``σ`` is bounded from *above*. Where the gradient matrix is small, or cheap to form, it is decomposed. Otherwise its
  approximate leading singular directions are split off, the norm of what is left is at most ``σ̂/√(1 − ε)`` from random
  starts but with `failure_probability`, and the norms of all parts bound that of the whole (see `spectral.Deflated`).
  Splitting pays: what is left lies below β, so a crude ``ε`` will do.
* An unpenalised intercept needs ``Σ_i R_i = 0``: the residual is projected, and what rounding left is charged.
* Rounding: ``σ`` is raised and ``D`` lowered by more than float64 can have lost (`convexhead.certificate.dual`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.certificate.dual import DualPoint, error_of_objective
from convexhead.dual_norm.norm import NormOracle
from convexhead.errors import InputError
from convexhead.linalg.spectral import (
    BlockKrylov,
    GradientMatrices,
    formed_norm,
    relative_slack,
    split_off_leading,
    split_off_more,
    worth_forming,
)
from convexhead.program.identity import PARTS, differences
from convexhead.program.intercept import solve_intercept
from convexhead.program.loss_check import check_loss
from convexhead.program.problem import Atoms, Problem

ENOUGH_STEPS = 20
"""Krylov steps from random starts after which the norm of what is left should be known well enough."""
MOST_SPLITS = 3
"""How often more directions are split off where it is not."""
SCOPES = {"global": "global optimum", "sampled-gates": "optimum for these gates", "estimated": "global optimum"}
"""What a gap may be to, and how a sentence names it."""
SAME_BETA = 1e-12
"""Relative difference up to which two values of β are the same: what a detour over decimal digits can change."""


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
        program with these gates. ``"estimated"``: a ReLU head too large for a tight proof, or one whose pre-activations
        float64 cannot tell apart well enough; ``dual``, ``gap`` and ``relative_gap`` are still proven, but loose, and
        the last fields say what a search suggests.
    converged : bool
        Whether ``relative_gap ≤ tol``; never where ``scope`` is ``"estimated"``.
    bound : str
        How the largest singular value, or a ReLU's dual norm, was bounded.
    estimated_gap : float or None
        Of a ReLU: the relative gap if the search found the largest reward there is. Not proven.
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
        relative = _relative(self.gap, self.primal)
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
                "this reference does not say which problem it was certified for (it was made before certificates did), "
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
        """Plain values, for JSON."""
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


def _relative(gap: float, primal: float) -> float:
    """``gap / |primal|``, and where the objective is 0 nothing but a gap of 0 is small."""
    return gap / abs(primal) if primal else (0.0 if gap == 0 else math.inf)


def certify_atoms(
    problem: Problem,
    atoms: Atoms,
    beta: float,
    *,
    tol: float,
    known_dual: float = -math.inf,
    known_failure: float = 0.0,
    known_from: str = "",
    witness: Float[Tensor, "n r c"] | None = None,
    failure_probability: float = 1e-6,
    generator: torch.Generator | None = None,
    max_steps: int = 400,
    oracle: NormOracle | None = None,
    found: Callable[[Tensor], None] | None = None,
) -> Certificate:
    """Certificate of ``atoms`` for the convex program of ``problem`` at weight ``beta``.

    Parameters
    ----------
    problem : Problem
        Of any precision; the certificate is computed from its tokens in float64.
    tol : float
        The relative gap asked for: sets how hard σ is bounded, and `Certificate.converged`.
    known_dual, known_failure : float
        A lower bound on the optimum of this problem that was certified before, and its failure probability; the better
        bound is kept, and both failures are reported. The caller knows that the problem is the same
        (`Certificate.check_is_of`).
    known_from : str
        What `Certificate.bound` says where that bound is the better one; as for the other one where empty.
    witness : Tensor (n, r, c) or None
        Outputs at which the dual point is taken, any at all: a solver may know better ones than the model's own.
    failure_probability : float
        Of the bound on σ, over all blocks together.
    generator : torch.Generator or None
        Source of the random starts; a fresh, unpredictable one where None.
    oracle : NormOracle or None
        Of this problem with a ReLU, where one is at hand.
    found : callable (Tensor (j, N, m)) or None
        Told of the leading singular vectors that were found on the smaller side of the gradient matrices.
    """
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    check_loss(problem.loss, problem.Y)
    if math.isnan(known_dual):
        raise InputError("the lower bound that was passed is NaN")
    exact = problem.in_double(reuse=True)
    atoms = atoms.to(exact.device, torch.float64)
    if not torch.equal(atoms.V, exact.mask_values(atoms.V, atoms.block)):
        raise InputError("values are not zero outside the output group of their block")
    f = exact.outputs(atoms)
    if problem.head.learns_mixing:
        directions, sigma = exact.balance(atoms)
        penalty = float(sum(values.sum() for values in sigma))
    else:
        directions, penalty = atoms, exact.penalty(atoms)
    data_term = exact.data_term(f)
    primal = data_term + beta * penalty
    weights = float((atoms.U.unsqueeze(-1).flatten(1).norm(dim=1) * atoms.V.flatten(1).norm(dim=1)).sum())
    error = error_of_objective(exact, f, weights, len(atoms), abs(data_term) + beta * penalty)
    error += exact.rounding(atoms, f)
    if not math.isfinite(primal + error):
        raise InputError(
            f"the objective of this model is {primal}: its weights or the tokens are too large to compute with in "
            "float64; scale the tokens"
        )
    f = f if witness is None else witness.to(exact.device, torch.float64)
    if problem.fit_intercept:
        f = f + solve_intercept(exact, f)
    dual = DualPoint(exact, f, beta)
    R = dual.R

    slack, failure, reward = 0.0, 0.0, None
    if not problem.head.learns_mixing:
        best, how = dual.ridge(), "Frobenius norm"
    elif not dual.computable:
        best, how = dual.spectral(dual.size), "norms of tokens"
    elif not problem.activation.convex:
        oracle = oracle or NormOracle(exact)
        peaks = oracle.search(R, warm=directions, generator=generator, n_starts=32, iterations=15, rtol=1e-4)
        reward = oracle.bound(R, peaks, rtol=0.02 * tol)
        best, how = dual.spectral(reward.upper), reward.method
    else:
        G = GradientMatrices(exact, R)
        if worth_forming(G):
            best, how = dual.spectral(formed_norm(G)), "singular values"
        else:
            failure = failure_probability
            fast = GradientMatrices(problem, R.to(problem.dtype)) if dual.in_single_range else G
            bound = _KrylovBound(G, fast, directions, tol, failure, generator)
            enough, steps = False, 0
            while bound.step() and not enough and (steps := steps + 1) < max_steps:
                if bound.upper < math.inf:
                    reached = primal - dual.value(dual.largest(bound.upper)) <= tol * abs(primal)
                    hopeless = primal - dual.value(dual.largest(bound.floor)) > tol * abs(primal)
                    enough = reached or (hopeless and bound.upper <= 1.01 * bound.floor)
            best, how = dual.spectral(bound.upper), "Lanczos from random starts"
            if found is not None:
                found(bound.deflated.B if G.on_values else bound.deflated.A)
            slack = bound.upper / bound.lower - 1 if bound.lower > 0 else 0.0
    best = best if math.isfinite(best) else dual.value(0.0)
    if not math.isfinite(best):
        raise InputError(
            f"no finite bound on the optimum is known (objective {primal:g}, lower bound {best:g}): the weights or "
            "tokens are too large for float64, or the loss has no lower bound"
        )
    if known_dual > primal + error:
        raise InputError(
            f"the lower bound {known_dual:.10g} that was known before lies above the objective {primal:.10g} of these "
            "weights, so it is false: fit the reference again"
        )
    if reward is not None and best > primal + error:  # the model itself refutes the bound
        reward = replace(reward, upper=math.inf, refuted=True)
        best, how = dual.value(0.0), "none"
    if known_dual > best:
        best, how = known_dual, known_from or how
    best -= error
    if best > primal:
        raise InputError(
            f"no certificate can be given: by its conjugate the loss {type(problem.loss).__name__} is nowhere below "
            f"{best:.17g}, but the objective is {primal:.17g}; correct the conjugate"
        )
    gap = max(primal - best, 0.0)
    relative = _relative(gap, primal)
    scope = "global" if problem.masks is None else "sampled-gates"
    searched: dict[str, Any] = {}
    if reward is not None:
        if reward.refuted or (reward.loose and relative > tol):
            scope = "estimated"
        likely = max(dual.spectral(reward.lower) - error, best)
        searched = {
            "estimated_gap": max(primal - likely, 0.0) / abs(primal) if primal else 0.0,
            "ascents": reward.ascents,
            "refuted": reward.refuted,
            "rewards": [float(value) / beta for value in reward.peaks.distinct().values[:10]],
        }
    return Certificate(
        primal=primal,
        dual=best,
        gap=gap,
        relative_gap=relative,
        sigma_slack=slack,
        failure_probability=min(1.0, failure + known_failure),
        scope=scope,
        converged=relative <= tol and scope != "estimated",
        bound=", ".join(filter(None, (how, dual.assumed))),
        tol=float(tol),
        beta=problem.coordinates.user_beta(float(beta)),
        identity=problem.identity,
        **searched,
    )


class _KrylovBound:
    """Ever tighter bounds ``lower ≤ max_j ‖G_j‖₂ ≤ upper``, the upper one with a failure probability.

    Blocks that are known to lie below the largest lower bound are settled and cost nothing more.
    """

    def __init__(
        self,
        G: GradientMatrices,
        fast: GradientMatrices,
        directions: Atoms,
        tol: float,
        failure_probability: float,
        generator: torch.Generator,
    ) -> None:
        j = G.problem.n_blocks
        self.order, self.failure, self._generator = G.order, failure_probability / j / 2, generator
        self.lower, self.upper, self._settled = 0.0, math.inf, 0.0
        self._splits = 0
        self.floor = 0.0  # what `upper` cannot fall below, as far as this splitting of directions goes
        self.deflated = split_off_leading(G, fast, directions, extra=4, steps=12, generator=generator, rtol=0.1 * tol)
        # Many starts share one pass over the tokens; with many blocks a pass is full already.
        self._starts = min(4 if j == 1 else 2, G.order)
        self.krylov = self._krylov(torch.arange(j, device=G.R.device))

    def _krylov(self, blocks: Tensor) -> BlockKrylov:
        G = self.deflated.G
        start = G.random_start(blocks, self._starts, self._generator)
        return BlockKrylov(self.deflated.gram, start, blocks, G.order)

    def step(self) -> bool:
        """One Krylov step; False once nothing more can be learned."""
        if not len(self.krylov.blocks) or (self.krylov.steps and not self.krylov.can_step()):
            return False
        if self.krylov.steps >= ENOUGH_STEPS and self._splits < MOST_SPLITS:
            # What is left is about as large as the whole: what was found of it is split off too.
            self.deflated = split_off_more(self.deflated, self.krylov)
            self._splits += 1
            self.failure /= 2
            self.krylov = self._krylov(self.krylov.blocks)
        krylov = self.krylov
        krylov.step()
        found = krylov.values[:, -1].sqrt()
        if not bool(torch.isfinite(found).all()):
            return False  # comparisons with NaN would pass for a bound
        inner = self.deflated.inner[krylov.blocks]
        self.lower = max(self.lower, float(torch.maximum(inner, found).max()))
        self.floor = max(self._settled, float(self.deflated.norm(found, krylov.blocks).max()))
        # The caller may stop at any step that suits it, so all of them must hold at once: Σ_k 1/(k(k + 1)) = 1.
        share = self.failure / (krylov.steps * (krylov.steps + 1))
        epsilon = relative_slack(self.order, krylov.steps, krylov.starts, share)
        if epsilon < 1:
            upper = self.deflated.norm(found / math.sqrt(1 - epsilon), krylov.blocks)
            self.upper = min(self.upper, max(self._settled, float(upper.max())))
            unsettled = upper > self.lower
            if not unsettled.all():
                self._settled = max(self._settled, float(upper[~unsettled].max()))
                krylov.keep(unsettled)
        return True
