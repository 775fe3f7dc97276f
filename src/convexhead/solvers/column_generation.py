"""Column generation on factors, for problems whose ``Z`` is too large to form.

    repeat
        price:   singular triples (σ, a, b) of the gradient matrices, the model's own directions split off
        grow:    append atoms (−√t a, √t b) for σ > β, with t from a line search
        descend: L-BFGS over all factors
        prune:   drop small atoms that the penalty is shrinking to nothing
        stop:    when the scaled dual point says that the gap is small enough

Generalised conditional gradient with local search (Zhang, Yu & Schuurmans 2012). Splitting the model's own directions
off matters: in the tail the largest singular values exceed β only because those directions are not settled yet, and
more atoms there would slow the descent down. So does pruning early: an atom on its way out decays slowly.

The dual point is not taken at the iterate but at a running average of the iterates' outputs: any outputs give a
feasible point, and quasi-Newton steps that still swing around the optimum average out. That halves the gap for nothing.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor

from convexhead.problem import Atoms, Problem
from convexhead.solvers.base import Monitor, Stop, scaled_dual
from convexhead.solvers.factored import FactoredDescent
from convexhead.spectral import GradientMatrices, leading, split_off_model, top_singular


class ColumnGeneration:
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
        Atoms the model may have.
    generator : torch.Generator
        Source of the random starts of pricing.
    """

    batch = 32
    """Atoms that the first pricing may add."""
    descent_steps = 20
    """L-BFGS iterations between two pricings."""
    small = 1e-2
    """Size of an atom, relative to the largest, under which it is dropped when the gradient along it is below β."""
    max_rounds = 2000
    patience: ClassVar = {torch.bfloat16: 3, torch.float32: 15, torch.float64: 60}
    """Rounds without a better gap after which a precision of the products has given what it can."""
    noise: ClassVar = {torch.bfloat16: 1e-3, torch.float32: 5e-7, torch.float64: 1e-15}
    """Relative decrease of the objective in a round that means nothing in a precision of the products."""
    memory = 0.85
    """Weight of the past in the running average of outputs."""

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
        self._start = start
        self._running: FactoredDescent | None = None
        self._warm: Tensor | None = None
        self._average: Tensor | None = None
        self._resumed: tuple[float, ...] = ()

    @property
    def _descent(self) -> FactoredDescent:
        assert self._running is not None, "no atoms yet"
        return self._running

    def witness(self) -> Float[Tensor, "n r c"] | None:
        """Outputs to take the dual point at; None for the model's own."""
        return self._average

    def atoms(self) -> Atoms:
        """The current model."""
        return self._start if self._running is None else self._descent.atoms

    def refine(self, problem: Problem) -> None:
        """Go on from the current model with the same problem in another precision."""
        self._start = self.atoms().to(problem.device, problem.dtype)
        self.problem, self._running, self._average = problem, None, None
        if self._warm is not None:
            self._warm = self._warm.to(problem.dtype)

    def _state(self, *between: float | int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the rounds to come depend on, given what `advance` knows between two of them."""
        shared = {"round": torch.tensor([*between, self.small], dtype=torch.float64)}
        shared.update(self.atoms().state() if self._running is None else self._running.state())
        rows = {} if self._running is None else {"outputs": self.problem.last_outputs}
        if self._warm is not None:
            shared["warm"] = self._warm
        if self._average is not None:
            rows["average"] = self._average
        return shared, rows

    def restore(self, shared: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
        """Go on from a checkpoint: its tensors, and those of this process's samples."""
        *between, self.small = shared["round"].tolist()
        self._resumed = tuple(between)
        self._warm, self._average = shared.get("warm"), rows.get("average")
        if "outputs" in rows:
            self._running = FactoredDescent.restored(self.problem, shared, self.beta)
            self.problem.last_outputs = rows["outputs"]
        else:
            self._start = Atoms.restored(shared)

    def advance(self, target: float) -> Stop:
        """Rounds until the estimated relative gap is at most ``target``."""
        stuck, gap, best, since = self._resumed or (0, 1.0, float("inf"), 0)
        self._resumed = ()
        patience = self.patience[self.problem.products]
        for _ in range(self.max_rounds):
            self.monitor.offer(partial(self._state, stuck, gap, best, since))
            pruned = self._prune(min(0.02, 2 * gap))
            gap, new = self._price()
            if gap <= target:
                return Stop.CONVERGED
            best, since = (gap, 0) if gap < 0.95 * best else (best, since + 1)
            if since > patience:
                return Stop.STALLED
            if new is None and not len(self.atoms()):
                return Stop.STALLED
            if new is not None and pruned:
                self.small /= 2  # what was dropped may just have come back
            self._grow(new)
            before = self._descent.value
            moved = self._descend(target)
            if self.monitor.out_of_time():
                return Stop.TIME
            resting = not moved or before - self._descent.value <= self.noise[self.problem.products] * abs(before)
            if resting and self.problem.products != self.problem.dtype:
                return Stop.STALLED
            if resting:
                self._average = None  # nothing to average out any more
            stuck = stuck + 1 if new is None and resting else 0
            if stuck == 2:
                full = self.max_heads is not None and len(self.atoms()) >= self.max_heads
                return Stop.HEADS if full else Stop.STALLED
        return Stop.STALLED

    def _descend(self, target: float) -> bool:
        """Up to `descent_steps` iterations, fewer when the gap may have closed; False if nothing moved."""
        for step in range(self.descent_steps):
            if self.monitor.out_of_time():
                return True
            if not self._descent.step():
                return step > 0
            latest = self.problem.last_outputs
            self._average = latest if self._average is None else torch.lerp(latest, self._average, self.memory)
            if step % 5 == 4:
                gap = self.monitor.record(self._descent.value, -torch.inf, len(self._descent.atoms))
                best_case = scaled_dual(self.problem, latest, self._inner_norm(), self.beta)
                if gap > target and self._descent.value - best_case <= 0.5 * target * abs(self._descent.value):
                    return True
        return True

    def _alignment(self) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
        """Size ``‖U_k‖‖V_k‖`` of each atom, and ``−⟨u, G v⟩/β`` for its unit directions: 1 at a stationary point."""
        atoms, gradient = self._descent.atoms, self._descent.gradient
        U, V = atoms.U.flatten(1), atoms.V.flatten(1)
        size = (U.norm(dim=1) * V.norm(dim=1)).clamp_min(torch.finfo(U.dtype).tiny)
        along = ((gradient.U.flatten(1) - self.beta * U) * U).sum(1)
        return size, -along / (self.beta * size)

    def _inner_norm(self) -> float:
        """``‖G V (VᵀV)^{-1/2}‖ ≤ ‖G‖``, largest over blocks: all that the gradient of the factors says of the norm."""
        atoms, gradient = self._descent.atoms, self._descent.gradient
        largest = 0.0
        for block in torch.unique(atoms.block).tolist():
            mine = atoms.block == block
            V = atoms.V[mine].flatten(1).double()
            scale = V.norm(dim=1, keepdim=True).clamp_min(1e-300)
            GV = (gradient.U[mine].flatten(1) - self.beta * atoms.U[mine].flatten(1)).double() / scale
            values, Q = torch.linalg.eigh((V / scale) @ (V / scale).T)
            whitened = (Q / values.clamp_min(1e-10).sqrt()).T @ GV
            largest = max(largest, float(torch.linalg.eigvalsh(whitened @ whitened.T)[-1].clamp_min(0).sqrt()))
        return largest

    def _prune(self, margin: float) -> bool:
        """Drop small atoms on their way out, the gradient along them below β by ``margin``; whether there were any."""
        if self._running is None:
            return False
        self._descent.principal()
        size, alignment = self._alignment()
        keep = (size > self.small * size.max()) | (alignment > 1 - margin)
        keep &= size > 1e-9 * size.max()
        if bool(keep.all()):
            return False
        self._descent.change(keep, None)
        return True

    def _grow(self, new: Atoms | None) -> None:
        if self._running is None:
            atoms = self._start if new is None else self._start.append(new)
            self._running = FactoredDescent(self.problem, atoms, self.beta)
        elif new is not None:
            self._average = None
            everything = torch.ones(len(self.atoms()), dtype=torch.bool, device=self.problem.device)
            self._descent.change(everything, new)

    def _price(self) -> tuple[float, Atoms | None]:
        """The estimated relative gap, recorded, and new atoms, None where there are none to add."""
        problem, atoms = self.problem, self.atoms()
        f = problem.outputs(atoms) if self._running is None else problem.last_outputs
        point = f if self._average is None else self._average
        G = GradientMatrices(problem, problem.residual(point))
        lacking = split_off_model(G, atoms)
        sigma, left, right = self._triples(lacking, G)
        norm = float(sigma.max())
        objective = problem.data_term(f) + self.beta * problem.penalty(atoms)
        if len(atoms):
            krylov, *_ = leading(G, atoms, extra=2, steps=2, generator=self.generator)
            norm = max(norm, float(lacking.inner.max() if krylov is None else krylov.values.max().sqrt()))
        gap = self.monitor.record(objective, scaled_dual(problem, point, norm, self.beta), len(atoms))
        room = self.batch if self.max_heads is None else min(self.batch, self.max_heads - len(atoms))
        picked = (sigma > self.beta * (1 + 1e-6)).nonzero()
        if not len(picked) or room <= 0:
            return gap, None
        strength = sigma[picked[:, 0], picked[:, 1]]
        j, k = picked[strength.argsort(descending=True)[:room]].unbind(1)
        return gap, self._new_atoms(f, sigma[j, k], left[j, :, k], right[j, :, k], j)

    def _triples(self, lacking, G: GradientMatrices):  # type: ignore[no-untyped-def]
        """Leading singular triples of what the model lacks; from random vectors first, then from the last ones."""
        problem = self.problem
        blocks = torch.arange(problem.n_blocks, device=problem.device)
        several = problem.n_blocks > 1
        if self._warm is None:
            start = G.random_start(blocks, min(4 if several else self.batch, G.order), self.generator)
        else:
            noise = G.random_start(blocks, self._warm.shape[2], self.generator) / self._warm.shape[1] ** 0.5
            start = self._warm + 0.1 * noise
        sigma, left, right, warm = top_singular(lacking, start, rtol=2e-3, max_steps=30)
        self._warm = warm[:, :, : min(2 if several else 8, warm.shape[2])]
        return sigma, left, right

    def _new_atoms(
        self,
        f: Float[Tensor, "n r c"],
        sigma: Float[Tensor, " k"],
        left: Float[Tensor, "k p"],
        right: Float[Tensor, "k q"],
        block: Tensor,
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
        change = problem.outputs(new)
        added = self.beta * float((sigma - self.beta).sum())
        slope = float((sigma - self.beta).square().sum())
        step = slope / problem.mean(change.double().square().sum((1, 2)))
        best = minimize_scalar(
            lambda t: problem.data_term(f + t * change) + t * added,
            bounds=(0.0, 20 * step),
            method="bounded",
            options={"maxiter": 30},
        ).x
        scale = float(best) ** 0.5
        new.U, new.V = scale * new.U, scale * new.V
        return new
