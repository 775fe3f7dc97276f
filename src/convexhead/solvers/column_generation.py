"""Column generation on factors, for problems whose ``Z`` is too large to form.

    repeat
        price:   singular triples (σ, a, b) of the gradient matrices, the model's own directions split off
        stop     when the scaled dual point says that the gap is small enough
        grow:    append atoms (−√t a, √t b) for every σ > β, with t from a line search
        descend: L-BFGS over all factors
        balance, and drop atoms that vanished

Generalised conditional gradient with local search (Zhang, Yu & Schuurmans 2012). Splitting the model's own directions off
matters: in the tail the largest singular values exceed β only because those directions are not settled yet, and
more atoms there would slow the descent down.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor

from convexhead.problem import Atoms, Problem, balance
from convexhead.solvers.base import Monitor, Stop, scaled_dual
from convexhead.solvers.factored import FactoredDescent
from convexhead.spectral import Deflated, GradientMatrices, top_singular


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
    """Atoms that a round may add."""
    descent_steps = 20
    """L-BFGS iterations between two pricings."""
    max_rounds = 2000

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
        self._atoms = start
        self._descent: FactoredDescent | None = None
        self._warm: Tensor | None = None
        # Singular value, relative to the largest, at which an atom is dropped; lowered when one that was is priced
        # back in, or small atoms of the optimum would come and go for ever.
        self._vanished = 3e-4

    def atoms(self) -> Atoms:
        """The current model."""
        return self._atoms if self._descent is None else self._descent.atoms

    def advance(self, target: float) -> Stop:
        """Rounds until the estimated relative gap is at most ``target``."""
        stuck = 0
        for _ in range(self.max_rounds):
            balanced, _ = balance(self.atoms(), drop=self._vanished)
            dropped = len(balanced) < len(self.atoms())
            if dropped:
                self._atoms, self._descent = balanced, None
            gap, grown = self._price(balanced)
            if gap <= target:
                return Stop.CONVERGED
            if grown is not None:
                self._atoms, self._descent = grown, None
                if dropped:
                    self._vanished /= 10
            elif len(balanced) == 0:
                return Stop.STALLED
            if self._descent is None:
                self._descent = FactoredDescent(self.problem, self._atoms, self.beta)
            before = self._descent.value
            for _ in range(self.descent_steps):
                if self.monitor.out_of_time():
                    return Stop.TIME
                if not self._descent.step():
                    break
            floor = 4 * torch.finfo(self.problem.dtype).eps * abs(before)
            stuck = stuck + 1 if before - self._descent.value <= floor and grown is None else 0
            if stuck == 2:
                return Stop.HEADS if self._full(self.atoms()) else Stop.STALLED
        return Stop.STALLED

    def _full(self, atoms: Atoms) -> bool:
        return self.max_heads is not None and len(atoms) >= self.max_heads

    def _price(self, atoms: Atoms) -> tuple[float, Atoms | None]:
        """The estimated relative gap, recorded, and the model with new atoms, None where there are none to add."""
        f = self.problem.outputs(atoms)
        R = self.problem.residual(f)
        G = GradientMatrices(self.problem, R)
        deflated = Deflated(G, atoms)
        blocks = torch.arange(self.problem.n_blocks, device=self.problem.device)
        if self._warm is None:
            first = min(self.batch if self.problem.n_blocks == 1 else 4, G.order)
            self._warm = G.random_start(blocks, first, self.generator)
        sigma, left, right, warm = top_singular(deflated, self._warm, rtol=2e-3, max_steps=30)
        keep = min(8 if self.problem.n_blocks == 1 else 2, warm.shape[2])
        self._warm = warm[:, :, :keep]
        self._warm = self._warm + 1e-3 * self._warm.norm(dim=1, keepdim=True) * G.random_start(
            blocks, keep, self.generator
        ) / warm.shape[1] ** 0.5
        norm = float(deflated.norm(sigma[:, 0], blocks).max())
        objective = self.problem.data_term(f) + self.beta * self.problem.penalty(atoms)
        gap = self.monitor.record(objective, scaled_dual(self.problem, f, norm, self.beta), len(atoms))
        room = self.batch if self.max_heads is None else min(self.batch, self.max_heads - len(atoms))
        picked = (sigma > self.beta * (1 + 1e-6)).nonzero()
        if not len(picked) or room <= 0:
            return gap, None
        strength = sigma[picked[:, 0], picked[:, 1]]
        picked = picked[strength.argsort(descending=True)[:room]]
        j, k = picked.unbind(1)
        return gap, self._append(atoms, f, sigma[j, k], left[j, :, k], right[j, :, k], j)

    def _append(
        self,
        atoms: Atoms,
        f: Float[Tensor, "n r c"],
        sigma: Float[Tensor, " k"],
        left: Float[Tensor, "k p"],
        right: Float[Tensor, "k q"],
        block: Tensor,
    ) -> Atoms:
        """New atoms ``−t w_k a_k b_kᵀ``, ``w_k = σ_k − β``, with the best common ``t``: the outputs are linear in it."""
        root = (sigma - self.beta).sqrt().unsqueeze(1)
        new = Atoms(
            (-root * left).view(-1, *self.problem.head.mixing_shape),
            self.problem.mask_values((root * right).view(-1, *self.problem.value_shape), block),
            block,
            torch.zeros_like(atoms.intercept),
        )
        change = self.problem.outputs(new)
        added = self.beta * float((sigma - self.beta).sum())
        slope = float((sigma - self.beta).square().sum())
        step = slope / (float(change.double().square().sum()) / self.problem.n)
        best = minimize_scalar(
            lambda t: self.problem.data_term(f + t * change) + t * added,
            bounds=(0.0, 20 * step),
            method="bounded",
            options={"maxiter": 30},
        ).x
        scale = float(best) ** 0.5
        new.U, new.V = scale * new.U, scale * new.V
        return atoms.append(new)
