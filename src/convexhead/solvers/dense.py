"""A small problem has dense matrices: every pass is a product with one feature matrix.

    f = Σ_j Φ_j vec(Z_j) + b        Z_j (w, e·c) for each block j

The mixing side is first rotated onto the ``w ≤ mixing_size`` directions that the data can see. That is an isometry,
so nuclear norms are unchanged, and heads whose pooling makes them blind (Mixer and FNO under a mean) shrink to what
they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.program.atoms import Atoms
from convexhead.program.problem import Evaluation, Problem


class DensePasses:
    """Feature matrix of a problem, with the passes that solvers need.

    Attributes
    ----------
    problem : Problem
        With targets class by class, as `outputs` are: few classes are slow to pass over in any other layout.
    features : Tensor (j·w·e, n·r)
        ``Φᵀ``, blocks one below the other. Products with it are made in its precision, all else in that of the problem.
    rotation : Tensor (p, w)
        Orthonormal basis of the visible mixing directions.
    mean : Tensor (j·w·e,) or None
        ``φ``; None where no intercept is fitted.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem.class_by_class()
        e, c = problem.value_shape
        features = problem.operator.features()
        mean = self._taken_off(features, 1)
        unfolded = features.unflatten(2, (-1, e))  # (j, n·r, p, e)
        self.rotation = _visible(problem.sum(torch.einsum("jnpe,jnqe->pq", unfolded, unfolded))[0])
        self.shape = (problem.n_blocks, self.rotation.shape[1], e * c)
        rotated = torch.einsum("jnpe,pw->jwen", unfolded, self.rotation)
        self.features = rotated.flatten(0, 2).contiguous()
        self.mean = None
        if mean is not None:
            self.mean = torch.einsum("jpe,pw->jwe", mean.unflatten(2, (-1, e))[:, 0], self.rotation).flatten()
        self.mask = self._output_mask()

    def _taken_off(self, features: Tensor, dim: int) -> Tensor | None:
        """The mean of features over samples and rows, which ``dim`` counts, after it was taken off them.

        None, and nothing is taken off, where no intercept is fitted.
        """
        if not self.problem.fit_intercept:
            return None
        (total,) = self.problem.sum(features.sum(dim, keepdim=True, dtype=torch.float64))
        mean = total / (self.problem.n * self.problem.head.r)
        features -= mean.to(features.dtype)
        return mean.to(features.dtype).to(self.problem.dtype)

    def _output_mask(self) -> Float[Tensor, "j 1 q"] | None:
        """Which entries of a row of ``Z_j`` may be other than zero; None where all."""
        problem = self.problem
        mask = problem.head.output_mask(problem.c)
        if mask is None:
            return None
        group = torch.arange(problem.n_blocks, device=problem.device) % problem.head.n_groups
        mask = mask.to(problem.device, problem.dtype)[group]
        return mask.repeat(1, problem.head.value_rows).unsqueeze(1)

    def outputs(self, Z: Float[Tensor, "j w q"], b: Float[Tensor, " c"]) -> Float[Tensor, "n r c"]:
        """``f`` at dense weights."""
        f = (Z.reshape(-1, self.problem.c).T.to(self.features.dtype) @ self.features).to(b.dtype)
        if self.problem.fit_intercept:
            f += b.unsqueeze(1)
        return f.T.view(self.problem.Y.shape)

    def gradient(self, R: Float[Tensor, "n r c"]) -> Float[Tensor, "j w q"]:
        """``𝒜_j*(R)`` of every block."""
        # Several times faster than features @ R, whose few columns leave the product to slow kernels.
        G = R.flatten(0, 1).T.to(self.features.dtype) @ self.features.T
        G = self.problem.sum(G.to(R.dtype))[0].T.reshape(self.shape)
        return G if self.mask is None else G * self.mask

    def norm(self, steps: int = 10) -> float:
        """``‖Φ‖₂``, estimated from below by the power method."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(len(self.features), generator=generator).to(self.features)
        tiny = torch.finfo(v.dtype).tiny

        def length(x: Tensor) -> Tensor:
            return torch.linalg.vector_norm(x, dtype=torch.float64)  # squares may leave the range of single precision

        def unit(x: Tensor) -> Tensor:
            return x / length(x).clamp_min(tiny)

        for _ in range(steps):
            v = self.features @ unit(unit(v) @ self.features)
        return float(length(v))

    def matrices(self, atoms: Atoms) -> Float[Tensor, "j w q"]:
        """``Z_j = Σ_k u_k v_kᵀ`` for atoms with rotated mixing weights ``(k, w)``."""
        Z = atoms.U.new_zeros(self.shape)
        for j, mine in self._by_block(atoms):
            Z[j] = atoms.U[mine].T @ atoms.V[mine].flatten(1)
        return Z

    def _by_block(self, atoms: Atoms) -> list[tuple[int, Tensor | slice]]:
        """The blocks that have atoms, and which."""
        if self.shape[0] == 1:
            return [(0, slice(None))]
        return [(j, atoms.block == j) for j in torch.unique(atoms.block).tolist()]

    def value_and_gradient(self, atoms: Atoms, beta: float) -> Evaluation:
        """As `Problem.value_and_gradient`, for atoms with rotated mixing weights."""
        f = self.outputs(self.matrices(atoms), atoms.intercept)
        loss, R = self.problem.losses.value_and_residual(f)
        R = R / self.problem.n
        G = self.gradient(R)
        gU, gV = beta * atoms.U, beta * atoms.V
        for j, mine in self._by_block(atoms):
            gU[mine] += atoms.V[mine].flatten(1) @ G[j].T
            gV[mine] += (atoms.U[mine] @ G[j]).view_as(atoms.V[mine])
        gb = self.problem.sum(R.sum((0, 1)))[0] if self.problem.fit_intercept else torch.zeros_like(atoms.intercept)
        self.last = f, R, G  # a gap check right after needs them again
        value = self.problem.mean(loss) + beta * self.problem.penalty(atoms)
        return Evaluation(value, Atoms(gU, gV, atoms.block, gb), f)

    def enter(self, atoms: Atoms) -> Atoms:
        """Atoms of the problem with their mixing weights in the coordinates of the features, ``(k, w)``."""
        atoms = self._rotate(atoms)
        return atoms if self.mean is None else replace(atoms, intercept=atoms.intercept + self._of(self.mean, atoms))

    def leave(self, atoms: Atoms) -> Atoms:
        """Inverse of `enter`, up to what the data cannot see."""
        back = self._rotate_back(atoms)
        return back if self.mean is None else replace(back, intercept=atoms.intercept - self._of(self.mean, atoms))

    def _of(self, mean: Float[Tensor, " jwe"], atoms: Atoms) -> Float[Tensor, " c"]:
        """``φᵀ vec(Z)``."""
        return mean @ self.matrices(atoms).reshape(-1, self.problem.c)

    def _rotate(self, atoms: Atoms) -> Atoms:
        return replace(atoms, U=atoms.U.flatten(1) @ self.rotation)

    def _rotate_back(self, atoms: Atoms) -> Atoms:
        return replace(atoms, U=(atoms.U @ self.rotation.T).view(-1, *self.problem.head.mixing_shape))


def _visible(gram: Float[Tensor, "p p"]) -> Float[Tensor, "p w"]:
    """Orthonormal basis of the mixing directions on which not all features vanish, given their Gram matrix."""
    values, Q = torch.linalg.eigh(gram)
    visible = values > 1e-13 * values[-1]
    return Q[:, visible] if bool(visible.any()) else Q[:, -1:]


def singular_values(Z: Float[Tensor, "j w q"]) -> Float[Tensor, "j m"]:
    """Return rising singular values through Gram matrices of the smaller side: for estimates, not certificates."""
    gram = Z.mT @ Z if Z.shape[1] >= Z.shape[2] else Z @ Z.mT
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
