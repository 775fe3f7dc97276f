"""A ball cut into cells, each inside a box that is turned to face the centre of the ball.

A cell is a piece of a face of the cube ``[−1, 1]^k``, seen from the centre, between two radii:

    z = r v/‖v‖,     v = c + Σ_a t_a h_a e_a,  |t_a| ≤ 1,     lo ≤ r ≤ hi

with ``c`` on the face, ``e_a`` its ``k − 1`` axes and ``h_a`` half-widths. With ``u = c/‖c‖``, ``e_a⊥`` the part of
``e_a`` orthogonal to ``u``, ``cos θ ≤ uᵀv/‖v‖`` and ``m ≤ ‖v‖`` on the piece, it lies in the box

    z = z₀ + Σ_a ε_a F_a,  |ε_a| ≤ 1:    z₀ = ½(lo cos θ + hi) u,  F_0 = ½(hi − lo cos θ) u,  F_a = (hi/m) h_a e_a⊥

At the surface of the ball the box sticks out by the square of its width only. Boxes along the axes of the space would
stick out by the width itself, and maxima often lie on the surface.

Pieces are halved exactly in float64. ``z₀`` and ``F`` are computed to within ``8 u hi``; who uses them charges that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

WIDER = 1 + 1e-13
"""Factor on the sides of boxes. Derived: it covers the rounding of angles and lengths."""


@dataclass(frozen=True)
class Cells:
    """Pieces of the ball.

    Attributes
    ----------
    face : Tensor (b,)
        Axis of the cube's face, plus ``k`` for the face at ``−1``.
    center, half : Tensor (b, k - 1)
        Where on the face.
    lo, hi : Tensor (b,)
        Radii.
    """

    face: Int[Tensor, " b"]
    center: Float[Tensor, "b a"]
    half: Float[Tensor, "b a"]
    lo: Float[Tensor, " b"]
    hi: Float[Tensor, " b"]

    def __len__(self) -> int:
        return len(self.face)

    def select(self, index: Tensor) -> Cells:
        """Return the cells that ``index`` picks."""
        return Cells(self.face[index], self.center[index], self.half[index], self.lo[index], self.hi[index])

    def merge(self, other: Cells) -> Cells:
        """Return these cells and ``other``'s."""
        return Cells(
            torch.cat([self.face, other.face]),
            torch.cat([self.center, other.center]),
            torch.cat([self.half, other.half]),
            torch.cat([self.lo, other.lo]),
            torch.cat([self.hi, other.hi]),
        )

    def boxes(self) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k k"]]:
        """``z₀`` and ``F`` (side, coordinate) of each; the first side points outwards."""
        b, k = len(self), self.center.shape[1] + 1
        axis = self.face % k
        others = (axis.unsqueeze(1) + 1 + torch.arange(k - 1, device=axis.device)) % k
        sign = torch.where(self.face < k, 1.0, -1.0).to(self.lo)
        c = self.lo.new_zeros(b, k).scatter(1, axis.unsqueeze(1), sign.unsqueeze(1)).scatter(1, others, self.center)
        norm = c.norm(dim=1)
        u = c / norm.unsqueeze(1)
        sine = (self.half.norm(dim=1) / norm * WIDER).clamp_max(1.0)
        inner = self.lo * (1 - sine.square()).clamp_min(0).sqrt() / WIDER
        nearest = (1 + (self.center.abs() - self.half).clamp_min(0).square().sum(1)).sqrt()  # m
        along = ((self.hi - inner) / 2 * WIDER).unsqueeze(1) * u
        e = torch.nn.functional.one_hot(others, k).to(c)
        across = e - (e @ u.unsqueeze(2)) * u.unsqueeze(1)
        across = (self.hi / nearest * WIDER).view(-1, 1, 1) * self.half.unsqueeze(2) * across
        return ((inner + self.hi) / 2).unsqueeze(1) * u, torch.cat([along.unsqueeze(1), across], 1)

    def halve(self, metric: Float[Tensor, "k k"]) -> Cells:
        """Each cell cut in two across its longest side, as ``‖v‖² = vᵀ metric v`` measures them.

        Outwards a cell is as long as its radii say. What its box adds to that is there because the cell is wide.
        """
        z, F = self.boxes()
        F[:, 0] = ((self.hi - self.lo) / 2 / z.norm(dim=1)).unsqueeze(1) * z
        side = torch.einsum("bak,kl,bal->ba", F, metric, F).argmax(1)
        middle = (self.lo + self.hi) / 2
        lo, hi = torch.where(side == 0, middle, self.lo), torch.where(side == 0, middle, self.hi)
        cut = torch.nn.functional.one_hot(side, self.half.shape[1] + 1)[:, 1:].to(self.half) * self.half / 2
        return Cells(
            self.face.repeat(2),
            torch.cat([self.center - cut, self.center + cut]),
            (self.half - cut).repeat(2, 1),
            torch.cat([self.lo, lo]),
            torch.cat([hi, self.hi]),
        )


def cover(k: int, rho: float, like: Tensor) -> Cells:
    """The ball of radius ``rho`` in ``k`` dimensions as one cell for each face of the cube."""
    b = 2 * k
    return Cells(
        torch.arange(b, device=like.device),
        like.new_zeros(b, k - 1),
        like.new_ones(b, k - 1),
        like.new_zeros(b),
        like.new_full((b,), rho),
    )
