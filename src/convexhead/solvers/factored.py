"""Local minimisation over the factors ``U, V`` (and ``b``), by L-BFGS.

    Φ(U, V, b) = F + (β/2) Σ_k (‖U_k‖² + ‖V_k‖²)

Any rank-deficient local minimum whose gradient matrices have spectral norms at most β is a global minimum of the
convex program (Haeffele & Vidal 2020), which is what makes descending here worth while. Atoms may come and go
without the quasi-Newton memory of the others being lost.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convexhead.problem import Atoms
from convexhead.solvers.lbfgs import LBFGS


@runtime_checkable
class Passes(Protocol):
    """Whatever evaluates the factored objective: a `Problem`, or its dense features."""

    def value_and_gradient(self, atoms: Atoms, beta: float) -> tuple[float, Tensor, Tensor, Tensor]:
        """The objective and its gradients in ``U``, ``V`` and ``b``."""


class FactoredDescent:
    """L-BFGS over the factors of ``atoms``; `atoms` is the current iterate, `gradient` the gradient in its shape."""

    def __init__(self, passes: Passes, atoms: Atoms, beta: float) -> None:
        self.passes, self.beta, self._like = passes, beta, atoms
        self.lbfgs = LBFGS(self._function, _pack(atoms))

    def state(self) -> dict[str, Tensor]:
        """What `restored` goes on from."""
        return {**self.atoms.state(), **self.lbfgs.state()}

    @classmethod
    def restored(cls, passes: Passes, state: dict[str, Tensor], beta: float) -> FactoredDescent:
        """A descent that takes the steps that the one with this `state` would have taken."""
        descent = cls(passes, Atoms.restored(state), beta)
        descent.lbfgs.restore(state)
        return descent

    def _function(self, x: Tensor) -> tuple[float, Tensor]:
        atoms = _unpack(x, self._like)
        value, gU, gV, gb = self.passes.value_and_gradient(atoms, self.beta)
        return value, _pack(Atoms(gU, gV, atoms.block, gb))

    @property
    def atoms(self) -> Atoms:
        return _unpack(self.lbfgs.x, self._like)

    @property
    def gradient(self) -> Atoms:
        return _unpack(self.lbfgs.gradient, self._like)

    @property
    def value(self) -> float:
        return self.lbfgs.value

    def step(self) -> bool:
        """One iteration; False where no further decrease is possible in this precision."""
        return self.lbfgs.step()

    def principal(self) -> None:
        """Rotate the atoms of each block onto the principal axes of ``UUᵀ + VVᵀ``: the same ``Z``, and atoms that
        only repeat others come out small."""
        atoms = self.atoms
        rotation = torch.zeros(len(atoms), len(atoms), dtype=torch.float64, device=atoms.U.device)
        for block in torch.unique(atoms.block).tolist():
            mine = (atoms.block == block).nonzero().squeeze(1)
            U, V = (w[mine].flatten(1).double() for w in (atoms.U, atoms.V))
            rotation[mine.unsqueeze(1), mine] = torch.linalg.eigh(U @ U.T + V @ V.T).eigenvectors.T
        rotation = rotation.to(atoms.U.dtype)

        def move(x: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
            old = _unpack(x, self._like)
            U, V = (torch.tensordot(rotation, w, 1) for w in (old.U, old.V))
            return _pack(Atoms(U, V, old.block, old.intercept))

        self.lbfgs.rotate(move)

    def change(self, keep: Bool[Tensor, " k"], new: Atoms | None) -> None:
        """Go on with the atoms of ``keep`` and then ``new`` ones; costs an evaluation."""
        old = self._like

        def move(x: Float[Tensor, " m"]) -> Float[Tensor, " l"]:
            kept = _unpack(x, old).select(keep)
            if new is not None:
                kept = kept.append(Atoms(torch.zeros_like(new.U), torch.zeros_like(new.V), new.block, new.intercept))
            return _pack(kept)

        atoms = self.atoms.select(keep)
        self._like = atoms if new is None else atoms.append(new)
        self.lbfgs.reshape(_pack(self._like), move)


def _pack(atoms: Atoms) -> Float[Tensor, " m"]:
    return torch.cat([part.flatten() for part in (atoms.U, atoms.V, atoms.intercept)])


def _unpack(x: Float[Tensor, " m"], like: Atoms) -> Atoms:
    U, V, b = x.split([like.U.numel(), like.V.numel(), like.intercept.numel()])
    return Atoms(U.view(like.U.shape), V.view(like.V.shape), like.block, b)
