"""Singular values of the gradient matrices ``𝒜_j*(R)``, never formed where they are large.

Block Krylov (Lanczos) iteration on the Gram operator of every block at once, from random starts, with full
reorthogonalisation. It gives a *lower* estimate ``σ̂ ≤ σ``. With ``k`` steps from one start vector uniform on the sphere,

    Pr[ σ̂² < (1 − ε) σ² ] ≤ 1.648 √N exp(−√ε (2k − 1))          (Kuczyński & Woźniakowski 1992)

for any ``N × N`` Gram operator, whatever its spectrum. The Krylov space of ``b`` independent starts contains that of
each of them, so all must fail at once and the bound is raised to the power ``b``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.problem import Problem

Apply = Callable[[Float[Tensor, "j m b"]], Float[Tensor, "j m b"]]


class GradientMatrices:
    """``G_j = 𝒜_j*(R)`` for every block ``j`` as linear operators on batches of vectors.

    Parameters
    ----------
    problem : Problem
    R : Tensor (n, r, c)
        Residuals.

    Notes
    -----
    Vectors are columns: ``V (j, q, b)`` and ``U (j, p, b)`` hold ``b`` of them for each of the ``j`` blocks named by
    ``blocks``; ``p = mixing_size`` and ``q = value_rows · c``.
    """

    def __init__(self, problem: Problem, R: Float[Tensor, "n r c"]) -> None:
        self.problem, self.R = problem, R
        self.p = problem.head.mixing_size
        self.q = problem.head.value_rows * problem.c
        self.on_values = problem.value_size <= self.p
        """Whether the Gram operator acts on the value side, the smaller one."""
        self.order = min(self.p, problem.value_size)

    def _product(self, x: Tensor, blocks: Tensor, shape: tuple[int, ...], times: Callable[..., Tensor]) -> Tensor:
        j, _, b = x.shape
        flat = x.transpose(1, 2).reshape(j * b, *shape)
        out = times(self.R, flat, blocks.repeat_interleave(b))
        return out.reshape(j, b, -1).transpose(1, 2)

    def times(self, V: Float[Tensor, "j q b"], blocks: Tensor) -> Float[Tensor, "j p b"]:
        """``G_j V_j``."""
        return self._product(V, blocks, self.problem.value_shape, self.problem.adjoint_times_values)

    def transpose_times(self, U: Float[Tensor, "j p b"], blocks: Tensor) -> Float[Tensor, "j q b"]:
        """``G_jᵀ U_j``."""
        return self._product(U, blocks, self.problem.head.mixing_shape, self.problem.adjoint_times_mixing)

    def gram(self, x: Float[Tensor, "j m b"], blocks: Tensor) -> Float[Tensor, "j m b"]:
        """``G_jᵀG_j x`` or ``G_jG_jᵀ x``, on the smaller side."""
        if self.on_values:
            return self.transpose_times(self.times(x, blocks), blocks)
        return self.times(self.transpose_times(x, blocks), blocks)

    def random_start(self, blocks: Tensor, b: int, generator: torch.Generator) -> Float[Tensor, "j m b"]:
        """Independent Gaussian vectors on the smaller side, in the subspace that the blocks write."""
        m = self.q if self.on_values else self.p
        x = torch.randn(len(blocks) * b, m, generator=generator, dtype=torch.float64)
        x = x.to(self.R.device, self.R.dtype)
        if self.on_values:
            x = x.view(-1, *self.problem.value_shape)
            x = self.problem.mask_values(x, blocks.repeat_interleave(b)).flatten(1)
        return x.view(len(blocks), b, m).transpose(1, 2)


@dataclass
class Ritz:
    """What ``steps`` Krylov steps found: ``values (j, m)`` of the Gram operator, falling, and ``vectors (j, N, m)``."""

    steps: int
    values: Float[Tensor, "j m"]
    vectors: Float[Tensor, "j big m"]


def orthonormalise(x: Float[Tensor, "j big b"], basis: Float[Tensor, "j big m"]) -> Float[Tensor, "j big b"]:
    """An orthonormal basis of the part of ``x`` orthogonal to ``basis``; twice, as once is not enough in rounding."""
    for _ in range(2):
        x = x - basis @ (basis.mT @ x)
        x = torch.linalg.qr(x).Q
    return x


def block_krylov(gram: Apply, start: Float[Tensor, "j big b"], max_steps: int) -> Iterator[Ritz]:
    """Rayleigh–Ritz values and vectors of ``gram`` over growing Krylov spaces, one step at a time."""
    j, big, b = start.shape
    basis = start.new_empty(j, big, 0)
    projected = start.new_empty(j, 0, 0)
    x = torch.linalg.qr(start).Q
    for step in range(1, max_steps + 1):
        basis = torch.cat([basis, x], dim=2)
        image = gram(x)
        column = basis.mT @ image
        m = basis.shape[2]
        grown = start.new_zeros(j, m, m)
        grown[:, : m - b, : m - b] = projected
        grown[:, :, m - b :] = column
        grown[:, m - b :, :] = column.mT
        projected = (grown + grown.mT) / 2
        values, rotation = torch.linalg.eigh(projected)
        yield Ritz(step, values.flip(1).clamp_min(0), basis @ rotation.flip(2))
        if m + b > big:
            return
        x = orthonormalise(image - basis @ column, basis)


def relative_slack(order: int, steps: int, starts: int, failure_probability: float) -> float:
    """The ``ε`` with ``Pr[σ̂² < (1 − ε) σ²] ≤ failure_probability`` after ``steps`` from ``starts``; 1 if none is."""
    root = (math.log(1.648 * math.sqrt(order)) - math.log(failure_probability) / starts) / (2 * steps - 1)
    return min(1.0, root * root)


def top_singular(
    problem: Problem,
    R: Float[Tensor, "n r c"],
    *,
    count: int,
    start: Float[Tensor, "j big b"] | None = None,
    rtol: float = 1e-2,
    max_steps: int = 30,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "j m"], Float[Tensor, "j p m"], Float[Tensor, "j q m"]]:
    """About ``count`` leading singular triples of every ``𝒜_j*(R)``: an estimate to find new atoms with.

    Stops when the largest singular value changes by less than ``rtol`` in a step. ``start`` are vectors on the smaller
    side to begin from (with random ones where None).

    Returns
    -------
    sigma (j, m), left (j, p, m), right (j, q, m)
        ``m = min(count, order)``; falling within each block.
    """
    G = GradientMatrices(problem, R)
    blocks = torch.arange(problem.n_blocks, device=problem.device)
    count = min(count, G.order)
    if start is None:
        start = G.random_start(blocks, min(count, G.order), generator)
    previous = torch.zeros(())
    for ritz in block_krylov(lambda x: G.gram(x, blocks), start, max_steps):
        top = ritz.values[:, 0].max()
        if ritz.values.shape[1] >= count and top - previous <= rtol * top:
            break
        previous = top
    x = ritz.vectors[:, :, :count]
    image = G.times(x, blocks) if G.on_values else G.transpose_times(x, blocks)
    sigma = image.norm(dim=1)
    image = image / sigma.clamp_min(torch.finfo(sigma.dtype).tiny).unsqueeze(1)
    order = sigma.argsort(dim=1, descending=True).unsqueeze(1)
    x, image = (torch.take_along_dim(side, order, 2) for side in (x, image))
    left, right = (image, x) if G.on_values else (x, image)
    return sigma.sort(dim=1, descending=True).values, left, right
