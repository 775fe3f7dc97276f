"""Compute a certificate: in float64, and whatever solver the model comes from.

Fenchel duality: for any weights, with ``R_i = ∇ℓ(f_i, y_i)/n`` and ``σ = max_j ‖𝒜_j*(R)‖₂``,

    P* ≥ D(τ) = −(1/n) Σ_i ℓ*(n τ R_i, y_i)      for every  0 ≤ τ ≤ β/σ  that stays in the domain of ℓ*

and ``gap = P − max_τ D(τ)``. For a ReLU ``σ`` is the dual norm ``h(R)`` (`convexhead.dual_norm.norm`), and for an
attentive head whose queries were searched it is that over their ball (`convexhead.dual_norm.query_bound`). Three things
must be honest about it.

* ``σ`` is bounded from *above*: by a decomposition where the gradient matrix is small, or cheap to form; else up to a
  failure probability (`convexhead.certificate.spectral_bound`).
* An unpenalised intercept needs ``Σ_i R_i = 0``: the residual is projected, and what rounding left is charged.
* Rounding: ``σ`` is raised and ``D`` lowered by more than float64 can have lost (`convexhead.certificate.dual`).

No solver is imported here, and no solver imports this: what both need is in `convexhead.linalg` and
`convexhead.dual_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.certificate.certificate import Certificate, relative_to
from convexhead.certificate.dual import DECOMPOSED, DualPoint, error_of_objective
from convexhead.certificate.spectral_bound import KrylovBound
from convexhead.dual_norm.norm import DualNorm, NormOracle
from convexhead.dual_norm.query_ascent import STARTS, QueryMaxima, price
from convexhead.dual_norm.query_bound import MAX_KEYS, largest_reward
from convexhead.errors import InputError
from convexhead.linalg.gradient_matrices import GradientMatrices, formed_norm, rounding_of_norm, worth_decomposing
from convexhead.program.atoms import Atoms
from convexhead.program.heads.query_ball import QueryBall
from convexhead.program.heads.token_draw import TokenDraw
from convexhead.program.intercept import improve_intercept, solve_intercept
from convexhead.program.linear_passes import LinearPasses, as_matrix
from convexhead.program.loss_check import check_loss
from convexhead.program.problem import Problem
from convexhead.runtime.clock import never

ENOUGH = 1 - 1e-9
"""Share of β below which a bound on rewards is as good as any. Derived: it covers the rounding that is charged."""
BEST = 4
"""Queries found by ascents that branch and bound begins with. Chosen by hand."""


@dataclass(frozen=True)
class Evaluated:
    """A model evaluated in float64.

    Attributes
    ----------
    outputs, gradients : Tensor (n, r, c)
        ``f_i`` and ``∇ℓ(f_i, y_i)``.
    directions : Atoms
        The model, balanced.
    primal : float
        ``P``.
    error : float
        How far ``primal`` may be from the true objective, in the user's coordinates too.
    """

    outputs: Float[Tensor, "n r c"]
    gradients: Float[Tensor, "n r c"]
    directions: Atoms
    primal: float
    error: float

    def without_outputs(self) -> Evaluated:
        """The same without its arrays of outputs."""
        return replace(self, outputs=self.outputs.new_empty(0, 0, 0), gradients=self.gradients.new_empty(0, 0, 0))

    @classmethod
    def of(cls, exact: Problem, atoms: Atoms, beta: float) -> Evaluated:
        """Evaluate ``atoms`` for a problem in float64."""
        atoms = atoms.to(exact.device, torch.float64)
        if not torch.equal(atoms.V, exact.mask_values(atoms.V, atoms.block)):
            raise InputError("values are not zero outside the output group of their block")
        if exact.head.learns_mixing:
            f = exact.outputs(atoms)
            directions, sigma = exact.balance(atoms)
            penalty = float(sum(values.sum() for values in sigma))
        else:
            if len(atoms) != 1 or float(atoms.U) != 1:
                raise InputError("a linear head has one value weight, and its mixing weight is 1: these are others")
            f = LinearPasses(exact).outputs(as_matrix(atoms))
            directions, penalty = atoms, exact.penalty(atoms)
            if exact.operator.samples.recent is not None:
                exact.operator.samples.recent.keep(atoms, f)
        data_term = exact.data_term(f)
        primal = data_term + beta * penalty
        weights = float((atoms.U.unsqueeze(-1).flatten(1).norm(dim=1) * atoms.V.flatten(1).norm(dim=1)).sum())
        q = exact.dual_point(f)
        error = error_of_objective(exact, f, q, weights, len(atoms), abs(data_term) + beta * penalty)
        error += exact.rounding(atoms, f)
        if not math.isfinite(primal + error):
            raise InputError(
                f"the objective of this model is {primal}: its weights or the tokens are too large to compute with in "
                "float64; scale the tokens"
            )
        return cls(f, q, directions, primal, error)


@dataclass(frozen=True)
class LowerBound:
    """A lower bound on the optimum, and how it was had: see the fields of `Certificate`.

    Attributes
    ----------
    norm : DualNorm or None
        Of a ReLU: what is proven of the dual norm, and what a search found.
    """

    value: float
    how: str
    slack: float = 0.0
    failure: float = 0.0
    norm: DualNorm | None = None


def certify_atoms(
    problem: Problem,
    atoms: Atoms,
    beta: float,
    *,
    tol: float,
    known_dual: float = -math.inf,
    known_failure: float = 0.0,
    known_from: str = "",
    dual_point: Float[Tensor, "n r c"] | None = None,
    failure_probability: float = 1e-6,
    generator: torch.Generator | None = None,
    max_steps: int = 400,
    oracle: NormOracle | None = None,
    late: Callable[[], bool] = never,
    found: Callable[[Tensor], None] | None = None,
) -> Certificate:
    """Certify ``atoms`` for the convex program of ``problem`` at weight ``beta``.

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
    dual_point : Tensor (n, r, c) or None
        Outputs at which the dual point is taken, any at all: a solver may know better ones than the model's own.
    failure_probability : float
        Of the bound on σ, over all blocks together.
    generator : torch.Generator or None
        Source of the random starts; a fresh, unpredictable one where None.
    max_steps : int
        Krylov steps of that bound, at most.
    oracle : NormOracle or None
        Of this problem with a ReLU, where one is at hand.
    late : callable () -> bool
        Whether to end the search for the bound of a ReLU.
    found : callable (Tensor (j, N, m)) or None
        Told of the leading singular vectors that were found on the smaller side of the gradient matrices.
    """
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    check_loss(problem.loss, problem.targets)
    if math.isnan(known_dual):
        raise InputError("the lower bound that was passed is NaN")
    # The linear head takes two passes: a copy in float64 would be twice the features, unless it pools many tokens.
    exact = problem.astype(torch.float64, reuse=problem.head.learns_mixing or problem.head.s > 1)
    if not problem.head.learns_mixing:
        exact = exact.class_by_class()  # as its outputs lie
    model = Evaluated.of(exact, atoms, beta)
    if not problem.head.learns_mixing:
        dual, own = _frobenius(exact, model, dual_point, beta, tol)
        return _certificate(
            problem, beta, tol, model, dual, _best(exact, model, dual, own, known_dual, known_from), known_failure
        )
    f, q = model.outputs, model.gradients if dual_point is None and not problem.fit_intercept else None
    model = model.without_outputs()  # of many samples these arrays are what takes memory
    if dual_point is not None:
        f = dual_point.to(exact.device, torch.float64)
    if problem.fit_intercept:
        f = f + solve_intercept(exact, f)
    dual = DualPoint(exact, f, beta, q)
    del f, q
    ball = problem.head.ball
    if ball is not None and dual.computable:
        own = _over_ball(exact, dual, ball, tol, generator, late)
    elif problem.activation.convex and dual.computable:
        own = _spectral(problem, model, dual, tol, failure_probability, max_steps, generator, found)
    else:
        own = _other(exact, model, dual, tol, generator, oracle, late)
    bound = _best(exact, model, dual, own, known_dual, known_from)
    return _certificate(problem, beta, tol, model, dual, bound, known_failure)


def _frobenius(
    exact: Problem, model: Evaluated, dual_point: Float[Tensor, "n r c"] | None, beta: float, tol: float
) -> tuple[DualPoint, LowerBound]:
    """From the norm of the gradient of a linear head, at the outputs given or its own, with a better intercept.

    Arrays of outputs are what takes memory here: the model's own are moved in place, and are not its outputs any more.
    """
    enough = model.primal - model.error - tol * abs(model.primal)
    f, q = model.outputs, model.gradients
    if dual_point is not None:
        f = dual_point.to(exact.device, torch.float64, copy=True)
        q = exact.dual_point(f)
    if exact.fit_intercept:
        improve_intercept(exact, f, q)
    dual = DualPoint(exact, f, beta, q)
    value = dual.ridge(enough)
    if not exact.fit_intercept:
        return dual, LowerBound(value, "Frobenius norm")
    if not value >= enough:
        other = DualPoint(exact, f + solve_intercept(exact, f), beta)
        if (better := other.ridge()) > value:
            dual, value = other, better
    return dual, LowerBound(value, "Frobenius norm")


def _spectral(
    problem: Problem,
    model: Evaluated,
    dual: DualPoint,
    tol: float,
    failure_probability: float,
    max_steps: int,
    generator: torch.Generator,
    found: Callable[[Tensor], None] | None,
) -> LowerBound:
    """From the largest singular value of gradient matrices, decomposed or not."""
    G = GradientMatrices(dual.problem.operator, dual.R)
    if worth_decomposing(G):
        rounded = rounding_of_norm(G.p, G.q) if dual.R.device.type == "cpu" else DECOMPOSED
        return LowerBound(dual.spectral(formed_norm(G), rounded), "singular values")
    fast = GradientMatrices(problem.operator, dual.R.to(problem.dtype)) if dual.in_single_range else G
    bound = KrylovBound(G, fast, model.directions, tol, failure_probability, generator)
    primal, enough, steps = model.primal, False, 0
    while bound.step() and not enough and (steps := steps + 1) < max_steps:
        if bound.upper < math.inf:
            reached = primal - dual.value(dual.largest(bound.upper)) <= tol * abs(primal)
            hopeless = primal - dual.value(dual.largest(bound.floor)) > tol * abs(primal)
            enough = reached or (hopeless and bound.upper <= 1.01 * bound.floor)
    if found is not None:
        found(bound.deflated.B if G.on_values else bound.deflated.A)
    slack = bound.upper / bound.lower - 1 if bound.lower > 0 else 0.0
    return LowerBound(dual.spectral(bound.upper), "Lanczos from random starts", slack, failure_probability)


def _over_ball(
    exact: Problem,
    dual: DualPoint,
    ball: QueryBall,
    tol: float,
    generator: torch.Generator,
    late: Callable[[], bool],
) -> LowerBound:
    """Over all queries of a ball: ascents search the largest reward, and where keys are few branch and bound proves it.

    Else norms of tokens prove a bound, and what the ascents find suggests a better one.
    """
    assert exact.head.queries is not None
    z, place = ball.coordinates(exact.head.queries)
    own = QueryMaxima(torch.zeros(len(z), dtype=torch.float64), z, place, ball.radius)
    draw = TokenDraw.of(exact.operator.X, ranks=exact.ranks)
    maxima = price(exact.operator, ball, dual.R, own, draw, generator, starts=STARTS, late=late)
    norm = DualNorm(dual.size, "norms of tokens", maxima, len(z) + STARTS)
    if 0 < ball.basis.shape[1] <= MAX_KEYS and exact.ranks.size == 1:
        proof = largest_reward(
            exact.operator.tokens(),
            dual.R[:, 0],
            ball.basis,
            ball.radius,
            places=None if ball.grid is None else ball.log_weights(torch.arange(ball.n_places)),
            starts=maxima.z[:BEST],
            rtol=0.1 * tol,
            enough=dual.beta * ENOUGH,
            late=late,
        )
        if proof.upper < norm.upper:
            found = QueryMaxima(
                torch.tensor([proof.lower]).double(), proof.z.unsqueeze(0), torch.tensor([proof.place]), ball.radius
            )
            norm = DualNorm(proof.upper, "branch and bound over queries", found.merge(maxima).sorted(), norm.ascents)
    return LowerBound(dual.spectral(norm.upper), norm.method, norm=norm)


def _other(
    exact: Problem,
    model: Evaluated,
    dual: DualPoint,
    tol: float,
    generator: torch.Generator,
    oracle: NormOracle | None,
    late: Callable[[], bool],
) -> LowerBound:
    """Of a ReLU, and of gradients that are out of the range of float64."""
    if not dual.computable:
        return LowerBound(dual.spectral(dual.size), "norms of tokens")
    oracle = oracle or NormOracle(exact, late=late)
    R, warm = dual.R, model.directions
    maxima = oracle.search(R, warm=warm, generator=generator, n_starts=32, iterations=15, rtol=1e-4, late=late)
    norm = oracle.bound(R, maxima, rtol=0.02 * tol, late=late)
    return LowerBound(dual.spectral(norm.upper), norm.method, norm=norm)


def _best(
    exact: Problem, model: Evaluated, dual: DualPoint, own: LowerBound, known_dual: float, known_from: str
) -> LowerBound:
    """The better of a certificate's own bound and the one known before, less what rounding may have lost.

    Raises
    ------
    InputError
        The objective itself shows that a bound is false, or there is none.
    """
    primal, error = model.primal, model.error
    value, how, norm = own.value, own.how, own.norm
    value = value if math.isfinite(value) else dual.value(0.0)
    if not math.isfinite(value):
        raise InputError(
            f"no finite bound on the optimum is known (objective {primal:g}, lower bound {value:g}): the weights or "
            "tokens are too large for float64, or the loss has no lower bound"
        )
    if known_dual > primal + error:
        raise InputError(
            f"the lower bound {known_dual:.10g} that was known before lies above the objective {primal:.10g} of these "
            "weights, so it is false: fit the reference again"
        )
    if norm is not None and value > primal + error:  # the model itself refutes the bound
        norm = replace(norm, upper=math.inf, refuted=True)
        value, how = dual.value(0.0), "none"
    if known_dual > value:
        value, how = known_dual, known_from or how
    value -= error
    if value > primal:
        raise InputError(
            f"no certificate can be given: by its conjugate the loss {type(exact.loss).__name__} is nowhere below "
            f"{value:.17g}, but the objective is {primal:.17g}; correct the conjugate"
        )
    return replace(own, value=value, how=how, norm=norm)


def _certificate(
    problem: Problem,
    beta: float,
    tol: float,
    model: Evaluated,
    dual: DualPoint,
    bound: LowerBound,
    known_failure: float,
) -> Certificate:
    """What is known, in the fields of a certificate."""
    primal, norm = model.primal, bound.norm
    gap = max(primal - bound.value, 0.0)
    relative = relative_to(gap, primal)
    scope = problem.head.scope if problem.operator.masks is None else "sampled-gates"
    searched: dict[str, Any] = {}
    if norm is not None:
        if norm.refuted or (norm.loose and relative > tol):
            scope = "estimated"
        likely = max(dual.spectral(norm.lower) - model.error, bound.value)
        searched = {
            "estimated_gap": max(primal - likely, 0.0) / abs(primal) if primal else 0.0,
            "ascents": norm.ascents,
            "refuted": norm.refuted,
            "rewards": [float(value) / beta for value in norm.maxima.distinct().values[:10]],
        }
    return Certificate(
        primal=primal,
        dual=bound.value,
        gap=gap,
        relative_gap=relative,
        sigma_slack=bound.slack,
        failure_probability=min(1.0, bound.failure + known_failure),
        scope=scope,
        converged=relative <= tol and scope != "estimated",
        bound=", ".join(filter(None, (bound.how, dual.assumed))),
        tol=float(tol),
        beta=problem.coordinates.user_beta(float(beta)),
        identity=problem.identity,
        **searched,
    )
