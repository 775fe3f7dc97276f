"""Block Krylov (Lanczos) iteration on symmetric positive semidefinite operators, many at once.

From random starts, with full reorthogonalisation, it gives a *lower* estimate ``σ̂² ≤ σ²`` of the largest eigenvalue.
With ``k`` steps from one vector uniform on the sphere,

    Pr[ σ̂² < (1 − ε) σ² ] ≤ 1.648 √N exp(−√ε (2k − 1))          (Kuczyński & Woźniakowski 1992)

for any ``N × N`` operator, whatever its spectrum. The Krylov space of ``b`` independent starts contains that of each of
them, so all must fail at once and the bound is raised to the power ``b``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Apply = Callable[[Tensor, Tensor], Tensor]


class BlockKrylov:
    """Rayleigh–Ritz approximation of the top of a batch of Gram operators, one Krylov step at a time.

    Parameters
    ----------
    gram : callable (x (j, N, b), blocks (j,)) -> (j, N, b)
        Symmetric positive semidefinite operators, one for each block named.
    start : Tensor (j, N, b)
        ``b`` start vectors a block.
    blocks : Tensor (j,)
        Which blocks.
    order : int
        Dimension of the space that the operators act on, at most ``N``: beyond it there is nothing to find.

    Attributes
    ----------
    steps : int
        Steps taken, ``k`` of the bound.
    values : Tensor (j, m)
        Ritz values, rising.
    """

    def __init__(self, gram: Apply, start: Float[Tensor, "j big b"], blocks: Int[Tensor, " j"], order: int) -> None:
        self.gram, self.blocks, self.order, self.steps = gram, blocks, order, 0
        self.starts = start.shape[2]
        self._next = torch.linalg.qr(start).Q
        self._basis = start.new_empty(*start.shape[:2], 0)
        self._projected = start.new_empty(len(start), 0, 0)

    def step(self) -> None:
        """Add ``b`` vectors to every Krylov space; not beyond the dimension of the space."""
        if self.steps:
            self._next = orthonormalise(self._next, self._basis)
        basis = torch.cat([self._basis, self._next], dim=2)
        image = self.gram(self._next, self.blocks)
        column = basis.mT @ image
        m = basis.shape[2]
        old = m - self.starts
        grown = basis.new_zeros(len(basis), m, m)
        grown[:, :old, :old] = self._projected
        grown[:, :, old:] = column
        grown[:, old:, :] = column.mT
        self._projected = (grown + grown.mT) / 2
        values, self._rotation = torch.linalg.eigh(self._projected)
        self.values = values.clamp_min(0)
        self._basis, self._next = basis, image - basis @ column
        self.steps += 1

    def can_step(self) -> bool:
        """Whether the space has room for another step."""
        return self._basis.shape[2] + self.starts <= self.order

    def keep(self, mask: Bool[Tensor, " j"]) -> None:
        """Keep some of the blocks only."""
        self.blocks, self._next, self._basis = self.blocks[mask], self._next[mask], self._basis[mask]
        self._projected, self.values, self._rotation = (
            self._projected[mask], self.values[mask], self._rotation[mask],
        )  # fmt: skip

    def leading(self, count: int) -> tuple[Float[Tensor, "j k"], Float[Tensor, "j k"]]:
        """Return the largest singular values found, at most ``count`` and falling, with the error of each.

        That is ``‖Gᵀa − σ b‖`` for the vectors ``a, b`` on the two sides, known without another product.
        """
        count = min(count, self.values.shape[1])
        sigma = self.values[:, -count:].flip(1).sqrt()
        residual = torch.linalg.qr(self._next).R @ self._rotation[:, -self.starts :, -count:].flip(2)
        return sigma, residual.norm(dim=1) / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)

    def vectors(self, count: int) -> Float[Tensor, "j big k"]:
        """Return Ritz vectors of the ``count`` largest values, largest first."""
        return self._basis @ self._rotation[:, :, -count:].flip(2)


def relative_slack(order: int, steps: int, starts: int, failure_probability: float) -> float:
    """The ``ε`` with ``Pr[σ̂² < (1 − ε) σ²] ≤ failure_probability`` after ``steps`` from ``starts``; 1 if none is."""
    root = (math.log(1.648 * math.sqrt(order)) - math.log(failure_probability) / starts) / (2 * steps - 1)
    return min(1.0, root * root)


def orthonormalise(x: Float[Tensor, "j big b"], basis: Float[Tensor, "j big m"]) -> Float[Tensor, "j big b"]:
    """An orthonormal basis of the part of ``x`` orthogonal to ``basis``; twice, as once is not enough in rounding."""
    for _ in range(2):
        x = x - basis @ (basis.mT @ x)
        x = torch.linalg.qr(x).Q
    return x


def independent(x: Float[Tensor, "big m"]) -> Float[Tensor, "big l"]:
    """An orthonormal basis of the columns' span, without what rounding would make of dependent ones."""
    Q, R = torch.linalg.qr(x / x.norm(dim=0).clamp_min(torch.finfo(x.dtype).tiny))
    return Q[:, R.diagonal().abs() > 1e-4]


def project_out(x: Float[Tensor, "j m b"], basis: Float[Tensor, "j m k"]) -> Float[Tensor, "j m b"]:
    """``(I − BBᵀ) x`` for orthonormal columns ``B`` (zero columns allowed)."""
    return x - basis @ (basis.mT @ x)
