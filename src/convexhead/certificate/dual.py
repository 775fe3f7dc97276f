"""A residual as a dual point: feasible in exact arithmetic, up to amounts that are charged.

For any ``R_i = ω_i q_i / n``, ``q_i`` in the domain of ``ℓ*``, with ``Σ_i R_i = 0`` where there is an intercept and
``τ ‖𝒜_j*(R)‖₂ ≤ β`` for every block, ``P* ≥ D(τ) = −(1/n) Σ_i ω_i ℓ*(τ q_i, y_i)``. A residual in float64 is such a
point only up to rounding, and what is computed from it is rounded again. With the unit roundoff ``u = 2⁻⁵³`` and
``a_i`` such that ``‖P mix(X_i, U)‖_F ≤ a_i ‖U‖_F`` (`Head.mix_bound`):

* **The gradient matrix.** An entry is a sum of products in a chain of at most ``K`` operations, and the same chain of
  absolute values has a norm of at most ``S = Σ_i a_i ‖R_i‖_F``. So ``𝒜*(R)``, and its product with a unit vector, is
  computed to within ``K u S``, however much of it cancels: ``σ`` is raised by that. ``S ≥ σ`` is itself a bound, and
  the one that is used where squares of ``S`` would leave the range of float64. Krylov spaces, which are
  reorthogonalised, take such errors as a perturbation of the operator of this size.
* **The intercept.** ``q`` is replaced by ``Loss.without_sum(q)``, a point in the domain of ``ℓ*`` whose sum is 0
  but for rounding: ``|Σ_i ω_i q_ik| ≤ left_k``. In exact arithmetic the same map takes it to a point whose sum *is* 0,
  at a distance ``Σ_i ‖·‖ ≤ Σ_k left_k``. That point is the one that is certified: ``σ`` is raised by
  ``max_i a_i Σ_k left_k / n`` and ``D`` lowered by `Loss.cost_of_sum`. The intercept itself needs no bound: it may be
  as far away as it likes.
* **Sums over samples** are made in cascades, in which a term passes through few additions: `summing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial

import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor

from convexhead.program.linear_passes import LinearPasses
from convexhead.program.losses import Loss
from convexhead.program.operator import GRADIENT_BYTES
from convexhead.program.problem import Problem
from convexhead.program.sample_losses import pairwise_additions
from convexhead.runtime.samples import BATCH_BYTES

CLOSE = 1e-4
"""Relative step below the largest scaling τ. If ``D`` rises over this step, the largest τ is taken. Chosen by hand: any
τ gives a bound."""
PROBE = 0.01
"""Distance from ``τ = 1`` at which the curvature of ``D`` is measured first. Chosen by hand: any τ gives a bound."""
FAR = 0.5
"""Scaling τ below which τ = 0 is tried as well. Chosen by hand: any τ gives a bound."""
FOUND = 1e-6
"""Distance between two guesses of the best τ at which both are good enough. Chosen by hand."""
GUESSES = 8
"""Largest number of guesses near ``τ = 1``; then the whole interval is searched. Chosen by hand."""
DECOMPOSED = 1e-9
"""Relative amount by which σ is raised to cover rounding in decompositions, at most. Derived: ``u`` times the order of
a matrix; of small ones `rounding_of_norm` knows more."""
INSIDE = 1 - 1e-12
"""Share of the largest scaling in the domain of ``ℓ*`` that is used. Derived: rounding moves the point by less."""
NO_SUM = 1e-15
"""Sum of a residual, a sample, that is as good as none. Derived: units of rounding; what is left is charged."""
INTERCEPT_BOX = 1e4
"""Bound on ``|b_k|``, in units of ``1 + max |y|``, that is assumed where a loss cannot give a residual without sum."""
RANGE = 1e140
"""Largest norm of a gradient matrix, and inverse of the smallest. Derived: squares must not leave float64."""
UNIT = torch.finfo(torch.float64).eps / 2
"""``u``, the relative error of one operation in float64."""


def summing(n: int) -> float:
    """Bound the additions that a term of a sum of ``n`` passes through in torch's cascades of four levels."""
    return 8 * n**0.25 + 16


def chain(problem: Problem) -> float:
    """Return ``K``, the operations that a term passes through into an entry of ``𝒜*(R)`` or of the outputs.

    A pass sums the rows of a batch in any order, then the batches. A transform over the grid takes fewer operations
    than a sum over the tokens.
    """
    head, n = problem.head, problem.n
    batch = max(BATCH_BYTES[problem.device.type], GRADIENT_BYTES[problem.device.type]) // 8
    rows = min(n * head.r, max(batch, head.least_batch * head.r))
    # Softmax residuals do not sum to 0 over the classes but for rounding, relative to a 1-norm.
    classes = math.sqrt(problem.c) * summing(problem.c)
    operations = problem.ranks.largest(problem.operator.samples.operations)[0]
    return rows + n + operations + 2 * problem.c + classes + 64


class DualPoint:
    """The residual at outputs ``f`` as a dual point, and ``D(τ)`` with all charges.

    Parameters
    ----------
    problem : Problem
        In float64.
    f : Tensor (n, r, c)
        Outputs, with an intercept that nearly makes ``Σ_i R_i = 0`` where the problem has one. Any will do.
    beta : float
    q : Tensor (n, r, c) or None
        ``∇ℓ(f_i, y_i)``, where it is known: the array is taken over, since large ones are what takes memory here.

    Attributes
    ----------
    R : Tensor (n, r, c)
        ``ω q / n``.
    size : float
        ``S = Σ_i a_i ‖R_i‖_F``, a bound on every ``‖𝒜_j*(R)‖_F``.
    assumed : str
        What the bound assumes beyond arithmetic; empty as a rule.
    """

    def __init__(
        self, problem: Problem, f: Float[Tensor, "n r c"], beta: float, q: Float[Tensor, "n r c"] | None = None
    ) -> None:
        self.problem, self.beta, self.assumed = problem, beta, ""
        losses = problem.losses
        q = problem.dual_point(f) if q is None else q
        self._left, self._box, left, limit = q.new_zeros(problem.c), 0.0, 0.0, None
        self._means: dict[float, float] = {}
        if problem.fit_intercept:
            self._targets, self._total = problem.target_sums
            excess = self._without_sum(q)
            within = min(losses.at(rows).scale_limit(q[rows]) for rows in problem.rows)
            within = -problem.ranks.largest(-within)[0]
            first = min(1.0, within) * INSIDE
            mean = problem.mean_of(lambda losses, x: losses.conjugate(first * x), q)
            if math.isfinite(mean):
                self._means[first] = mean
                self._left, limit = self._left_of(q, excess), within
            else:
                q = problem.dual_point(f)
                box = INTERCEPT_BOX * (1 + problem.largest_target)
                self._box = box * float(self._left_of(q, self._sum(q)).sum()) / problem.n
                self.assumed = f"for intercepts of at most {box:.0e}"
            left = float(self._left.sum()) / problem.n
        if limit is None:
            limit = self._limit(f, q)
        self.domain = -problem.ranks.largest(-limit)[0] * INSIDE
        g, spread = losses.weigh(q), self._largest(q)
        pairing = torch.stack([(g[rows] * losses.at(rows).Y).abs().sum() for rows in problem.rows]).sum()
        self._q = None if losses.weights is None else q  # else n R says it
        self.R = g.div_(problem.n)
        a = problem.operator.samples.mix_bounds
        size = (a * torch.linalg.vector_norm(self.R, dim=(1, 2))).sum()
        size, pairing = problem.sum(torch.stack([size, pairing]))[0].tolist()
        self.size = size * (1 + 1e-9)
        most, largest, far = problem.ranks.largest(float(a.max()), spread, self._largest(f))
        self._most = most
        tiny = torch.finfo(torch.float64).tiny
        self.raised = chain(problem) * (UNIT * self.size + tiny) + most * left
        self._pairing = pairing / problem.n
        self._reach = far + problem.largest_target + 2 * largest
        # D'(1) is −Σ ⟨∇ℓ*(n R_i), R_i⟩, and f_i a gradient of ℓ* at ∇ℓ(f_i): only where to search depends on it.
        slope = torch.stack([(f[rows] * self.R[rows]).sum() for rows in problem.rows]).sum()
        self._slope = -float(problem.sum(slope)[0])
        self._values: dict[float, float] = {}

    def _limit(self, f: Tensor, q: Tensor) -> float:
        """The largest known ``τ ≥ 1`` with ``τ q`` in the domain of ``ℓ*``, ``q`` the residual at ``f``."""
        losses, rows = self.problem.losses, self.problem.rows
        if type(self.problem.loss).scaled_domain is Loss.scaled_domain:  # it would make ∇ℓ(f) again
            return max(1.0, min(losses.at(part).scale_limit(q[part]) for part in rows))
        return min(losses.at(part).scaled_domain(f[part]) for part in rows)

    def _largest(self, x: Float[Tensor, "n r c"]) -> float:
        """``max |x|`` of this process."""
        return float(torch.stack([torch.stack(x[rows].aminmax()) for rows in self.problem.rows]).abs().max())

    def _sum(self, q: Tensor) -> Float[Tensor, " c"]:
        """``Σ ω q``."""
        return self.problem.sum(self.problem.losses.summed(q))[0]

    def _without_sum(self, q: Tensor) -> Float[Tensor, " c"]:
        """Move ``q`` in place to a point nearby whose sum is 0 but for rounding; return that sum."""
        problem, excess = self.problem, self._sum(q)
        for _ in range(2):  # once more for what the first time was rounded, where that is much
            if float(excess.abs().sum()) <= NO_SUM * problem.n:
                break
            for rows in problem.rows:
                y = problem.losses.at(rows).Y
                q[rows] = problem.loss.without_sum(q[rows], y, excess, self._targets, self._total)
            excess = self._sum(q)
        return excess

    def _left_of(self, q: Tensor, excess: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
        """A bound on ``|Σ_i ω_i q_ik|``, computed as ``excess``, in exact arithmetic, after rows have been made to sum
        to 0 where they must."""
        problem, losses = self.problem, self.problem.losses
        sizes = torch.stack([losses.at(rows).summed(q[rows].abs()) for rows in problem.rows])
        (size,) = problem.sum(sizes.sum(0) * (1 + 1e-9))
        levels = pairwise_additions(problem.n * problem.head.r) + 4 + problem.ranks.size
        rows = (summing(problem.c) + 16) * size.sum() * (size > 0)
        return excess.abs() + UNIT * (levels * size + rows)

    @cached_property
    def computable(self) -> bool:
        """Whether gradient matrices, and their squares, are in the range of float64; else there is only `size`."""
        return 1 / RANGE < self.size < RANGE

    @cached_property
    def in_single_range(self) -> bool:
        """Whether squares of gradient matrices, and products on the way to them, are in the range of float32."""
        return 1e-15 < self.size < 1e15 and self._most < 1e30

    def value(self, tau: float) -> float:
        """``D(τ)`` less all charges but that for the gradient matrix; ``−∞`` where it is not a number."""
        if tau not in self._values:
            self._values[tau] = self._value(tau)
        return self._values[tau]

    def _value(self, tau: float) -> float:
        problem, cost = self.problem, 0.0
        mean = self._means.get(tau)
        if mean is None:
            point, scale = (self.R, tau * problem.n) if self._q is None else (self._q, tau)
            mean = problem.mean_of(lambda losses, x: losses.conjugate(scale * x), point)
        if problem.fit_intercept:
            left, reach = tau * self._left, self._reach
            cost = problem.loss.cost_of_sum(left, self._targets, self._total, abs(mean), reach, problem.n)
        rounding = UNIT * (64 + 2 * summing(problem.n) + problem.head.r * problem.c)
        value = -mean - cost - tau * self._box - rounding * (abs(mean) + tau * self._pairing)
        return value if math.isfinite(value) else -math.inf

    def bound(self, sigma: float, rounded: float = DECOMPOSED) -> float:
        """Bound ``max_j ‖𝒜_j*(R)‖₂`` if it was computed as ``sigma``; ``∞`` if that is no number.

        ``rounded``: relative amount by which the decomposition of what was formed may have missed.
        """
        raised = sigma * (1 + min(rounded, DECOMPOSED)) + self.raised
        return raised if math.isfinite(raised) else math.inf

    def largest(self, sigma: float) -> float:
        """Return the largest ``τ ≤ 1`` with ``τ σ ≤ β`` in the domain."""
        return min(1.0, self.domain, self.beta / self.bound(sigma))

    def spectral(self, sigma: float, rounded: float = DECOMPOSED) -> float:
        """``max_τ D(τ)`` over ``τ σ ≤ β``; ``rounded`` as in `bound`."""
        return self._best(min(self.domain, self.beta / self.bound(sigma, rounded)))

    def ridge(self, enough: float = math.inf) -> float:
        """``max_τ D(τ) − τ² ‖𝒜*(R)‖²_F / (2β)``, or what it is where ``τ`` is nearly 1 if that is ``enough``."""
        norm = self.size
        if self.computable:
            norm = float(LinearPasses(self.problem).adjoint(self.R)[:, :-1].norm())
        norm = self.bound(norm)
        for tau in self._means:  # where the conjugate is known already
            if tau <= self.domain and (value := self._penalised(tau, norm)) >= enough:
                return value
        return self._best(self.domain, norm)

    def _penalised(self, tau: float, norm: float) -> float:
        """``φ(τ) = D(τ) − τ² norm² / (2β)``."""
        result = self.value(tau) - (tau * norm) * (tau * norm) / (2 * self.beta)
        return result if math.isfinite(result) else -math.inf

    def _best(self, limit: float, norm: float = 0.0) -> float:
        """The best ``φ(τ)`` at any τ up to ``limit`` and 2: each is a valid bound, the search only a choice. ``φ`` is
        concave, as a rule."""
        value = partial(self._penalised, norm=norm)
        top, slope = min(limit, 2.0), self._slope - norm * norm / self.beta
        if not top > 0:
            return value(0.0)
        if top <= 1 and slope >= 0 and value(top) > -math.inf:
            return value(top)  # it rises all the way
        near = _near_one(value, slope, top) if top > 1 or (top == 1 and slope < 0) else None
        if near is not None:
            return near
        end = value(top)
        if end > value((1 - CLOSE) * top):
            return end  # rising at the end: what lies between is hardly better
        found = minimize_scalar(
            lambda tau: min(-value(tau), 1e300), bounds=(0.0, top), method="bounded", options={"maxiter": 20}
        )
        return max(end, value(min(1.0, top)), -float(found.fun), value(0.0))


def _near_one(value: Callable[[float], float], slope: float, top: float) -> float | None:
    """Return the largest ``φ(τ)`` for ``0 ≤ τ ≤ top`` if it is found near 1, where ``φ' = slope``.

    The next guess is the maximum of ``φ(1) + slope h + a h² + b h³``, ``h = τ − 1``, through the last two guesses.
    """
    one = value(1.0)
    tau = min(1 + math.copysign(PROBE, slope), top)
    h, rest, b = 0.0, 0.0, 0.0
    for _ in range(GUESSES):
        last_h, last_rest = h, rest
        h = tau - 1
        rest = (value(tau) - one - slope * h) / (h * h)  # a + b h
        if last_h:
            b = (rest - last_rest) / (h - last_h)
        a = rest - b * h
        under = a * a - 3 * b * slope
        if not (a < 0 and 0 <= under < math.inf):  # far from a concave cubic, or outside the domain
            return None
        guess = min(max(1 + slope / (math.sqrt(under) - a), 0.0), top)
        if min(abs(guess - tau), abs(guess - 1)) <= FOUND:
            # Where norm² / β is huge the best τ is tiny, and "near" in τ is not near in φ.
            return max(one, value(tau), value(0.0)) if tau < FAR else max(one, value(tau))
        tau = guess
    return None


def error_of_objective(
    problem: Problem,
    f: Float[Tensor, "n r c"],
    q: Float[Tensor, "n r c"],
    weights: float,
    atoms: int,
    terms: float,
) -> float:
    """Bound how far the computed objective may be from the true one.

    Outputs are computed to within ``δ_i = K u (a_i Σ_k ‖U_k‖‖V_k‖ + max |f_i|)``, and the losses have curvature at
    most 1: ``ℓ(f_i + δ) ≤ ℓ(f_i) + ⟨∇ℓ(f_i), δ⟩ + ½ ‖δ‖²``. Of a loss of the user's own that is an assumption.

    Parameters
    ----------
    f, q : Tensor (n, r, c)
        The model's outputs and ``∇ℓ(f_i, y_i)``.
    weights : float
        ``Σ_k ‖U_k‖‖V_k‖``.
    atoms : int
        How many there are.
    terms : float
        The sum of the objective's terms, none of which is negative.
    """
    head = problem.head
    operations = problem.operator.samples.operations + atoms * head.terms + 64
    mixed = problem.operator.samples.mix_bounds * weights if weights else 0.0  # bounds may be infinite
    delta = operations * UNIT * (mixed + torch.maximum(f.amax((1, 2)), -f.amin((1, 2))))
    slope = torch.linalg.vector_norm(problem.losses.weigh(q), 1, dim=(1, 2))
    propagated = problem.mean(delta * slope + problem.losses.largest * head.r * problem.c / 2 * delta.square())
    own = UNIT * (64 + 2 * summing(problem.n) + head.r * problem.c + 8 * atoms)
    return propagated + own * terms
