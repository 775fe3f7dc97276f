"""Accelerated proximal gradient on the dense ``Z``, for problems small enough to form their features.

    minimise  F(Φ Z + b) + β Σ_j ‖Z_j‖_*

FISTA (Beck & Teboulle 2009) with gradient restart (O'Donoghue & Candès 2015) and a step size that follows the local
curvature. The proximal step is exact: with ``C = ZᵀZ = Q Λ Qᵀ`` on the smaller side, ``prox(Z) = Z Q max(1 − t/√Λ, 0)
Qᵀ``, an eigendecomposition of a small symmetric matrix instead of an SVD.

Proximal steps find the rank; once it stands still, descent over that many factors finishes, with no decompositions of
``Z`` at all: by Newton's method where the problem is tiny, else by L-BFGS. Where the rank was wrong the gap says so,
and proximal steps go on from there.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.program.atoms import Atoms
from convexhead.program.problem import Problem
from convexhead.solvers.base import Monitor, Stop, scaled_dual
from convexhead.solvers.dense import DensePasses, singular_values
from convexhead.solvers.factored import FactoredDescent
from convexhead.solvers.newton import FactoredNewton


class Fista:
    """See the module's text. State survives between calls of `advance`.

    Parameters
    ----------
    problem : Problem
    beta : float
    start : Atoms
        Where to begin.
    monitor : Monitor
        Clock and history.
    dense : DensePasses or None
        Passes over some of the program alone, in place of those over all of it.
    """

    max_iterations = 100_000
    check_every = 5
    polish_below = 0.05
    """Relative gap under which factors may take over."""
    slow = 300
    """Iterations after which they may above it too: features of unequal scales hardly move proximal steps."""
    slack: ClassVar = {torch.float64: 1e-14, torch.float32: 1e-9}
    """Relative decrease of the objective that means nothing in a precision of the features."""
    lengthening: ClassVar = {torch.float64: 1.05, torch.float32: 1.02}
    """Factor by which a step grows from one iteration to the next: where rounding blurs decreases, with care."""
    trials = 60
    """Of a step; where none is short enough, rounding hides the decrease."""

    def __init__(
        self, problem: Problem, beta: float, start: Atoms, monitor: Monitor, dense: DensePasses | None = None
    ) -> None:
        self.dense = dense or DensePasses(problem)
        self.problem, self.beta, self.monitor = self.dense.problem, beta, monitor
        start = self.dense.enter(start)
        self.Z = self.dense.matrices(start)
        square = torch.tensor(self.dense.norm() ** 2, dtype=torch.float64)
        norm = math.sqrt(float(problem.sum(square)[0]))  # about, or above, that of all processes' features
        # The intercept is scaled so that a unit of it moves the outputs about as much as a unit of Z does.
        self.omega = norm / math.sqrt(problem.n * problem.head.r) or 1.0
        self.b = start.intercept / self.omega
        self.L = max(norm**2 / problem.n / 64, torch.finfo(torch.float64).tiny)
        self.ranks: list[int] = []
        self._resumed: tuple[Any, ...] = ()

    def _state(
        self, Y: Tensor, yb: Tensor, fY: Tensor, *scalars: float | int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the iterations to come depend on, given the extrapolated point and what else `advance` knows."""
        known = torch.tensor([*scalars, self.L], dtype=torch.float64)
        shared = {"Z": self.Z, "b": self.b, "Y": Y, "yb": yb, "known": known, "ranks": torch.tensor(self.ranks)}
        return shared, {"fY": fY}

    def restore(self, shared: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
        """Go on from a checkpoint: its tensors, and those of this process's samples."""
        self.Z, self.b, self.ranks = shared["Z"], shared["b"], shared["ranks"].int().tolist()
        momentum, *counts, self.L = shared["known"].tolist()
        fY = torch.empty_like(self.problem.Y).copy_(rows["fY"])  # in its layout, on which rounding depends
        self._resumed = shared["Y"], shared["yb"], fY, momentum, *map(int, counts)

    @torch.inference_mode()
    def advance(self, target: float) -> Stop:
        """Iterate until the estimated relative gap is at most ``target``."""
        slack = self.slack[self.dense.features.dtype]
        f = self._outputs(self.Z, self.b)
        Y, yb, fY, momentum, wait, polished, first = self._resumed or (self.Z, self.b, f, 1.0, 0, 0, 0)
        self._resumed = ()
        for iteration in range(first, self.max_iterations):
            if iteration % self.check_every == 0:
                self.monitor.offer(partial(self._state, Y, yb, fY, momentum, wait, polished, iteration))
            loss, R = self.problem.loss.value_and_residual(fY, self.problem.Y)
            FY, R = self.problem.mean(loss), R / self.problem.n
            G = self.dense.gradient(R)
            gb = self.omega * self.problem.sum(R.sum((0, 1)))[0] if self.problem.fit_intercept else None
            if iteration % self.check_every == 0:
                gap, rank = self._gap(f, fY, G)
                if gap <= target:
                    return Stop.CONVERGED
                self.ranks = [*self.ranks[-1:], rank]
                near = gap < self.polish_below or iteration >= self.slow
                settled = near and self.ranks == 2 * [rank] and rank
                if settled and (wait <= 0 or rank != polished):
                    if self._polish(target, max(60, iteration)):
                        return Stop.CONVERGED
                    wait, polished = max(10, iteration // self.check_every), rank
                    f = self._outputs(self.Z, self.b)
                    Y, yb, fY, momentum = self.Z, self.b, f, 1.0
                    continue
                wait -= 1
            for _ in range(self.trials):
                Z = self._prox(Y - G / self.L, self.beta / self.L)
                b = yb if gb is None else yb - gb / self.L
                f_new = self._outputs(Z, b)
                moved = (Z - Y).flatten()
                square, along = float(moved @ moved), float(G.flatten() @ moved)
                if gb is not None:
                    square, along = square + float((b - yb).square().sum()), along + float(gb @ (b - yb))
                decrease = self.problem.data_term(f_new) - FY - along
                if decrease <= self.L / 2 * square + slack * abs(FY):
                    break
                self.L *= 1.5
            else:
                return Stop.STALLED
            self.L /= self.lengthening[self.dense.features.dtype]
            last = Z - self.Z
            turned = float(moved @ last.flatten())
            if gb is not None:
                turned += float((b - yb) @ (b - self.b))
            if turned < 0:
                momentum = 1.0
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            weight, momentum = (momentum - 1) / following, following
            Y, fY = torch.add(Z, last, alpha=weight), torch.lerp(f, f_new, 1 + weight)
            yb = b + weight * (b - self.b)
            self.Z, self.b, f = Z, b, f_new
            if self.monitor.out_of_time():
                return Stop.TIME
        return Stop.STALLED

    def _outputs(self, Z: Float[Tensor, "j w q"], b: Float[Tensor, " c"]) -> Float[Tensor, "n r c"]:
        return self.dense.outputs(Z, self.omega * b)

    def _gap(self, f: Tensor, fY: Tensor, G: Tensor) -> tuple[float, int]:
        """Estimated relative gap of the iterate against the dual point at the extrapolated one, recorded; the rank."""
        sigma = singular_values(self.Z)
        objective = self.problem.data_term(f) + self.beta * float(sigma.sum())
        dual = scaled_dual(self.problem, fY, float(singular_values(G).max()), self.beta, self.omega * self.b)
        rank = int((sigma > 1e-7 * sigma.max()).sum())
        return self.monitor.record(objective, dual, rank), rank

    def _prox(self, Z: Float[Tensor, "j w q"], threshold: float) -> Float[Tensor, "j w q"]:
        """Singular values shrunk by ``threshold``."""
        tall = Z.shape[1] >= Z.shape[2]
        values, Q = torch.linalg.eigh(torch.bmm(Z.mT, Z) if tall else torch.bmm(Z, Z.mT))
        shrink = 1 - threshold / values.clamp_min(threshold**2).sqrt()
        scaled = Q * shrink.unsqueeze(1)
        return torch.bmm(torch.bmm(Z, scaled), Q.mT) if tall else torch.bmm(scaled, torch.bmm(Q.mT, Z))

    def _polish(self, target: float, iterations: int) -> bool:
        """Descend over the factors of the iterate; whether ``target`` was reached."""
        factors = self._factors()
        newton = FactoredNewton.pays(self.dense, factors)
        descent = (FactoredNewton if newton else FactoredDescent)(self.dense, factors, self.beta)
        for iteration in range(1, iterations + 1):
            moved = descent.step()
            if newton or iteration % 8 == 0 or not moved:
                f, G = self.dense.last
                dual = scaled_dual(self.problem, f, float(singular_values(G).max()), self.beta, descent.atoms.intercept)
                gap = self.monitor.record(descent.value, dual, len(descent.atoms))
                if gap <= target or not moved or self.monitor.out_of_time():
                    break
        self.Z, self.b = self.dense.matrices(descent.atoms), descent.atoms.intercept / self.omega
        return gap <= target

    def _factors(self) -> Atoms:
        """The iterate as atoms in visible coordinates."""
        left, sigma, right = torch.linalg.svd(self.Z, full_matrices=False)
        kept = sigma > 1e-7 * sigma.max()
        root = sigma.sqrt()
        block = torch.arange(len(self.Z), device=self.Z.device).unsqueeze(1).expand_as(sigma)
        U, V = (left * root.unsqueeze(1)).mT[kept], (right * root.unsqueeze(2))[kept]
        return Atoms(U, V.view(-1, *self.problem.value_shape), block[kept], self.omega * self.b)

    def dual_point(self) -> None:
        """The dual point is taken at the model's own outputs."""
        return None

    def atoms(self) -> Atoms:
        """The iterate as atoms of the head."""
        return self.dense.leave(self._factors())
