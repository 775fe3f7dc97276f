"""Local minimisation over the factors ``U, V`` (and ``b``), by L-BFGS.

    Φ(U, V, b) = F + (β/2) Σ_k (‖U_k‖² + ‖V_k‖²)

Any rank-deficient local minimum whose gradient matrices have spectral norms at most β is a global minimum of the
convex program (Haeffele & Vidal 2020), which is what makes descending here worth while.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.linalg.lbfgs import LBFGS
from convexhead.program.atoms import Atoms
from convexhead.program.problem import Evaluation
from convexhead.solvers.whitening import Whitening


@runtime_checkable
class Passes(Protocol):
    """Whatever evaluates the factored objective: a `Problem`, or its dense features."""

    def value_and_gradient(self, atoms: Atoms, beta: float) -> Evaluation:
        """The objective, its gradients in ``U``, ``V`` and ``b``, and the outputs."""


class FactoredDescent:
    """L-BFGS over the factors of ``atoms``, in ``coordinates`` if there are any; `atoms` is the current iterate."""

    def __init__(self, passes: Passes, atoms: Atoms, beta: float, coordinates: Whitening | None = None) -> None:
        self._objective = _Objective(passes, beta, atoms, coordinates)
        start = atoms if coordinates is None else coordinates.whiten(atoms)
        self.lbfgs = LBFGS(self._objective, pack(start))

    def state(self) -> dict[str, Tensor]:
        """Return what `restored` resumes from."""
        return {**self.atoms.state(), "x": self.lbfgs.x, **self.lbfgs.state()}

    @classmethod
    def restored(
        cls, passes: Passes, state: dict[str, Tensor], beta: float, coordinates: Whitening | None = None
    ) -> FactoredDescent:
        """Return a descent that takes the steps which the one with this `state` would have taken."""
        descent = cls(passes, Atoms.restored(state), beta, coordinates)
        descent.lbfgs.x = state.get("x", descent.lbfgs.x)
        descent.lbfgs.restore(state)
        return descent

    @property
    def atoms(self) -> Atoms:
        return self._objective.weights(self.lbfgs.x)

    @property
    def value(self) -> float:
        return self.lbfgs.value

    @property
    def gradient(self) -> Atoms | None:
        """The gradient at the current iterate; None where it is known in other coordinates alone."""
        return None if self._objective.coordinates is not None else unpack(self.lbfgs.gradient, self._objective.like)

    @property
    def outputs(self) -> Float[Tensor, "n r c"]:
        """``f`` at the current iterate."""
        return self.lbfgs.outputs

    def step(self) -> bool:
        """Take one iteration; False if no further decrease is possible in this precision."""
        return self.lbfgs.step()


@dataclass
class _Objective:
    """``Φ`` as a function of a vector. (Were it a method of the descent, a cycle of references would keep what the
    passes hold, gigabytes of mixed tokens, until it is collected.)"""

    passes: Passes
    beta: float
    like: Atoms
    coordinates: Whitening | None

    def __call__(self, x: Float[Tensor, " m"]) -> tuple[float, Float[Tensor, " m"], Float[Tensor, "n r c"]]:
        atoms = self.weights(x)
        value, gradient, outputs = self.passes.value_and_gradient(atoms, self.beta)
        return value, pack(gradient if self.coordinates is None else self.coordinates.pull(gradient)), outputs

    def weights(self, x: Float[Tensor, " m"]) -> Atoms:
        """The weights whose coordinates are ``x``."""
        atoms = unpack(x, self.like)
        return atoms if self.coordinates is None else self.coordinates.weights(atoms)


def pack(atoms: Atoms) -> Float[Tensor, " m"]:
    return torch.cat([part.flatten() for part in (atoms.U, atoms.V, atoms.intercept)])


def unpack(x: Float[Tensor, " m"], like: Atoms) -> Atoms:
    U, V, b = x.split([like.U.numel(), like.V.numel(), like.intercept.numel()])
    return Atoms(U.view(like.U.shape), V.view(like.V.shape), like.block, b)
