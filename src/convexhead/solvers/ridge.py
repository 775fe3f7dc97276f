"""The linear head: one smooth, strongly convex problem, by Newton's method on a path of falling β.

    minimise  P(W, b) = F(X W + b) + (β/2) ‖W‖²

Far from the optimum Newton's steps are long and wrong: a sample that is misclassified with certainty has no curvature.
Near it they are all that is needed. So the method starts at a larger β, where the optimum is near, and follows it.
Products with ``X`` are the price: one for each product with the Hessian, half a one for a gradient, and none in a line
search, where outputs are known on the whole plane that is searched. Hessians need only be about right: where the
hardware multiplies bfloat16 faster, their products are made in it for as long as the gap falls fast, and the Hessian's
condition number allows it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.dual_norm.norm import NormOracle
from convexhead.program.atoms import Atoms
from convexhead.program.linear_passes import LinearPasses, Weights, as_atoms, as_matrix
from convexhead.program.losses import CrossEntropy
from convexhead.program.problem import Problem
from convexhead.solvers.base import Solver, Stop
from convexhead.solvers.factored import FactoredDescent
from convexhead.solvers.linear_curvature import BlockCurvature, LinearCurvature
from convexhead.solvers.monitor import State
from convexhead.solvers.span import Span

FALL = 10.0
"""Factor by which β falls, and the gap, in units of the objective, that β starts at. Chosen by hand."""
NEAR = 1.0
"""Relative gap at which β falls. Chosen by hand: the optimum at the next β is another one anyhow."""
FORCING = 0.3
"""Largest residual of a Newton system, relative to the gradient, in the norm of the preconditioner. Chosen by hand."""
REACHED = 0.6
"""Share of the gap asked for at which the residual of a Newton system is small enough, in float32: what is left of it
in the weights, and in an intercept, whose curvature is about the mean. Chosen by hand: the losses are not quadratic. In
float64 systems are solved as far as Newton's method gains by it."""
PRODUCTS = 500
"""Largest number of products with one Hessian. Chosen by hand: on nearly separable classes hundreds are needed."""
WIDEST = 8192
"""Channels up to which their second moments are formed and factored; beyond it their diagonal must do."""
BEYOND, CHEAP = 1e-3, 20
"""Gap at which steps in float64 end, in units of that asked for, where the last one took at most so many products.
Chosen by hand: weights are off by its root, and another step costs little."""
ROUNDED = 1e-4
"""Relative gap below which rounding may be why a step finds nothing lower. Chosen by hand."""
CHECK_EVERY = 5
"""Steps of L-BFGS between two looks at the gap. Chosen by hand."""
IDLE = 20
"""Looks in a row that find neither a lower objective nor a smaller gap, after which rounding is all that moves. Chosen
by hand."""
UNSURE = 10
"""Newton steps in a row, in float32 and at one β, that find no smaller gap: rounding turns them. Chosen by hand."""
FALLS = 3.0
"""Factor by which the gap must fall in a step near the optimum, or its products are no longer made in bfloat16. Chosen
by hand."""
MOST_SPREAD = 1e5
"""Condition number with which products in bfloat16 are near enough. Chosen by hand."""
BENT = 10.0
"""Gap that a step leaves where the objective fell by another amount than the quadratic model did, in units of the
square of their difference, over what the model fell by. Chosen by hand: measured 1 to 6."""
UNEVEN = 0.1
"""Square of the mean of features weighted by curvature, in units of their second moments, above that of their mean.
Chosen by hand: measured 0.07 to 0.13 on features of images."""
AGREES = 0.8
"""Share of the decrease of the quadratic model above which a step needs no search. Chosen by hand."""


@dataclass(frozen=True)
class _System:
    """What solving a Newton system gave.

    Attributes
    ----------
    x : Tensor (c, d + 1)
        ``Δ``.
    outputs : Tensor (n, r, c)
        Its own, in the room of the passes: until the next gradient.
    promised : float
        What the quadratic model falls by.
    left : float
        The gap that the model has after it; ∞ where products in bfloat16 do not tell.
    """

    x: Weights
    outputs: Float[Tensor, "n r c"]
    promised: float
    left: float


class RidgeNewton(Solver):
    """Newton's method with conjugate gradients, outputs ``f`` and ``∇F = Xᵀ R`` at hand.

    1. Choose the first weight ``β_s = 10ᵏ β``, the smallest whose gap is at most ten times the objective, or that for
       which the weights at the start are the best multiple of themselves, where that is less.
    2. Make the gradient. The gap is ``‖∇_W‖²/(2β)``, but for what the intercept leaves; stop where it is small. While
       it is small for ``β_s > β``, let ``β_s`` fall.
    3. Solve ``∇²P Δ = −∇P`` by conjugate gradients, preconditioned by `LinearCurvature`, or by `BlockCurvature` once
       that has taken many. They end at a residual that is small beside the gradient, or beside the gap asked for.
    4. Move to ``(W, b) + Δ``, or to the best model in the `Span` of both where that is not what the quadratic model
       says. The scale of ``(W, b)`` is what changes most when β falls.

    5. Where a step finds nothing lower though the gap is large, the loss has too little curvature for Newton's method,
       as Huber's of a tiny ``δ``: go on with L-BFGS.

    One `step` is 2 to 4, or one of L-BFGS. Weights and outputs are kept in float64, products are in the problem's
    precision. Parameters are those of `Solver`; the head has one atom whatever ``max_heads`` is.
    """

    name = "ridge"
    keeps_state = True
    most_steps = 10_000

    def _set_up(self, start: Atoms) -> None:
        self._B, self._like, self._stage = self._without_shift(as_matrix(start)).double(), start, 0.0
        self._rough, self._before, self._products, self._blocks = True, math.inf, 0, False
        self._descent: FactoredDescent | None = None
        self._lowest, self._idle = [math.inf, math.inf], 0
        self._take_precision(self.problem)
        # A shift of all outputs, which is not in B, changes no softmax.
        self._f = self._passes.outputs_of(start, copy=True)

    @classmethod
    def lacks(cls, problem: Problem, oracle: NormOracle | None) -> str | None:
        """No mixing weights."""
        return "head='linear'" if problem.head.learns_mixing else None

    def _take_precision(self, problem: Problem) -> None:
        self._passes = LinearPasses(problem)
        self.problem = self._passes.problem
        self._moments = self._passes.moments(diagonal=problem.head.d > WIDEST)
        self._mean, self._uneven = math.sqrt(self._moments.of_mean), UNEVEN * self._moments.squares

    def refine(self) -> Problem:
        """Go on in float64."""
        self._B, self._descent = as_matrix(self.atoms()).double(), None
        self._take_precision(self.problem.astype(torch.float64, reuse=True))
        self._f = self._passes.outputs(self._B)
        return self.problem

    def atoms(self) -> Atoms:
        """Return the iterate."""
        if self._descent is not None:
            return self._descent.atoms
        return as_atoms(self._B.to(self.problem.dtype), self._like)

    def state(self) -> tuple[State, State]:
        """Return weights, ``β_s`` and outputs; or what L-BFGS has."""
        if self._descent is not None:
            return {**self._descent.state(), "iteration": torch.tensor(self._iteration)}, {}
        shared = {"weights": self._B, "stage": torch.tensor(self._stage, dtype=torch.float64)}
        counts = {"rough": self._rough, "products": self._products, "blocks": self._blocks, "idle": self._idle}
        gaps = {"before": self._before, "lowest": self._lowest[1]}
        shared |= {name: torch.tensor(count) for name, count in counts.items()}
        shared |= {name: torch.tensor(gap, dtype=torch.float64) for name, gap in gaps.items()}
        return shared, {"outputs": self._f.clone()}  # steps change them in place

    def _restore(self, shared: State, rows: State) -> None:
        if "iteration" in shared:
            self._iteration = int(shared["iteration"])
            self._descent = FactoredDescent.restored(self.problem, shared, self.beta)
            return
        self._B, self._stage = shared["weights"], float(shared["stage"])
        self._f = self._passes.zeros(torch.float64).copy_(rows["outputs"])  # in the layout that rounding depends on
        self._rough, self._products = bool(shared.get("rough", False)), int(shared.get("products", 0))
        self._blocks, self._idle = bool(shared.get("blocks", False)), int(shared.get("idle", 0))
        self._before, self._lowest[1] = (float(shared.get(name, math.inf)) for name in ("before", "lowest"))

    def rest(self) -> None:
        """Give up the outputs."""
        self._f = self._f.new_empty(0)
        self._passes.give_up_room()

    def begin(self) -> None:
        """Choose the first β anew, and make outputs that were given up."""
        if not len(self._f) and self._descent is None:
            self._f = self._passes.outputs(self._B.to(self.problem.dtype), torch.float64)
        self._stage, self._lowest, self._idle = 0.0, [math.inf, math.inf], 0

    def step(self) -> Stop | None:
        """Take a Newton step, if the gap asks for one, or a step of L-BFGS."""
        if self._descent is not None:
            return self._descend(self._descent)
        data_term = self.problem.mean_of(lambda losses, f: losses.to(torch.float64).value(f), self._f)
        at_f = self._passes.gradient(self._f)
        square = float(self._B[:, :-1].square().sum())
        gap = self.monitor.record(
            data_term + self.beta * square / 2,
            data_term + self.beta * square / 2 - self._missing(at_f, self.beta),
            1,
        )
        cheap = self.problem.dtype == torch.float64 and self._products <= CHEAP
        if gap <= self.target * (BEYOND if cheap else 1.0):
            return Stop.CONVERGED
        self._rough &= not self._before <= NEAR or gap <= self._before / FALLS
        self._before = gap if self._stage == self.beta else math.inf
        self._stage, stage = self._next_stage(at_f, data_term, square), self._stage
        objective, missing = data_term + self._stage * square / 2, self._missing(at_f, self._stage)
        if self._stage < stage or missing < self._lowest[1]:
            self._idle, self._lowest[1] = 0, missing
        self._idle += 1
        if self._idle > UNSURE and self.problem.dtype == torch.float32:
            return Stop.STALLED
        g = at_f.clone()
        g[:, :-1] += self._stage * self._B[:, :-1]
        asked = self.target if self._stage == self.beta else NEAR
        system = self._newton(g, missing / abs(objective), asked * abs(objective))
        x, Z = system.x, system.outputs
        span = Span(self.problem, self._stage, [self._f, Z], [self._B, x])
        shares = torch.ones(2, dtype=torch.float64)
        lower = span.value(shares)
        if not objective - lower >= AGREES * system.promised:
            begin = (shares, lower) if lower < objective else (torch.tensor([1.0, 0.0], dtype=torch.float64), objective)
            shares, lower = span.minimise(*begin)
        elif self._is_near(objective - lower, system, lower):
            self._move(1.0, x, 1.0, Z)
            return Stop.CONVERGED
        if not lower < objective and not self._falls_by_gradient(x, Z, missing):
            if gap <= ROUNDED or self.problem.dtype == torch.float32:
                return Stop.STALLED
            self._iteration, self._descent = 0, FactoredDescent(self.problem, self.atoms(), self.beta)
            self._lowest, self._idle = [math.inf, math.inf], 0
            return None
        if lower < objective:
            of_B, of_x = shares.tolist()
            self._move(of_B, x, of_x, Z)
        return None

    def _move(self, of_B: float, x: Weights, of_x: float, Z: Float[Tensor, "n r c"]) -> None:
        """To ``of_B (W, b) + of_x x``; outputs in place and some samples at a time, since they are large."""
        self._B = of_B * self._B + of_x * x
        for rows in self.problem.rows:
            self._f[rows] = of_B * self._f[rows] + of_x * Z[rows]

    def _is_near(self, fell: float, system: _System, objective: float) -> bool:
        """Whether the gap after a step is small enough, without another gradient: by what the system left, and what the
        loss did otherwise than its quadratic model."""
        if self._stage > self.beta or self.problem.dtype != torch.float32:
            return False
        beyond = BENT * (fell - system.promised) ** 2 / system.promised if system.promised > 0 else math.inf
        missing = (math.sqrt(system.left) + math.sqrt(beyond)) ** 2
        if missing > self.target * abs(objective):
            return False
        return self.monitor.record(objective, objective - missing, 1) <= self.target

    def _falls_by_gradient(self, x: Weights, Z: Float[Tensor, "n r c"], missing: float) -> bool:
        """Take the step if it halves what is ``missing``, by the gradient: where β is tiny beside the features, that is
        far below what rounding leaves of the objective."""
        before = self._B, self._f
        self._B, self._f = self._B + x, self._f + Z
        at_f = self._passes.gradient(self._f)
        if self._missing(at_f, self._stage) <= missing / 2:
            return True
        self._B, self._f = before
        return False

    def _descend(self, descent: FactoredDescent) -> Stop | None:
        """Take a step of L-BFGS, and look at the gap now and then."""
        moved = descent.step()
        self._iteration += 1
        if moved and self._iteration % CHECK_EVERY:
            return None
        gradient = descent.gradient or self.problem.empty()
        missing = self._missing_of(as_matrix(gradient).double(), self.beta)
        if self.monitor.record(descent.value, descent.value - missing, 1) <= self.target:
            return Stop.CONVERGED
        falls = descent.value < self._lowest[0] or missing < self._lowest[1]
        self._lowest = [min(pair) for pair in zip(self._lowest, (descent.value, missing), strict=True)]
        self._idle = 0 if falls else self._idle + 1
        return None if moved and self._idle < IDLE else Stop.STALLED

    def _missing(self, at_f: Weights, beta: float) -> float:
        """``P − D`` at a weight β, given ``∇F``: what moves a residual to a sum of 0 moves its gradient by the mean of
        the features."""
        g = at_f.clone()
        g[:, :-1] += beta * self._B[:, :-1]
        return self._missing_of(g, beta)

    def _missing_of(self, g: Weights, beta: float) -> float:
        """The same, given ``∇P``."""
        of_W, of_b = float(g[:, :-1].norm()), float(g[:, -1].norm())
        return ((of_W + self._mean * of_b) ** 2 + self._uneven * of_b**2) / (2 * beta)

    def _next_stage(self, at_f: Weights, data_term: float, square: float) -> float:
        """``β_s``: the first one, or the next one where its gap is small."""

        def near(beta: float, times: float) -> bool:
            return self._missing(at_f, beta) <= times * abs(data_term + beta * square / 2)

        beta = self._stage
        if not beta:
            beta = self.beta
            uphill = -float((at_f * self._B)[:, :-1].sum())
            best_for = uphill / square if uphill > 0 < square else math.inf
            while not near(beta, FALL) and beta < min(best_for, 1e12 * self.beta):
                beta *= FALL
            beta = max(min(beta, best_for), self.beta)
        while beta > self.beta and near(beta, NEAR):
            beta = max(beta / FALL, self.beta)
        return self.beta if beta < 1.5 * self.beta else beta

    # -- the Newton system --------------------------------------------------------------------------------------------
    def _newton(self, g: Weights, gap: float, asked: float) -> _System:
        """``Δ`` with ``∇²P Δ ≈ −g``.

        The gap is a norm of the residual, and conjugate gradients make that rise and fall. So where it is small enough,
        ``Δ`` is not their iterate but the combination of all of them with the smallest norm, which costs no products.

        Parameters
        ----------
        g : Tensor (c, d + 1)
            The gradient at ``β_s``.
        gap : float
            The relative gap there.
        asked : float
            The gap that is asked for.
        """
        passes, beta, dtype = self._passes, self._stage, self.problem.dtype
        f = self._f if dtype == torch.float64 else passes.room.copy_(self._f)
        self._blocks |= BlockCurvature.pays(passes, self._products)
        preconditioner = (
            BlockCurvature(passes, f, beta) if self._blocks else LinearCurvature(passes, self._moments, f, beta)
        )
        rough = self._rough and passes.half_pays and preconditioner.spread <= MOST_SPREAD
        of_W = 1 / (2 * beta)
        weights = torch.full_like(g, of_W)
        weights[:, -1] = 1 / max(2 * preconditioner.mean, sys.float_info.min) + of_W * (self._mean**2 + self._uneven)
        x, r = torch.zeros_like(g), -g.to(dtype)
        best, its = x, r.double()
        enough = REACHED * asked if dtype == torch.float32 else 0.0
        forcing = min(FORCING, math.sqrt(gap))
        z = self._without_shift(preconditioner.solve(r))
        q, rz = z, float((r * z).sum())
        first = rz
        self._products = 0
        for _ in range(PRODUCTS):
            self._products += 1
            Hq = passes.curved(f, q, rough=rough)
            Hq[:, :-1] += beta * q[:, :-1]
            curvature = float((q * Hq).sum())
            if not curvature > 0:
                break
            a = rz / curvature
            x = x + a * q
            r = r - a * Hq
            away = its - r
            share = float((weights * its * away).sum() / (weights * away.square()).sum())
            best, its = best + share * (x - best), its - share * away
            if float((weights * its.square()).sum()) <= enough:
                x, r = best, its
                break
            z = self._without_shift(preconditioner.solve(r))
            last, rz = rz, float((r * z).sum())
            if not forcing**2 * first < rz < math.inf:
                break
            q = z + (rz / last) * q
        promised = float((x * (r.double() - g)).sum()) / 2
        left = math.inf if rough else float((weights * r.double().square()).sum())
        return _System(x, passes.outputs(x.to(dtype), into=passes.room), promised, left)

    def _without_shift(self, B: Weights) -> Weights:
        """What softmax sees of ``B``: a shift of all outputs costs penalty, and rounding would make large ones."""
        return B - B.mean(0) if isinstance(self.problem.loss, CrossEntropy) else B
