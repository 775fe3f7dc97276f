"""Column generation on factors, for problems whose ``Z`` is too large to form.

Generalised conditional gradient with local search (Zhang, Yu & Schuurmans 2012) at first, active subspace selection
(Hsieh & Olsen 2014) in the end: factors turn towards new directions fast, but atoms come and go slowly there, for which
the nuclear norm on a small matrix is made.

While descending, the dual point is not taken at the iterate but at a running average of the iterates' outputs: any
outputs give a feasible point, and quasi-Newton steps that still swing around the optimum average out.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexhead.dual_norm.norm import NormOracle
from convexhead.linalg.deflation import leading, split_off_model
from convexhead.linalg.gradient_matrices import GradientMatrices
from convexhead.linalg.krylov import BlockKrylov
from convexhead.program.atoms import Atoms, balance
from convexhead.program.problem import Problem
from convexhead.solvers.base import Solver, Stop, scaled_dual
from convexhead.solvers.factored import FactoredDescent, Passes
from convexhead.solvers.increments import Increments
from convexhead.solvers.monitor import State
from convexhead.solvers.pricing import FORMED_STEPS, Directions, lacking_directions, leading_directions, with_best_step
from convexhead.solvers.restriction import Restriction, all_directions, leading_left, solve_restricted
from convexhead.solvers.subspace import Subspace, most_coefficients
from convexhead.solvers.whitening import Whitening


class ColumnGeneration(Solver):
    """Rounds that look for new directions, and then for the best weights in those at hand.

    1. *Price*: leading singular triples ``(σ, a, b)`` of the gradient matrices ``𝒜_j*(R)``; stop where the gap between
       the model and the dual point of ``R`` is small.
    2. *Far away*, append atoms ``(−√t a, √t b)`` for ``σ > β`` with ``t`` from a line search; L-BFGS over all factors;
       balance, and drop small atoms on their way out.
    3. *Near*, take proximal Newton steps over the span of the model and of the leading directions, which find the rank;
       L-BFGS over the factors again where that span was what held them up.
    4. Where values have few entries, from the start and in place of 2 and 3: a whole solve over mixing directions
       (`convexhead.solvers.restriction`).

    One `step` is one round. Parameters are those of `Solver`.
    """

    name = "column-generation"
    keeps_state = True
    batch = 8
    """Largest number of atoms that the first pricing adds. Measured by benchmarks/ablation.py."""
    steps = 25
    """L-BFGS iterations of a round. Measured by benchmarks/ablation.py."""
    near = 0.1
    """Relative gap below which Newton steps begin. Measured by benchmarks/ablation.py."""
    late = 1e-2
    """Relative gap below which restricted solves also take the last round's directions. Chosen by hand."""
    small = 1e-2
    """Size of an atom, relative to the largest, under which it is dropped when the gradient along it is below β."""
    most_steps = 2000
    patience: ClassVar = {torch.float32: 15, torch.float64: 60}
    """Rounds without a better gap after which a precision has given what it can."""
    noise: ClassVar = {torch.float32: 5e-7, torch.float64: 1e-15}
    """Relative decrease of the objective in a round that means nothing in a precision."""
    memory = 0.85
    """Weight of the past in the running average of outputs. Chosen by hand."""

    def _set_up(self, start: Atoms) -> None:
        self._warm: Tensor | None = None
        self._past: Tensor | None = None  # left directions of the last restriction
        self._average: Tensor | None = None
        self._atoms = start
        self._take(self.problem)

    @classmethod
    def lacks(cls, problem: Problem, oracle: NormOracle | None) -> str | None:
        """A convex program of atoms."""
        if problem.head.learns_mixing and problem.activation.convex:
            return None
        return "a head with mixing weights, and a linear or gated activation"

    def dual_point(self) -> Float[Tensor, "n r c"] | None:
        """Return the average of the last descent's outputs; None after other steps."""
        return self._average

    def atoms(self) -> Atoms:
        """Return the current model."""
        return self._atoms

    def take_vectors(self, vectors: Float[Tensor, "j big m"]) -> None:
        """Begin the next pricing at singular vectors that a certificate found, which may be ones it would miss."""
        self._warm = vectors.to(self.problem.device, self.problem.dtype)

    def refine(self) -> Problem:
        """Go on from the current model and directions."""
        self.rough = self.problem  # first, to make room
        self._take(self.problem.astype(torch.float64, reuse=True))
        return self.problem

    def _take(self, problem: Problem) -> None:
        self.problem, self._average = problem, None
        self.rough = problem.with_half_products() or problem
        self._atoms = self._atoms.to(problem.device, problem.dtype)
        self._warm, self._past = (None if x is None else x.to(problem.dtype) for x in (self._warm, self._past))

    def state(self) -> tuple[State, State]:
        """Return the model, the directions to begin at, and how the rounds went."""
        rounds = [self._gap, self._best, self._since, self._on_span, self.small]
        shared = {"round": torch.tensor(rounds, dtype=torch.float64), **self._atoms.state()}
        for name, tensor in (("warm", self._warm), ("past", self._past)):
            if tensor is not None:
                shared[name] = tensor
        return shared, {} if self._average is None else {"average": self._average}

    def _restore(self, shared: State, rows: State) -> None:
        self._gap, self._best, self._since, on_span, self.small = shared["round"].tolist()
        self._on_span = bool(on_span)
        self._warm, self._past, self._average = shared.get("warm"), shared.get("past"), rows.get("average")
        self._atoms = Atoms.restored(shared)

    def begin(self) -> None:
        """Forget how the rounds went."""
        self._gap, self._best, self._since, self._on_span = 1.0, math.inf, 0.0, False

    def step(self) -> Stop | None:
        """Take one round."""
        before, near = self._gap, self._can_use_span(self._gap)
        f = self.problem.outputs(self._atoms)
        gap, directions = self._price(f, before, lacking=not near)
        self._gap = gap
        if gap <= self.target:
            return Stop.CONVERGED
        self._best, self._since = (gap, 0.0) if gap < 0.95 * self._best else (self._best, self._since + 1)
        if self._since > self.patience[self.problem.dtype]:
            return self._ended(len(self._atoms))
        if near and (not self._on_span or gap < 0.5 * before):
            self._solve_on_span(f, directions, gap)
            self._on_span = moved = True
        else:
            if not near and self._prune(f, min(0.02, 2 * gap)) & self._grow(f, directions):
                self.small /= 2  # what was dropped may just have come back
            del f  # of many samples outputs are what takes memory
            moved = len(self._atoms) > 0 and self._descend(self.steps)
            self._on_span = False
        return None if moved else self._ended(len(self._atoms))

    # -- far away -----------------------------------------------------------------------------------------------------
    def _descend(self, steps: int) -> bool:
        """A round of L-BFGS over the factors; False if the objective did not move."""
        problem, rough, start = self.problem, self.rough, self._atoms
        passes: Passes = problem
        if Increments.affordable(problem, rough, start):
            passes = increments = Increments(problem, rough, start)
            f = increments.outputs
        else:
            f = problem.outputs(start)
        descent = FactoredDescent(passes, start, self.beta, Whitening(rough, start, f, self.beta))
        del f
        before, self._average = descent.value, None
        for step in range(steps):
            if self.monitor.out_of_time() or not descent.step():
                break
            if step >= steps // 2:
                latest = descent.outputs
                if self._average is None:
                    self._average = latest.clone()
                else:
                    torch.lerp(latest, self._average, self.memory, out=self._average)
            if descent.lbfgs.evaluations > 2 * steps:
                break  # many evaluations a step are a sign that rounding hides the decrease
        self._atoms = balance(descent.atoms, drop=1e-7)[0]
        self.monitor.record(descent.value, -torch.inf, len(self._atoms))
        return before - descent.value > self.noise[problem.dtype] * abs(before)

    def _prune(self, f: Float[Tensor, "n r c"], margin: float) -> bool:
        """Drop small atoms on their way out, the gradient along them below β by ``margin``; whether there were any."""
        atoms = self._atoms
        if not len(atoms):
            return False
        R = self.problem.residual(f if self._average is None else self._average)
        size = atoms.U.flatten(1).square().sum(1)  # of balanced atoms
        along = (self.rough.operator.adjoint_times_mixing(R, atoms.U, atoms.block) * atoms.V).sum((1, 2))
        keep = (size > self.small * size.max()) | (-along > (1 - margin) * self.beta * size)
        self._atoms = atoms.select(keep)
        return not bool(keep.all())

    def _grow(self, f: Float[Tensor, "n r c"], directions: Directions) -> bool:
        """Append atoms in the directions with ``σ > β``; whether there are any."""
        sigma, left, right = directions
        room = self.batch if self.max_heads is None else min(self.batch, self.max_heads - len(self._atoms))
        picked = (sigma > self.beta * (1 + 1e-6)).nonzero()
        if not len(picked) or room <= 0:
            return False
        strength = sigma[picked[:, 0], picked[:, 1]]
        j, k = picked[strength.argsort(descending=True)[:room]].unbind(1)
        new = self._new_atoms(f, sigma[j, k], left[j, :, k], right[j, :, k], j)
        self._average = None
        self._atoms = self._atoms.append(new)
        return True

    # -- near ---------------------------------------------------------------------------------------------------------
    def _can_use_span(self, gap: float) -> bool:
        """Whether Newton steps over the model's span and more are affordable, and the model is near enough."""
        if self.max_heads is not None:
            return False
        if self._restricts():
            return True
        if gap > self.near or not len(self._atoms):
            return False
        one = self.problem.losses.at(slice(0, 1))
        if one.hessian_root(one.Y, one.Y) is None:
            return False
        return self._beside(self._widest()) >= self._extra()

    def _widest(self) -> int:
        """Atoms of the block that has the most."""
        return int(torch.bincount(self._atoms.block).max())

    def _beside(self, widest: int) -> int:
        """Directions a block that steps go over beside the model's own: more make a step dearer, not better."""
        side = math.isqrt(most_coefficients(self.problem.n, self.problem.device) // self.problem.n_blocks)
        return min(widest // 2 + self._extra(), side - widest)

    def _restricts(self) -> bool:
        """Whether solves go over mixing directions alone."""
        return Restriction.affordable(self.problem, self._atoms)

    def _extra(self) -> int:
        """Directions a block that is looked for beside as many as the model has."""
        return 6 if self.problem.n_blocks == 1 else 1

    def _solve_on_span(self, f: Float[Tensor, "n r c"], directions: Directions, gap: float) -> None:
        """Solve over the span of the model and of the leading directions."""
        if self._restricts():
            left = leading_left(directions, self.beta)
            past = [self._past] if self._past is not None and gap <= self.late else []
            both = torch.cat([left, *past], dim=2)
            self._atoms = solve_restricted(
                self.problem, self._atoms, both, self.beta, until=0.25 * gap, monitor=self.monitor
            )
            self._past, self._average = left, None
            return
        most = Directions(*(part[..., : self._beside(self._widest())] for part in directions))
        subspace = Subspace(self.problem, self.rough, self._atoms, f, most)
        M = subspace.solve(self.beta, until=0.25 * gap, generator=self.generator)
        self._atoms, self._average = subspace.atoms(M), None

    # -- both ---------------------------------------------------------------------------------------------------------
    def _price(self, f: Float[Tensor, "n r c"], last: float, *, lacking: bool) -> tuple[float, Directions]:
        """The estimated relative gap, recorded, and leading directions: of the gradient matrices, or of what the model
        is ``lacking``. ``last`` is the gap before."""
        problem, atoms = self.problem, self._atoms
        point = f if self._average is None else self._average
        R = problem.residual(point)
        if not lacking and self._restricts():
            directions = all_directions(problem, R)
            return self._record(f, point, float(directions.sigma.max())), directions
        # Far away rough products say enough; near the optimum what they miss would cost a certificate.
        exact = GradientMatrices(problem.operator, R, form=last <= self.near)
        G = GradientMatrices(self.rough.operator, R, form=False) if exact.formed is None else exact
        model = split_off_model(G, atoms)
        if lacking:
            directions, self._warm = lacking_directions(model, self._warm, self.batch, self.generator)
            norm = float(directions.sigma.max())
            if len(atoms):
                steps = 2 if G.formed is None else FORMED_STEPS
                krylov, *_ = leading(G, atoms, extra=2, steps=steps, generator=self.generator)
                if krylov is None:  # hardly more directions than atoms: look in all of them
                    blocks = torch.arange(problem.n_blocks, device=R.device)
                    krylov = BlockKrylov(G.gram, G.random_start(blocks, G.order, self.generator), blocks, G.order)
                    krylov.step()
                norm = max(norm, float(krylov.values.max().sqrt()))
        else:
            directions, self._warm = leading_directions(model, exact, self._warm, self._extra(), self.generator)
            norm = float(directions.sigma.max())
        return self._record(f, point, norm), directions

    def _record(self, f: Float[Tensor, "n r c"], point: Float[Tensor, "n r c"], norm: float) -> float:
        """The estimated relative gap, recorded, of the model's outputs and of the dual point at others."""
        problem, atoms = self.problem, self._atoms
        objective = problem.data_term(f) + self.beta * problem.penalty(atoms)
        dual = scaled_dual(problem, point, norm, self.beta, atoms.intercept)
        return self.monitor.record(objective, dual, len(atoms))

    def _new_atoms(
        self,
        f: Float[Tensor, "n r c"],
        sigma: Float[Tensor, " k"],
        left: Float[Tensor, "k p"],
        right: Float[Tensor, "k q"],
        block: Int[Tensor, " k"],
    ) -> Atoms:
        """Atoms ``−t w_k a_k b_kᵀ``, ``w_k = σ_k − β``, with the best common ``t``: the outputs are linear in it."""
        problem = self.problem
        root = (sigma - self.beta).sqrt().unsqueeze(1)
        new = Atoms(
            (-root * left).view(-1, *problem.head.mixing_shape),
            problem.mask_values((root * right).view(-1, *problem.value_shape), block),
            block,
            f.new_zeros(problem.c),
        )
        return with_best_step(problem, f, new, sigma - self.beta, self.beta)
