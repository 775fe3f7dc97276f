"""Proximal Newton steps on the convex program restricted to a few directions on both sides.

    Z_j = A_j M_j B_jᵀ:     minimise over M   F(Σ_j 𝒜_j(A_j M_j B_jᵀ)) + β Σ_j ‖M_j‖_*

with orthonormal ``A_j (p, m)``, ``B_j (q, m)`` that span the model and the leading singular directions of the gradient
(active subspace selection: Hsieh & Olsen 2014). Factors move slowly where singular values of the gradient crowd around
β; the nuclear norm of ``M`` decides there at once which directions stay.

The Hessian of ``F`` in ``M`` is estimated from random draws (`Operator.pair_covariance`), the quadratic model with its
nuclear norm minimised by proximal gradient steps on small matrices, and the step's length found exactly, since outputs
are linear in ``M``. Mixed tokens of the directions may be rounded: outputs and gradients at the start are exact, and
what follows is added to them, so that errors are relative to the steps (see `convexhead.solvers.increments`).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

from convexhead.linalg.krylov import independent
from convexhead.program.atoms import Atoms
from convexhead.program.problem import Problem
from convexhead.solvers.base import scaled_dual
from convexhead.solvers.pricing import Directions
from convexhead.solvers.whitening import probes

DRAWS = 10
"""Random draws for the Hessian, as a multiple of the number of coefficients. Chosen by hand."""
TOGETHER = 8
"""Draws that share a pass. Chosen by hand."""
MOST_COEFFICIENTS = {"cpu": 3000, "cuda": 10_000}
"""Largest order of the Hessian, of `MANY` samples or fewer on a CPU. Chosen by hand: its cost grows with the third
power."""
MANY, LARGEST = 8000, 8000
"""Samples from which that order grows with their square root, and the order where it ends: half a gigabyte. Measured:
50,000 images of CIFAR-100 with 50 heads stop at a gap of 0.3% without the room."""
MOST_STEPS = 6
MIXED_BYTES = {"cpu": 1e9, "cuda": math.inf}
"""Mixed tokens of the directions are kept where they take no more and the budget has room, and made anew in each pass
elsewhere."""


def most_coefficients(n: int, device: torch.device) -> int:
    """Largest order of the Hessian for ``n`` samples: passes over more leave time for a larger one."""
    most = MOST_COEFFICIENTS[device.type]
    return max(most, min(LARGEST, int(most * math.sqrt(n / MANY))))


class Subspace:
    """The program over ``M``.

    Parameters
    ----------
    problem : Problem
        Its outputs and gradients are what converges.
    rough : Problem
        The same with cheaper products, or the same.
    atoms : Atoms
        The model, whose span is in the subspace.
    f : Tensor (n, r, c)
        Its outputs.
    directions : Directions
        What else is.

    Attributes
    ----------
    left, right : Tensor (j, p, m), (j, q, m)
        ``A`` and ``B``: orthonormal columns, or zero ones.
    start : Tensor (j, m, m)
        ``M`` of the model.
    """

    def __init__(
        self, problem: Problem, rough: Problem, atoms: Atoms, f: Float[Tensor, "n r c"], directions: Directions
    ) -> None:
        self.problem, self.rough, self.f, self.R = problem, rough, f, problem.residual(f)
        self.left, self.right = _span(problem, atoms, directions)
        j, _, m = self.left.shape
        self.blocks = torch.arange(j, device=problem.device)
        self.basis = Atoms(
            self.left.mT.reshape(-1, *problem.head.mixing_shape),
            self.right.mT.reshape(-1, *problem.value_shape),
            self.blocks.repeat_interleave(m),
            atoms.intercept,
        )
        self.start = self._coefficients(atoms)
        operator, size = rough.operator, rough.operator.mixed_bytes(len(self.basis))
        first = problem.activation.values_first(problem.c)  # passes make no mixed tokens then
        room = 0 if first else min(MIXED_BYTES[problem.device.type], operator.budget.left)
        self.mixed = operator.mixed(self.basis.U, self.basis.block) if size <= room else None
        if self.mixed is not None:
            operator.budget.lend(size, self)
        self.slope = self._project(problem.operator.adjoint_times_mixing(self.R, self.basis.U, self.basis.block))

    def _coefficients(self, atoms: Atoms) -> Float[Tensor, "j m m"]:
        M = self.left.new_zeros(len(self.left), self.left.shape[2], self.left.shape[2])
        for block in torch.unique(atoms.block).tolist():
            mine = atoms.block == block
            U, V = atoms.U[mine].flatten(1), atoms.V[mine].flatten(1)
            M[block] = (U @ self.left[block]).T @ (V @ self.right[block])
        return M

    def change(self, D: Float[Tensor, "j m m"]) -> Float[Tensor, "n r c"]:
        """By how much a step ``D`` changes the outputs."""
        V = torch.bmm(D, self.right.mT).view(self.basis.V.shape)
        if self.mixed is None:
            return self.problem.outputs(replace(self.basis, V=V, intercept=torch.zeros_like(self.basis.intercept)))
        return (self.mixed.flatten(2) @ V.flatten(0, 1).to(self.mixed.dtype)).to(V.dtype)

    def gradient(self, f: Float[Tensor, "n r c"]) -> Float[Tensor, "j m m"]:
        """``A_jᵀ 𝒜_j*(R) B_j``."""
        dR = self.problem.residual(f) - self.R
        if self.mixed is None:
            rows = self.problem.operator.adjoint_times_mixing(dR, self.basis.U, self.basis.block)
        else:
            product = self.mixed.flatten(2).flatten(0, 1).T @ dR.flatten(0, 1).to(self.mixed.dtype)
            (rows,) = self.problem.sum(product.to(dR.dtype))
        return self.slope + self._project(rows)

    def _project(self, rows: Tensor) -> Float[Tensor, "j m m"]:
        """``A_jᵀ 𝒜_j*(R)`` times ``B_j``."""
        return torch.bmm(rows.view(*self.left.shape[::2], -1), self.right)

    def hessian(self, f: Float[Tensor, "n r c"], generator: torch.Generator) -> Float[Tensor, "jmm jmm"]:
        """Estimate the Hessian of ``F`` in ``M``, in float64."""
        size = self.left.shape[0] * self.left.shape[2] ** 2
        H = torch.zeros(size, size, dtype=self.problem.dtype, device=self.problem.device)
        times = -(-DRAWS * size // self.problem.n)
        for first in range(0, times, TOGETHER):
            z = [probes(self.problem, f, generator) for _ in range(min(TOGETHER, times - first))]
            drawn = torch.stack([each for each in z if each is not None])  # the caller has asked that they are there
            H += self.rough.operator.pair_covariance(self.basis, drawn, len(self.left), self.mixed) * len(z) / times
        return H.double()

    def solve(self, beta: float, *, until: float, generator: torch.Generator) -> Float[Tensor, "j m m"]:
        """The last ``M`` of steps from the model until the relative gap in the subspace is at most ``until``."""
        problem, M, f = self.problem, self.start, self.f
        H = self.hessian(f, generator)
        for _ in range(MOST_STEPS):
            G = self.gradient(f)
            nuclear = float(torch.linalg.svdvals(M).sum())
            objective = problem.data_term(f) + beta * nuclear
            norm = float(torch.linalg.matrix_norm(G, 2).max())
            gap = (objective - scaled_dual(problem, f, norm, beta, self.basis.intercept)) / abs(objective)
            if gap <= until:
                break
            D = torch.from_numpy(_minimise_model(H, _numpy(G), _numpy(M), beta, gap)).to(M)
            df = self.change(D)

            def along(t: float, M=M, D=D, f=f, df=df) -> float:  # type: ignore[no-untyped-def]
                return problem.data_term(f + t * df) + beta * float(torch.linalg.svdvals(M + t * D).sum())

            t = minimize_scalar(along, bounds=(0.0, 2.0), method="bounded", options={"maxiter": 12, "xatol": 0.02})
            if t.fun >= objective:
                break
            M, f = M + float(t.x) * D, f + float(t.x) * df
        return M

    def atoms(self, M: Float[Tensor, "j m m"]) -> Atoms:
        """Return ``M`` as balanced atoms."""
        left, sigma, right = torch.linalg.svd(M)
        kept = sigma > 1e-6 * sigma.max()
        root = sigma.sqrt().unsqueeze(1)
        U, V = torch.bmm(self.left, left * root).mT[kept], torch.bmm(self.right, right.mT * root).mT[kept]
        return Atoms(
            U.view(-1, *self.problem.head.mixing_shape),
            V.view(-1, *self.problem.value_shape),
            self.blocks.unsqueeze(1).expand_as(sigma)[kept],
            self.basis.intercept,
        )


def _span(
    problem: Problem, atoms: Atoms, directions: Directions
) -> tuple[Float[Tensor, "j p m"], Float[Tensor, "j q m"]]:
    """Orthonormal bases of the model and of more directions, block by block; zero columns where fewer."""
    _, left, right = directions
    blocks = torch.arange(len(left), device=left.device).repeat_interleave(right.shape[2])
    right = problem.mask_values(right.mT.reshape(-1, *problem.value_shape), blocks).flatten(1)
    right = right.view(len(left), -1, right.shape[1]).mT
    widest = int(torch.bincount(atoms.block).max())
    A, B = (part.new_zeros(*part.shape[:2], widest + part.shape[2]) for part in (left, right))
    for block in range(len(left)):
        mine = atoms.block == block
        for out, weights, more in ((A, atoms.U, left), (B, atoms.V, right)):
            Q = independent(torch.cat([weights[mine].flatten(1).T, more[block]], dim=1))
            out[block, :, : Q.shape[1]] = Q
    return A, B


def _numpy(x: Tensor) -> NDArray[np.float64]:
    return x.double().cpu().numpy()


def _minimise_model(
    H: Float[Tensor, "jmm jmm"], G: NDArray[np.float64], M: NDArray[np.float64], beta: float, gap: float
) -> NDArray[np.float64]:
    """``argmin_D ⟨G, D⟩ + ½⟨D, H D⟩ + β Σ_j ‖M_j + D_j‖_*``, by FISTA with restart, to a fraction of ``gap``.

    On the CPU but for the products with ``H``: small decompositions are slow on a GPU.
    """

    def times(D: NDArray[np.float64]) -> NDArray[np.float64]:
        return _numpy(H @ torch.from_numpy(D.ravel()).to(H.device)).reshape(D.shape)

    v = np.ones_like(G) / np.sqrt(len(H))
    for _ in range(20):
        v = times(v)
        L = float(np.linalg.norm(v))
        v /= L or 1.0
    L *= 1.1
    Z = E = M
    HZ = HE = np.zeros_like(M)
    momentum, scale = 1.0, beta * np.linalg.svd(M, compute_uv=False).sum() + abs(float((G * M).sum()))
    for iteration in range(3000):
        left, sigma, right = np.linalg.svd(E - (G + HE) / L)
        sigma = np.maximum(sigma - beta / L, 0.0)
        new = (left * sigma[:, None, :]) @ right
        H_new = times(new - M)
        if float(((E - new) * (new - Z)).sum()) > 0:
            momentum = 1.0
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        weight, momentum = (momentum - 1) / following, following
        E, HE = new + weight * (new - Z), H_new + weight * (H_new - HZ)
        Z, HZ = new, H_new
        if iteration % 25 == 24:
            slope = G + HZ
            above = np.linalg.norm(slope, 2, axis=(1, 2)).max() / beta - 1
            slack = abs(float((slope * Z).sum()) + beta * float(sigma.sum()))
            if above <= 0.1 * gap and slack <= 0.05 * gap * max(scale, 1e-300):
                break
    step: NDArray[np.float64] = Z - M
    return step
