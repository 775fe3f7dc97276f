"""A bound from above on ``max_j ‖𝒜_j*(R)‖₂`` for gradient matrices that are too large to decompose."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convexhead.linalg.deflation import split_off_leading, split_off_more
from convexhead.linalg.gradient_matrices import GradientMatrices
from convexhead.linalg.krylov import BlockKrylov, relative_slack
from convexhead.program.atoms import Atoms

ENOUGH_STEPS = 20
"""Number of Krylov steps from random starts that should bound the remainder tightly enough. Chosen by hand."""
MOST_SPLITS = 3
"""Largest number of times that more directions are split off. Chosen by hand."""


class KrylovBound:
    """Ever tighter bounds ``lower ≤ max_j ‖G_j‖₂ ≤ upper``, the upper one with a failure probability.

    Approximate leading singular directions are split off, the norm of what is left is at most ``σ̂/√(1 − ε)`` after a
    Krylov iteration from random starts, and the norms of all parts bound that of the whole (`Deflated`). Splitting
    pays: what is left lies below β, so a crude ``ε`` will do. Blocks whose norm is known to lie below the largest lower
    bound are closed and cost nothing more.

    Parameters
    ----------
    G : GradientMatrices
        In float64.
    fast : GradientMatrices
        The same matrices in a precision that may be lower, in which directions to split off are looked for.
    directions : Atoms
        The model's, where that search begins.
    tol : float
        The relative gap asked for.
    failure_probability : float
        Of the bound, over all blocks and all steps together.
    generator : torch.Generator
        Source of the random starts.

    Attributes
    ----------
    floor : float
        What ``upper`` cannot fall below while the same directions are split off.
    splits : int
        How often more directions were split off.
    """

    def __init__(
        self,
        G: GradientMatrices,
        fast: GradientMatrices,
        directions: Atoms,
        tol: float,
        failure_probability: float,
        generator: torch.Generator,
    ) -> None:
        j = G.operator.n_blocks
        self.order, self.failure, self._generator = G.order, failure_probability / j / 2, generator
        self.lower, self.upper, self._closed = 0.0, math.inf, 0.0
        self.splits, self.floor = 0, 0.0
        self.deflated = split_off_leading(G, fast, directions, extra=4, steps=12, generator=generator, rtol=0.1 * tol)
        # Many starts share one pass over the tokens; with many blocks a pass is full already.
        self._starts = min(4 if j == 1 else 2, G.order)
        self.krylov = self._krylov(torch.arange(j, device=G.R.device))

    def _krylov(self, blocks: Tensor) -> BlockKrylov:
        G = self.deflated.G
        start = G.random_start(blocks, self._starts, self._generator)
        return BlockKrylov(self.deflated.gram, start, blocks, G.order)

    def step(self) -> bool:
        """Take one Krylov step; False where there is nothing more to find."""
        if not len(self.krylov.blocks) or (self.krylov.steps and not self.krylov.can_step()):
            return False
        if self.krylov.steps >= ENOUGH_STEPS and self.splits < MOST_SPLITS:
            # What is left is about as large as the whole: what was found of it is split off too.
            self.deflated = split_off_more(self.deflated, self.krylov)
            self.splits += 1
            self.failure /= 2
            self.krylov = self._krylov(self.krylov.blocks)
        krylov = self.krylov
        krylov.step()
        found = krylov.values[:, -1].sqrt()
        if not bool(torch.isfinite(found).all()):
            return False  # comparisons with NaN would pass for a bound
        inner = self.deflated.inner[krylov.blocks]
        self.lower = max(self.lower, float(torch.maximum(inner, found).max()))
        self.floor = max(self._closed, float(self.deflated.norm(found, krylov.blocks).max()))
        # The caller may stop at any step that suits it, so all of them must hold at once: Σ_k 1/(k(k + 1)) = 1.
        share = self.failure / (krylov.steps * (krylov.steps + 1))
        epsilon = relative_slack(self.order, krylov.steps, krylov.starts, share)
        if epsilon < 1:
            upper = self.deflated.norm(found / math.sqrt(1 - epsilon), krylov.blocks)
            self.upper = min(self.upper, max(self._closed, float(upper.max())))
            open_ = upper > self.lower
            if not open_.all():
                self._closed = max(self._closed, float(upper[~open_].max()))
                krylov.keep(open_)
        return True
