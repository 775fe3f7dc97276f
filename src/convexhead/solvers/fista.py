"""Accelerated proximal gradient on the dense ``Z``, for problems small enough to form their features.

    minimise  F(Φ Z + b) + β Σ_j ‖Z_j‖_*

FISTA (Beck & Teboulle 2009) with gradient restart (O'Donoghue & Candès 2015) and a step size that follows the local
curvature. The proximal step is exact: with ``C = ZᵀZ = Q Λ Qᵀ`` on the smaller side, ``prox(Z) = Z Q max(1 − t/√Λ, 0)
Qᵀ``, an eigendecomposition of a small symmetric matrix instead of an SVD.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.dual_norm.norm import NormOracle
from convexhead.program.atoms import Atoms
from convexhead.program.problem import Problem
from convexhead.solvers.base import Solver, Stop, dual_value
from convexhead.solvers.dense import DensePasses, singular_values
from convexhead.solvers.factored import FactoredDescent
from convexhead.solvers.monitor import State
from convexhead.solvers.newton import FactoredNewton


class Fista(Solver):
    """Proximal gradient steps that find the rank, and descent over as many factors.

    At the extrapolated point ``(Y, y_b)``:

    1. ``R = ∇F/n`` there, ``G = 𝒜*(R)``; stop where the gap between the iterate and the dual point of ``R`` is small.
    2. ``Z⁺ = prox(Y − G/L)``, ``b⁺ = y_b − ∇_b/L``, with ``L`` raised until the objective lies below its model.
    3. ``Y⁺ = Z⁺ + w (Z⁺ − Z)`` with Nesterov's weights; ``w`` begins anew where the step turned back.
    4. Near the optimum, once the rank stands still: descend over that many factors, with no decompositions of ``Z`` at
       all, by Newton's method where the problem is tiny, else by L-BFGS. Where the rank was wrong the gap says so, and
       proximal steps go on from there.

    One `step` looks at the gap once and takes `check_every` proximal steps. Parameters are those of `Solver`, and

    Parameters
    ----------
    dense : DensePasses or None
        Passes over some of the program alone, in place of those over all of it.

    Attributes
    ----------
    iterations : int
        Proximal steps since `begin`.
    """

    name = "fista"
    bounds_heads = False
    in_single = False
    check_every = 5
    """Proximal steps between two looks at the gap."""
    most_steps = 20_000
    polish_below = 0.05
    """Relative gap below which factors may take over. Chosen by hand."""
    slow = 300
    """Iterations after which they may above it too: with features of unequal scales proximal steps hardly move.
    Chosen by hand."""
    slack: ClassVar = {torch.float64: 1e-14, torch.float32: 1e-9}
    """Relative decrease of the objective that means nothing in a precision of the features."""
    lengthening: ClassVar = {torch.float64: 1.05, torch.float32: 1.02}
    """Factor by which a step grows from one iteration to the next: where rounding blurs decreases, with care."""
    negligible = 1e-100
    """Norm of features below which they are taken for 1 a row where steps and the intercept are scaled: the square of
    it, and one over that, must stay numbers."""
    roughest = 1e-2
    """Mean loss above which a rough value is good enough to estimate a gap. Chosen by hand: far more than rounding."""
    trials: ClassVar = {torch.float64: 60, torch.float32: 12}
    """Lengths of a step that are tried; where none is short enough, rounding hides the decrease. In single precision it
    soon does, and a step that is as short as rounding asks for leads nowhere."""

    def __init__(self, *args: Any, dense: DensePasses | None = None, **others: Any) -> None:
        self._given = dense
        super().__init__(*args, **others)

    def _set_up(self, start: Atoms) -> None:
        problem = self.problem
        self.dense = self._given or DensePasses(problem)
        self.problem = self.dense.problem
        start = self.dense.enter(start)
        self.Z = self.dense.matrices(start)
        square = torch.tensor(self.dense.norm() ** 2, dtype=torch.float64)
        norm = math.sqrt(float(problem.sum(square)[0]))  # about, or above, that of all processes' features
        # The intercept is scaled so that a unit of it moves the outputs about as much as a unit of Z does.
        norm = norm if norm > self.negligible else math.sqrt(problem.n * problem.head.r)
        self.omega = norm / math.sqrt(problem.n * problem.head.r)
        self.b = start.intercept / self.omega
        self.L = norm**2 / problem.n / 64
        self.ranks: list[int] = []

    @classmethod
    def lacks(cls, problem: Problem, oracle: NormOracle | None) -> str | None:
        """Features that fit into memory, of a convex program."""
        if not (problem.head.learns_mixing and problem.activation.convex):
            return "a head with mixing weights, and a linear or gated activation"
        size = 8 * number_of_features(problem) / problem.ranks.size
        left = problem.operator.budget.left
        if problem.ranks.largest(float(size > left))[0]:
            return f"{size / 1e9:.3g} GB for dense features where max_memory leaves {left / 1e9:.3g} GB"
        return None

    def state(self) -> tuple[State, State]:
        """Return the iterate, the extrapolated point, and what is known of steps and ranks."""
        known = [self._momentum, self._wait, self._polished, self.iterations, self.L]
        shared = {
            "Z": self.Z, "b": self.b, "Y": self._Y, "yb": self._yb,
            "known": torch.tensor(known, dtype=torch.float64), "ranks": torch.tensor(self.ranks),
        }  # fmt: skip
        return shared, {"fY": self._fY}

    def _restore(self, shared: State, rows: State) -> None:
        self.Z, self.b, self.ranks = shared["Z"], shared["b"], shared["ranks"].int().tolist()
        self.begin()
        self._momentum, *counts, self.L = shared["known"].tolist()
        self._wait, self._polished, self.iterations = map(int, counts)
        self._Y, self._yb = shared["Y"], shared["yb"]
        self._fY = torch.empty_like(self.problem.Y).copy_(rows["fY"])  # in its layout, on which rounding depends

    @torch.inference_mode()
    def begin(self) -> None:
        """Extrapolate from the iterate itself."""
        self._stand_still()
        self._wait = self._polished = self.iterations = 0

    def _stand_still(self) -> None:
        self._f = self._outputs(self.Z, self.b)
        self._Y, self._yb, self._fY, self._momentum = self.Z, self.b, self._f, 1.0

    @torch.inference_mode()
    def step(self) -> Stop | None:
        """Look at the gap, descend over factors if it is time, and take proximal steps."""
        FY, R, G, gb = self._gradient()
        gap, rank = self._gap(self._f, R, G)
        if gap <= self.target:
            return Stop.CONVERGED
        self.ranks = [*self.ranks[-1:], rank]
        near, first = gap < self.polish_below or self.iterations >= self.slow, 0
        if near and rank and self.ranks == 2 * [rank] and (self._wait <= 0 or rank != self._polished):
            if self._polish(max(60, self.iterations)):
                return Stop.CONVERGED
            self._wait, self._polished = max(10, self.iterations // self.check_every), rank
            self._stand_still()
            first = 1
        else:
            self._wait -= 1
        for k in range(first, self.check_every):
            if k:
                FY, R, G, gb = self._gradient()
            if not self._proximal_step(FY, G, gb):
                return Stop.STALLED
        self.iterations += self.check_every
        return None

    def _gradient(self) -> tuple[float, Tensor, Float[Tensor, "j w q"], Float[Tensor, " c"] | None]:
        """``F`` and ``R`` at the extrapolated point, and the gradients in ``Z`` and ``b``; None where no intercept is
        fitted."""
        problem = self.problem
        loss, R = problem.losses.value_and_residual(self._fY)
        value, R = problem.mean(loss), R / problem.n
        gb = self.omega * problem.sum(R.sum((0, 1)))[0] if problem.fit_intercept else None
        return value, R, self.dense.gradient(R), gb

    def _proximal_step(self, FY: float, G: Float[Tensor, "j w q"], gb: Float[Tensor, " c"] | None) -> bool:
        """Take a step from the extrapolated point and extrapolate anew; False where no step is short enough."""
        precision = self.dense.features.dtype
        Y, yb, slope = self._Y, self._yb, G.flatten()
        for _ in range(self.trials[precision]):
            Z = self._prox(Y - G / self.L, self.beta / self.L)
            b = yb if gb is None else yb - gb / self.L
            f = self._outputs(Z, b)
            moved = (Z - Y).flatten()
            square, along = float(moved @ moved), float(slope @ moved)
            if gb is not None:
                square, along = square + float((b - yb).square().sum()), along + float(gb @ (b - yb))
            decrease = self._rough(f) - FY - along  # an accurate value would not help: FY is none
            if decrease <= self.L / 2 * square + self.slack[precision] * abs(FY):
                break
            self.L *= 1.5
        else:
            return False
        self.L /= self.lengthening[precision]
        last = Z - self.Z
        turned = float(moved @ last.flatten())
        if gb is not None:
            turned += float((b - yb) @ (b - self.b))
        momentum = 1.0 if turned < 0 else self._momentum
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        weight, self._momentum = (momentum - 1) / following, following
        self._Y, self._fY = torch.add(Z, last, alpha=weight), torch.lerp(self._f, f, 1 + weight)
        if gb is not None:
            self._yb = b + weight * (b - self.b)
        self.Z, self.b, self._f = Z, b, f
        return True

    def _outputs(self, Z: Float[Tensor, "j w q"], b: Float[Tensor, " c"]) -> Float[Tensor, "n r c"]:
        return self.dense.outputs(Z, self.omega * b)

    def _rough(self, f: Float[Tensor, "n r c"]) -> float:
        """``F``, rounded as `_gradient` rounds it."""
        return self.problem.mean(self.problem.losses.rough_value(f))

    def _gap(self, f: Tensor, R: Tensor, G: Tensor) -> tuple[float, int]:
        """Estimated relative gap of the iterate against the dual point at the extrapolated one, recorded; the rank."""
        sigma = singular_values(self.Z)
        loss = self._rough(f)
        if loss < self.roughest:
            loss = self.problem.data_term(f)
        objective = loss + self.beta * float(sigma.sum())
        dual = dual_value(self.problem, R, float(singular_values(G).max()), self.beta, self.omega * self.b)
        rank = int((sigma > 1e-7 * sigma.max()).sum())
        return self.monitor.record(objective, dual, rank), rank

    def _prox(self, Z: Float[Tensor, "j w q"], threshold: float) -> Float[Tensor, "j w q"]:
        """Singular values shrunk by ``threshold``."""
        tall = Z.shape[1] >= Z.shape[2]
        values, Q = torch.linalg.eigh(torch.bmm(Z.mT, Z) if tall else torch.bmm(Z, Z.mT))
        shrink = 1 - threshold / values.clamp_min(0).sqrt().clamp_min(threshold)
        scaled = Q * shrink.unsqueeze(1)
        return torch.bmm(torch.bmm(Z, scaled), Q.mT) if tall else torch.bmm(scaled, torch.bmm(Q.mT, Z))

    def _polish(self, iterations: int) -> bool:
        """Descend over the factors of the iterate; whether the target was reached."""
        factors = self._factors()
        newton = FactoredNewton.pays(self.dense, factors)
        descent = (FactoredNewton if newton else FactoredDescent)(self.dense, factors, self.beta)
        for iteration in range(1, iterations + 1):
            moved = descent.step()
            if newton or iteration % 8 == 0 or not moved:
                _, R, G = self.dense.last
                dual = dual_value(self.problem, R, float(singular_values(G).max()), self.beta, descent.atoms.intercept)
                gap = self.monitor.record(descent.value, dual, len(descent.atoms))
                if gap <= self.target or not moved or self.monitor.out_of_time():
                    break
        self.Z, self.b = self.dense.matrices(descent.atoms), descent.atoms.intercept / self.omega
        return gap <= self.target

    def _factors(self) -> Atoms:
        """The iterate as atoms in visible coordinates."""
        left, sigma, right = torch.linalg.svd(self.Z, full_matrices=False)
        kept = sigma > 1e-7 * sigma.max()
        root = sigma.sqrt()
        block = torch.arange(len(self.Z), device=self.Z.device).unsqueeze(1).expand_as(sigma)
        U, V = (left * root.unsqueeze(1)).mT[kept], (right * root.unsqueeze(2))[kept]
        return Atoms(U, V.view(-1, *self.problem.value_shape), block[kept], self.omega * self.b)

    def atoms(self) -> Atoms:
        """Return the iterate as atoms of the head."""
        return self.dense.leave(self._factors())


def number_of_features(problem: Problem) -> int:
    """How many numbers the features ``Φ`` of all blocks and samples are."""
    return problem.n * problem.head.r * problem.n_blocks * problem.head.mixing_size * problem.head.value_rows
