"""Newton's method over the factors of a dense problem, where its whole Hessian costs less than the steps it saves.

With ``x = (U, V, b)`` and ``J_i = ∂f_i/∂x``,

    ∇²Φ = (1/n) Σ_i J_iᵀ ∇²ℓ(f_i, y_i) J_i + C + β I,    C what couples U_k and V_k: ∂²⟨G, Σ_k U_k V_kᵀ⟩ / ∂U_k ∂V_k = G

(``b`` is not penalised). Rotations among the atoms of a block leave ``Φ`` as it is, so the Hessian is singular there;
a little damping, more where a step fails (Levenberg & Marquardt), takes care of that and of what is not convex.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.program.atoms import Atoms
from convexhead.solvers.dense import DensePasses
from convexhead.solvers.factored import pack, unpack

MOST_PRODUCTS = 2e7
"""Largest number of products for one Hessian. Chosen by hand: the cost of some tens of evaluations of a tiny
problem."""


class FactoredNewton:
    """Steps over the factors of ``atoms`` (mixing weights rotated); `atoms` and `value` are the current iterate's."""

    max_trials = 12

    def __init__(self, dense: DensePasses, atoms: Atoms, beta: float) -> None:
        self.dense, self.beta, self._like = dense, beta, atoms
        blocks = dense.features.view(dense.shape[0], dense.shape[1], dense.problem.value_shape[0], -1)
        self._features = blocks.index_select(0, atoms.block).float()  # (k, w, e, n·r)
        self._losses = dense.problem.losses.to(torch.float32)
        self._x = pack(atoms)
        self.value, self._gradient = self._evaluate(self._x)
        self._at = dense.last
        self._damping = 1e-6

    @staticmethod
    def pays(dense: DensePasses, atoms: Atoms) -> bool:
        """Whether the Hessian is cheap."""
        problem = dense.problem
        return problem.n * problem.head.r * problem.c * len(pack(atoms)) ** 2 <= MOST_PRODUCTS

    @property
    def atoms(self) -> Atoms:
        return unpack(self._x, self._like)

    def step(self) -> bool:
        """Take one iteration; False if no further decrease is possible in this precision."""
        H = self._hessian()
        scale = H.diagonal().max()
        for _ in range(self.max_trials):
            damped = H + self._damping * scale * torch.eye(len(H), dtype=H.dtype, device=H.device)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed and self._move(factor):
                self._move(factor)  # a factorisation is worth another evaluation
                self._damping = max(self._damping / 10, 1e-12)
                return True
            self._damping *= 10
        return False

    def _move(self, factor: Float[Tensor, "m m"]) -> bool:
        """A step with a factor of the Hessian; whether the objective fell, else nothing has changed."""
        x = self._x - torch.cholesky_solve(self._gradient.unsqueeze(1), factor).squeeze(1)
        value, gradient = self._evaluate(x)
        if value < self.value:
            self._x, self.value, self._gradient, self._at = x, value, gradient, self.dense.last
            return True
        return False

    def _evaluate(self, x: Float[Tensor, " m"]) -> tuple[float, Float[Tensor, " m"]]:
        atoms = unpack(x, self._like)
        value, gradient, _ = self.dense.value_and_gradient(atoms, self.beta)
        return value, pack(gradient)

    def _hessian(self) -> Float[Tensor, "m m"]:
        """From single precision: a step need only be about right, its gradient is exact."""
        problem, atoms = self.dense.problem, self.atoms
        (f, _, G), block = self._at, atoms.block
        k, e, c = atoms.V.shape
        w = atoms.U.shape[1]
        f, U, V = (part.float() for part in (f, atoms.U, atoms.V))
        features = self._features
        each = torch.eye(c, device=f.device).unsqueeze(2)  # (c, c, 1)
        of_U = V.mT.unsqueeze(1) @ features  # (k, w, c, n·r)
        of_V = (U.unsqueeze(1) @ features.flatten(2)).view(k, e, 1, 1, -1) * each  # (k, e, c, c, n·r)
        if (mask := problem.head.output_mask(c)) is not None:
            of_V *= mask.to(block.device)[block % problem.head.n_groups][:, None, :, None, None]
        of_b = (each if problem.fit_intercept else torch.zeros_like(each)).expand(-1, -1, features.shape[3])
        J = torch.cat([of_U.flatten(0, 1), of_V.flatten(0, 2), of_b])  # of every f_i: (m, c, n·r)
        curved = self._losses.hessian_times(f, J.unflatten(2, f.shape[:2]).movedim(1, 3)).movedim(3, 1)
        H = problem.sum((J.flatten(1) @ curved.flatten(1).T).double())[0] / problem.n
        weights = k * (w + e * c)
        H.diagonal()[:weights] += self.beta
        for i, j in enumerate(block.tolist()):
            rows, columns = slice(i * w, (i + 1) * w), slice(k * w + i * e * c, k * w + (i + 1) * e * c)
            H[rows, columns] += G[j]
            H[columns, rows] += G[j].T
        return H
