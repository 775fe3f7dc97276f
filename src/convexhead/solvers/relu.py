"""Column generation on the mixing weights themselves, for ReLU heads.

No gates are sampled: a stationary point whose largest reward is at most β is a global optimum of the network of any
width. Optimal weights often lie on hyperplanes where some pre-activations vanish. The objective has kinks there, at
which quasi-Newton steps crawl; within the cone of one activation pattern it is smooth.

Where rewards can be bounded (`ExactRounds`) rounds are few and thorough, and end within the cones of the patterns
(`cones`). Elsewhere (`SearchedRounds`) the model begins wide, in random directions, and a round goes only as far as the
gap at hand asks for, in whitened coordinates (`whitening`); in float64, after one that has not helped, it ends within
cones too.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.dual_norm.ascent import LocalMaxima
from convexhead.dual_norm.norm import NormOracle
from convexhead.program.atoms import Atoms, rescale
from convexhead.program.problem import Evaluation, Problem
from convexhead.solvers.base import Solver, Stop, scaled_dual
from convexhead.solvers.cones import descend_in_cones
from convexhead.solvers.factored import FactoredDescent, Passes
from convexhead.solvers.monitor import State
from convexhead.solvers.pricing import with_best_step
from convexhead.solvers.whitening import Whitening


class ReLUColumnGeneration(Solver):
    """Rounds that look for the mixing weights that the residual rewards most, and descend from there.

    1. *Price*: local maxima of ``‖Σ_i (P mix(X_i, u))ᵀ R_i‖`` over unit ``u``, the largest of which is ``h(R)``; stop
       where the gap between the model and the dual point of ``R`` is small.
    2. *Grow*: append atoms ``(√t u, −√t G/‖G‖)`` for rewards above β, with ``t`` from a line search.
    3. *Merge* atoms of one direction, and drop those that the penalty has shrunk.
    4. *Descend*: L-BFGS over all factors of the ReLU network; merge again.

    One `step` is one round. Rounds may also raise the objective: the lowest model is kept. Parameters are those of
    `Solver`.
    """

    batch = 16
    """Least number of atoms that one pricing may add. Chosen by hand."""
    search: ClassVar[dict[str, Any]]
    """How hard a pricing looks: random starts, iterations of an ascent, and the relative gain that ends it."""
    descent_steps = 200
    """Largest number of L-BFGS iterations between two pricings. Chosen by hand."""
    least_decrease = 1e-2
    """Relative decrease of the objective in ten iterations, over the square of a gap, that ends a descent: the dual
    lags behind the objective as a gradient does."""
    most_steps = 200
    patience = 8
    """Number of rounds without a better gap after which the run has stalled. Chosen by hand."""

    oracle: NormOracle

    def _set_up(self, start: Atoms) -> None:
        self.model = start
        self._lowest = math.inf, start

    def atoms(self) -> Atoms:
        """Return the lowest model of the last rounds."""
        lowest, model = self._lowest
        if lowest < math.inf and self._objective(self.problem.outputs(self.model), self.model) > lowest:
            return model
        return self.model

    def state(self) -> tuple[State, State]:
        """Return the model, the lowest one, how the rounds went, and what bounds may still cost."""
        lowest, model = self._lowest
        rounds = [lowest, self._best, self._since, self.oracle.work]
        shared = {"round": torch.tensor(rounds, dtype=torch.float64), **self.model.state()}
        return {**shared, **{f"lowest {name}": tensor for name, tensor in model.state().items()}}, {}

    def _restore(self, shared: State, rows: State) -> None:
        lowest, self._best, since, self.oracle.work = shared["round"].tolist()
        self._since = int(since)
        self.model = Atoms.restored(shared)
        before = {name.removeprefix("lowest "): t for name, t in shared.items() if name.startswith("lowest ")}
        self._lowest = lowest, Atoms.restored(before)

    def begin(self) -> None:
        """Go on from the lowest model, and forget how the rounds went."""
        self.model = self.atoms()
        self._lowest = math.inf, self.model
        self._best, self._since = math.inf, 0

    def step(self) -> Stop | None:
        """Take one round."""
        f = self.problem.outputs(self.model)
        objective = self._objective(f, self.model)
        if objective < self._lowest[0]:
            self._lowest = objective, self.model
        maxima, dual = self._price(f, objective)
        gap = self.monitor.record(objective, dual, len(self.model))
        if gap <= self.target:
            return Stop.CONVERGED
        self._best, self._since = (gap, 0) if gap < 0.9 * self._best else (self._best, self._since + 1)
        if self._since > self.patience:
            return self._ended(len(self.model))
        noise = max(self.least_decrease * self._decisive(gap) ** 2, torch.finfo(self.problem.dtype).eps)
        grown = self._grow(f, maxima, noise)
        if not len(grown):
            return Stop.STALLED
        # Atoms crowd along the kinks: far fewer do, and descend better. Where they do not, they stay apart.
        fewer = self._merge(grown, min(1e-3, 0.1 * gap) * 0.1**self._since)
        model = self._descend(fewer, noise)
        if len(fewer) < len(grown) and self._objective(self.problem.outputs(model), model) > objective:
            model = self._descend(grown, noise)
        self.model = self._within_cones(self._merge(model))
        return None

    @abstractmethod
    def _price(self, f: Float[Tensor, "n r c"], objective: float) -> tuple[LocalMaxima, float]:
        """What a search finds at outputs ``f``, and the dual value that follows."""

    @abstractmethod
    def _decisive(self, gap: float) -> float:
        """The gap on which it depends how far a descent goes."""

    @abstractmethod
    def _grow(self, f: Float[Tensor, "n r c"], maxima: LocalMaxima, noise: float) -> Atoms:
        """The model with atoms for what was found."""

    @abstractmethod
    def _descend(self, atoms: Atoms, noise: float) -> Atoms:
        """Up to `descent_steps` iterations, ended by decreases of less than ``noise``."""

    def _within_cones(self, atoms: Atoms) -> Atoms:
        """The model after a descent within the cones of its patterns, where scores are written out."""
        if self.oracle.scores is None:
            return atoms
        return self._merge(
            descend_in_cones(self.problem, atoms, self.oracle.scores, self.beta, self.monitor.out_of_time)
        )

    def _objective(self, f: Float[Tensor, "n r c"], atoms: Atoms) -> float:
        """Of a model with outputs ``f``."""
        return self.problem.data_term(f) + self.beta * self.problem.penalty(atoms)

    def _dual(self, f: Float[Tensor, "n r c"], norm: float) -> float:
        return scaled_dual(self.problem, f, norm, self.beta, self.model.intercept)

    def _new_atoms(self, f: Float[Tensor, "n r c"], maxima: LocalMaxima, most: int) -> Atoms | None:
        """Atoms ``−t w_k u_k G_kᵀ/‖G_k‖``, ``w_k = h_k − β``, at most so many, with the best common ``t``.

        None where none pays.
        """
        problem = self.problem
        maxima = maxima.select(maxima.values > self.beta * (1 + 1e-9))
        maxima = maxima.distinct(seen=self.oracle.seen(maxima.U, maxima.block))
        room = most if self.max_heads is None else min(most, self.max_heads - len(self.model))
        maxima = maxima.select(torch.arange(len(maxima.values)) < room)
        if not len(maxima.values):
            return None
        excess = maxima.values - self.beta
        root = excess.sqrt()
        new = Atoms(
            maxima.U * root.view(-1, *[1] * (maxima.U.ndim - 1)),
            -maxima.G * (root / maxima.values).view(-1, 1, 1),
            maxima.block,
            f.new_zeros(problem.c),
        )
        return with_best_step(problem, f, new, excess, self.beta)

    def _run(self, descent: FactoredDescent, steps: int, noise: float) -> bool:
        """Iterations of a descent; whether it has not ended."""
        before = descent.value
        for step in range(steps):
            if not descent.step() or self.monitor.out_of_time():
                return False
            if step % 10 == 9:
                self.monitor.record(descent.value, -torch.inf, len(descent.atoms))
                if before - descent.value <= noise * abs(before):
                    return False
                before = descent.value
        return True

    def _merge(self, atoms: Atoms, apart: float = 1e-9) -> Atoms:
        """Balanced atoms; those merged whose directions, also as the data sees them, differ by less than ``apart`` in
        cosine, tiny ones dropped whose scores are tiny too.

        Atoms of one direction do the same work for a larger penalty.
        """
        atoms, sizes = rescale(atoms)
        if not len(atoms):
            return atoms
        size = torch.cat(sizes)
        unit = torch.nn.functional.normalize(atoms.U.flatten(1).double())
        same = (unit @ unit.T > 1 - apart) & (atoms.block.unsqueeze(1) == atoms.block)
        seen = self.oracle.seen(atoms.U, atoms.block)
        if seen is not None:
            same &= seen @ seen.T > 1 - apart
        same.fill_diagonal_(True)
        leader = same.int().argmax(1)
        V = torch.zeros_like(atoms.V).index_add_(
            0, leader, atoms.V * (size.sqrt() / size[leader].sqrt()).view(-1, 1, 1)
        )
        merged = Atoms(atoms.U, V, atoms.block, atoms.intercept).select(leader.unique())
        merged, sizes = rescale(merged)
        size = torch.cat(sizes) if sizes else size[:0]
        keep = size > 1e-7 * size.sum()
        strength = self.oracle.strength(torch.nn.functional.normalize(merged.U.flatten(1)), merged.block)
        if strength is not None:
            effect = size.double() * strength
            keep |= effect > 1e-7 * effect.sum()
        return merged.select(keep)


class ExactRounds(ReLUColumnGeneration):
    """Rounds for problems whose rewards can be bounded: few and thorough, the last step within cones."""

    name = "relu-exact"
    search: ClassVar = {"n_starts": 16, "iterations": 30, "rtol": 1e-7}

    @classmethod
    def lacks(cls, problem: Problem, oracle: NormOracle | None) -> str | None:
        """A tight bound on the dual norm of a ReLU."""
        if oracle is not None and oracle.tight:
            return None
        return "activation='relu' and a problem small enough to bound its dual norm tightly"

    def _price(self, f: Float[Tensor, "n r c"], objective: float) -> tuple[LocalMaxima, float]:
        R = self.problem.residual(f)
        late = self.monitor.out_of_time
        maxima = self.oracle.search(R, warm=self.model, generator=self.generator, late=late, **self.search)
        dual = self._dual(f, float(maxima.values[:1].sum()))
        if objective - dual <= self.target * abs(objective) or self.oracle.method == "faces":
            enough = (1 + 0.1 * self.target) * self.beta
            found = self.oracle.bound(R, maxima, rtol=0.1 * self.target, enough=enough, late=late)
            assert isinstance(found.maxima, LocalMaxima)
            maxima, dual = found.maxima, self._dual(f, found.upper)
        return maxima, dual

    def _decisive(self, gap: float) -> float:
        """The one asked for: iterations cost little."""
        return self.target

    def _grow(self, f: Float[Tensor, "n r c"], maxima: LocalMaxima, noise: float) -> Atoms:
        """Values and lengths are weighed before directions move: a convex problem, a group lasso."""
        new = self._new_atoms(f, maxima, self.batch)
        grown = self.model if new is None else self.model.append(new)
        return self._along(Rays(self.problem, grown), grown, noise) if len(grown) else grown

    def _descend(self, atoms: Atoms, noise: float) -> Atoms:
        return self._along(self.problem, atoms, noise)

    def _along(self, passes: Passes, atoms: Atoms, noise: float) -> Atoms:
        descent = FactoredDescent(passes, atoms, self.beta)
        self._run(descent, self.descent_steps, noise)
        return descent.atoms


class SearchedRounds(ReLUColumnGeneration):
    """Rounds for all other problems: a reward is what a search has found."""

    name = "relu-search"
    search: ClassVar = {"n_starts": 8, "iterations": 12, "rtol": 1e-4}
    wide = 256
    """Value rows of the atoms that a model begins with, where one pricing after another would find them one by one. A
    fourth of them may be added later on at a time."""
    far = 0.1
    """Relative gap above which an estimate counts as this value. Chosen by hand."""
    renewal = 50
    """Number of iterations after which the coordinates of a descent are whitened anew. Chosen by hand."""

    def _set_up(self, start: Atoms) -> None:
        super()._set_up(start)
        rows = self.problem.head.value_rows
        self.batch = max(self.batch, self.wide // 4 // rows)
        self.widest = max(self.batch, self.wide // rows)
        self._dual_point: Tensor | None = None

    @classmethod
    def lacks(cls, problem: Problem, oracle: NormOracle | None) -> str | None:
        """A ReLU."""
        return "activation='relu'" if oracle is None else None

    def dual_point(self) -> Float[Tensor, "n r c"] | None:
        """Return outputs with the best dual point that searches suggest: rewards rise and fall as objectives fall."""
        return self._dual_point

    def state(self) -> tuple[State, State]:
        """Return also the outputs with the best dual point."""
        shared, rows = super().state()
        return shared, rows if self._dual_point is None else {"dual point": self._dual_point}

    def _restore(self, shared: State, rows: State) -> None:
        super()._restore(shared, rows)
        self._dual_point = rows.get("dual point")

    def _price(self, f: Float[Tensor, "n r c"], objective: float) -> tuple[LocalMaxima, float]:
        R = self.problem.residual(f)
        maxima = self.oracle.search(
            R,
            warm=self.model,
            generator=self.generator,
            ascents=self.batch,
            late=self.monitor.out_of_time,
            **self.search,
        )
        dual = self._dual(f, float(maxima.values[:1].sum()))
        if dual > self.monitor.dual:
            self._dual_point = f
        return maxima, dual

    def _decisive(self, gap: float) -> float:
        """The one at hand: far from the optimum new atoms pay more than iterations."""
        return min(gap, self.far)

    def _grow(self, f: Float[Tensor, "n r c"], maxima: LocalMaxima, noise: float) -> Atoms:
        """A model without atoms gets many at once."""
        begun = len(self.model) > 0
        found, most = (maxima, self.batch) if begun else (maxima.merge(self._scattered(f)), self.widest)
        new = self._new_atoms(f, found, most)
        return self.model if new is None else self.model.append(new)

    def _scattered(self, f: Float[Tensor, "n r c"]) -> LocalMaxima:
        """Random directions as they are: ascents would lead many of them to the same few."""
        each = self.widest // self.problem.head.n_groups
        R = self.problem.residual(f)
        return self.oracle.search(R, generator=self.generator, n_starts=each, iterations=0)

    def _descend(self, atoms: Atoms, noise: float) -> Atoms:
        for _ in range(self.descent_steps // self.renewal):
            coordinates = Whitening(self.problem, atoms, self.problem.outputs(atoms), self.beta)
            descent = FactoredDescent(self.problem, atoms, self.beta, coordinates)
            goes_on = self._run(descent, self.renewal, noise)
            atoms = descent.atoms
            if not goes_on:
                break
        return atoms

    def _within_cones(self, atoms: Atoms) -> Atoms:
        """Only where the last round has not helped: kinks, and not rounding, may be what holds the descent up."""
        return super()._within_cones(atoms) if self._since and self.problem.dtype == torch.float64 else atoms


class Rays:
    """Passes of a problem with each atom's mixing weights kept on their ray, where the objective has no kinks."""

    def __init__(self, problem: Problem, atoms: Atoms) -> None:
        self.problem = problem
        self.unit = torch.nn.functional.normalize(atoms.U.flatten(1))

    def value_and_gradient(self, atoms: Atoms, beta: float) -> Evaluation:
        """As `Problem.value_and_gradient`, the gradient along the rays only."""
        whole = self.problem.value_and_gradient(atoms, beta)
        U = whole.gradient.U
        along = (U.flatten(1) * self.unit).sum(1, keepdim=True)
        return whole._replace(gradient=replace(whole.gradient, U=(along * self.unit).view_as(U)))
