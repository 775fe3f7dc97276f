"""Local minimisation over the factors ``U, V`` (and ``b``) at a fixed number of atoms.

    Φ(U, V, b) = F + (β/2) Σ_k (‖U_k‖² + ‖V_k‖²)

Any rank-deficient local minimum whose gradient matrices have spectral norms at most β is a global minimum of the
convex program (Haeffele & Vidal 2020), which is what makes descending here worth while.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.problem import Atoms
from convexhead.solvers.lbfgs import LBFGS


@runtime_checkable
class Passes(Protocol):
    """Whatever evaluates the factored objective: a `Problem`, or its dense features."""

    def value_and_gradient(self, atoms: Atoms, beta: float) -> tuple[float, Tensor, Tensor, Tensor]:
        """The objective and its gradients in ``U``, ``V`` and ``b``."""


class FactoredDescent:
    """L-BFGS over the factors of ``atoms``; `atoms` is the current iterate."""

    def __init__(self, passes: Passes, atoms: Atoms, beta: float) -> None:
        self.passes, self.beta, self._shape = passes, beta, atoms
        self.lbfgs = LBFGS(self._function, torch.cat([p.flatten() for p in (atoms.U, atoms.V, atoms.intercept)]))

    def _unpack(self, x: Float[Tensor, " m"]) -> Atoms:
        like = self._shape
        U, V, b = x.split([like.U.numel(), like.V.numel(), like.intercept.numel()])
        return Atoms(U.view(like.U.shape), V.view(like.V.shape), like.block, b)

    def _function(self, x: Tensor) -> tuple[float, Tensor]:
        value, *gradients = self.passes.value_and_gradient(self._unpack(x), self.beta)
        return value, torch.cat([g.flatten() for g in gradients])

    @property
    def atoms(self) -> Atoms:
        return self._unpack(self.lbfgs.x)

    @property
    def value(self) -> float:
        return self.lbfgs.value

    def step(self) -> bool:
        """One iteration; False where no further decrease is possible in this precision."""
        return self.lbfgs.step()
