"""Column generation on the mixing weights themselves, for ReLU heads.

    repeat
        price:   the mixing weights u that the residual rewards most, h(R) = max ‖Σ_i (P mix(X_i, u))ᵀ R_i‖
        grow:    append atoms (√t u, −√t G/‖G‖) for rewards above β, with t from a line search; (large problems) at
                 first also in many random directions
        weigh:   (small problems) L-BFGS over values and lengths of the mixing weights: a convex problem, a group lasso
    descend: L-BFGS over all factors of the ReLU network, whitened (`whitening`) where the problem is large
        tidy:    merge atoms of one direction, drop those that the penalty has shrunk
        settle:  (small problems) descend within the cones of the atoms' activation patterns (`cones`)
        stop:    when the scaled dual point says that the gap is small enough

No gates are sampled: a stationary point whose largest reward is at most β is a global optimum of the network of any
width. Optimal weights often lie on hyperplanes where some pre-activations vanish. The objective has kinks there, at
which quasi-Newton steps crawl; within the cone of one activation pattern it is smooth.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.problem import Atoms, Problem, rescale
from convexhead.relu.ascent import Peaks
from convexhead.relu.norm import NormOracle
from convexhead.solvers.base import Monitor, Stop, scaled_dual
from convexhead.solvers.cones import descend_in_cones
from convexhead.solvers.factored import FactoredDescent, Passes
from convexhead.solvers.pricing import with_best_step
from convexhead.solvers.whitening import Whitening


class ReLUColumnGeneration:
    """See the module's text. State survives between calls of `advance`.

    Parameters
    ----------
    problem : Problem
    beta : float
    start : Atoms
        Where to begin.
    monitor : Monitor
        Clock and history.
    max_heads : int or None
        Atoms that the model may have.
    generator : torch.Generator
        Source of the random starts of the search.
    """

    batch = 16
    """Atoms that one pricing may add, at least."""
    wide = 256
    """Value rows of the atoms that a large problem begins with, where one pricing after another would find them one by
    one. A fourth of them may be added later on at a time."""
    descent_steps = 200
    """L-BFGS iterations between two pricings."""
    renewal = 50
    """Iterations after which the coordinates of a descent are whitened anew."""
    max_rounds = 200
    far = 0.1
    """A gap estimated larger than this says no more than that."""
    settled = 1e-2
    """Relative decrease of the objective in ten iterations, over the square of a gap, that ends a descent: the dual
    lags behind the objective as a gradient does. In large problems it is the gap at hand, since far from the optimum
    new atoms pay more than iterations; in small ones, where iterations cost little, the gap asked for."""
    patience = 8
    """Rounds without a better gap after which the run has stalled."""

    def __init__(
        self,
        problem: Problem,
        beta: float,
        start: Atoms,
        monitor: Monitor,
        *,
        max_heads: int | None,
        generator: torch.Generator,
    ) -> None:
        self.problem, self.beta, self.monitor = problem, beta, monitor
        self.max_heads, self.generator = max_heads, generator
        self.oracle = NormOracle(problem)
        if not self.oracle.tight:
            self.batch = max(self.batch, self.wide // 4 // problem.head.value_rows)
        self.widest = max(self.batch, self.wide // problem.head.value_rows)
        self.model = start
        self._witness: Tensor | None = None

    def atoms(self) -> Atoms:
        """The current model."""
        return self.model

    def witness(self) -> Float[Tensor, "n r c"] | None:
        """Outputs with the best dual point that searches suggest: rewards rise and fall while the objective falls.

        None, for the model's own, where rewards are bounded.
        """
        return self._witness

    def advance(self, target: float) -> Stop:
        """Rounds until the estimated relative gap is at most ``target``."""
        best, since = float("inf"), 0
        for _ in range(self.max_rounds):
            f = self.problem.outputs(self.model)
            peaks, gap = self._price(f, target)
            if gap <= target:
                return Stop.CONVERGED
            if self.monitor.out_of_time():
                return Stop.TIME
            best, since = (gap, 0) if gap < 0.9 * best else (best, since + 1)
            lag = self.settled * (target if self.oracle.tight else min(gap, self.far)) ** 2
            self.noise = max(lag, torch.finfo(self.problem.dtype).eps)
            if since > self.patience:
                full = self.max_heads is not None and len(self.model) >= self.max_heads
                return Stop.HEADS if full else Stop.STALLED
            if self.oracle.tight or len(self.model):
                new = self._new_atoms(f, peaks, self.batch)
            else:
                new = self._new_atoms(f, peaks.merge(self._scattered(f)), self.widest)
            grown = self.model if new is None else self.model.append(new)
            if not len(grown):
                return Stop.STALLED
            if self.oracle.tight:
                grown = self._descend(Rays(self.problem, grown), grown)
            # Atoms crowd along the kinks: far fewer do, and descend better. Where they do not, they stay apart.
            fewer = self._tidy(grown, min(1e-3, 0.1 * gap) * 0.1**since)
            model = self._descend(self.problem, fewer)
            if len(fewer) < len(grown) and self._objective(model) > self._objective(self.model):
                model = self._descend(self.problem, grown)
            self.model = self._tidy(model)
            if self.oracle.scores is not None and self.oracle.tight:
                settled = descend_in_cones(
                    self.problem, self.model, self.oracle.scores, self.beta, self.monitor.out_of_time
                )
                self.model = self._tidy(settled)
        return Stop.STALLED

    def _objective(self, atoms: Atoms) -> float:
        return self.problem.data_term(self.problem.outputs(atoms)) + self.beta * self.problem.penalty(atoms)

    # -- price and grow -----------------------------------------------------------------------------------------------
    def _price(self, f: Float[Tensor, "n r c"], target: float) -> tuple[Peaks, float]:
        """What a search finds at outputs ``f``, and the relative gap that follows, recorded."""
        R, tight = self.problem.residual(f), self.oracle.tight
        peaks = self.oracle.search(
            R,
            warm=self.model,
            generator=self.generator,
            n_starts=16 if tight else 8,
            iterations=30 if tight else 12,
            rtol=1e-7 if tight else 1e-4,
            climbers=None if tight else self.batch,
        )
        norm = float(peaks.values[:1].sum())
        objective = self.problem.data_term(f) + self.beta * self.problem.penalty(self.model)
        dual = scaled_dual(self.problem, f, norm, self.beta, self.model.intercept)
        hopeful = objective - dual <= target * abs(objective)
        if tight and (hopeful or self.oracle.method == "faces"):
            found = self.oracle.bound(R, peaks, rtol=0.1 * target, enough=(1 + 0.1 * target) * self.beta)
            peaks = found.peaks
            dual = scaled_dual(self.problem, f, found.upper, self.beta, self.model.intercept)
        if dual > self.monitor.dual and not tight:
            self._witness = f
        return peaks, self.monitor.record(objective, dual, len(self.model))

    def _scattered(self, f: Float[Tensor, "n r c"]) -> Peaks:
        """Random directions as they are: ascents would lead many of them to the same few."""
        each = self.widest // self.problem.head.n_groups
        R = self.problem.residual(f)
        return self.oracle.search(R, generator=self.generator, n_starts=each, iterations=0)

    def _new_atoms(self, f: Float[Tensor, "n r c"], peaks: Peaks, most: int) -> Atoms | None:
        """Atoms ``−t w_k u_k G_kᵀ/‖G_k‖``, ``w_k = h_k − β``, at most so many, with the best common ``t``.

        None where none pays.
        """
        problem = self.problem
        peaks = peaks.select(peaks.values > self.beta * (1 + 1e-9)).distinct()
        room = most if self.max_heads is None else min(most, self.max_heads - len(self.model))
        peaks = peaks.select(torch.arange(len(peaks.values)) < room)
        if not len(peaks.values):
            return None
        excess = peaks.values - self.beta
        root = excess.sqrt()
        new = Atoms(
            peaks.U * root.view(-1, *[1] * (peaks.U.ndim - 1)),
            -peaks.G * (root / peaks.values).view(-1, 1, 1),
            peaks.block,
            f.new_zeros(problem.c),
        )
        return with_best_step(problem, f, new, excess, self.beta)

    # -- descend and tidy ---------------------------------------------------------------------------------------------
    def _descend(self, passes: Passes, atoms: Atoms) -> Atoms:
        """Up to `descent_steps` iterations, in whitened coordinates where the problem is large."""
        problem, beta, tight = self.problem, self.beta, self.oracle.tight
        rounds = 1 if tight else self.descent_steps // self.renewal
        for _ in range(rounds):
            coordinates = None if tight else Whitening(problem, atoms, problem.outputs(atoms), beta)
            descent = FactoredDescent(passes, atoms, beta, coordinates)
            before = descent.value
            for step in range(self.descent_steps // rounds):
                if not descent.step() or self.monitor.out_of_time():
                    return descent.atoms
                if step % 10 == 9:
                    self.monitor.record(descent.value, -torch.inf, len(atoms))
                    if before - descent.value <= self.noise * abs(before):
                        return descent.atoms
                    before = descent.value
            atoms = descent.atoms
        return atoms

    def _tidy(self, atoms: Atoms, apart: float = 1e-9) -> Atoms:
        """Balanced atoms; those merged whose directions differ by less than ``apart`` in cosine, tiny ones dropped.

        Atoms of one direction do the same work for a larger penalty.
        """
        atoms, sizes = rescale(atoms)
        if not len(atoms):
            return atoms
        size = torch.cat(sizes)
        unit = torch.nn.functional.normalize(atoms.U.flatten(1).double())
        same = (unit @ unit.T > 1 - apart) & (atoms.block.unsqueeze(1) == atoms.block)
        same.fill_diagonal_(True)
        leader = same.int().argmax(1)
        V = torch.zeros_like(atoms.V).index_add_(
            0, leader, atoms.V * (size.sqrt() / size[leader].sqrt()).view(-1, 1, 1)
        )
        merged = Atoms(atoms.U, V, atoms.block, atoms.intercept).select(leader.unique())
        merged, sizes = rescale(merged)
        size = torch.cat(sizes) if sizes else size[:0]
        return merged.select(size > 1e-7 * size.sum())


class Rays:
    """Passes of a problem with each atom's mixing weights kept on their ray, where the objective has no kinks."""

    def __init__(self, problem: Problem, atoms: Atoms) -> None:
        self.problem = problem
        self.unit = torch.nn.functional.normalize(atoms.U.flatten(1))

    def value_and_gradient(self, atoms: Atoms, beta: float) -> tuple[float, Tensor, Tensor, Tensor]:
        """As `Problem.value_and_gradient`, the gradient along the rays only."""
        value, gU, gV, gb = self.problem.value_and_gradient(atoms, beta)
        along = (gU.flatten(1) * self.unit).sum(1, keepdim=True)
        return value, (along * self.unit).view_as(gU), gV, gb
