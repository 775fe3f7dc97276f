"""Outputs of the last models of the linear head: along a path each is scored, and the next fit begins at two of them.

They cost as much as a product with the Hessian, and a fit of a path takes two or three of those.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.program.atoms import Atoms

KEPT = 3
"""Models whose outputs are kept. Derived: the last two of a path, and the start between them."""


@dataclass
class RecentOutputs:
    """Outputs ``f (n, r, c)`` of some models, class by class as passes of the linear head want them.

    They are in float64, since what begins at them are small differences.
    """

    _kept: list[tuple[Tensor, Tensor, Float[Tensor, "n r c"]]] = field(default_factory=list)

    def keep(self, atoms: Atoms, f: Float[Tensor, "n r c"]) -> None:
        """Keep copies of ``atoms`` and of their outputs, and forget the oldest."""
        f = f.movedim(2, 0).to(torch.float64, memory_format=torch.contiguous_format, copy=True).movedim(0, 2)
        self._kept = [*self._kept, (atoms.V.clone(), atoms.intercept.clone(), f)][-KEPT:]

    def of(self, atoms: Atoms) -> Float[Tensor, "n r c"] | None:
        """The outputs of ``atoms``, not to be changed; None where they are not known.

        Weights are compared in the precision of ``atoms``. Another intercept is another constant in the outputs.
        """
        for V, intercept, f in self._kept:
            if torch.equal(V.to(atoms.V.dtype), atoms.V):
                shift = (atoms.intercept - intercept.to(atoms.intercept.dtype)).double()
                return f + shift if bool(shift.any()) else f
        return None
