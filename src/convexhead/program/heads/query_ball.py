"""The queries of an attentive head that there are to sample and to search: a ball in the metric of the tokens.

    q = E z,  ‖z‖ ≤ κ,      E = (directions e_a / √λ_a) (d, k)

``λ_a`` and ``e_a`` are the leading ``k`` principal variances and directions of train tokens around the mean of their
sample. So ``‖z‖`` is the standard deviation of the scores ``x·q`` of the tokens of a sample around their mean (the root
of the mean variance over train samples): near 0 a map is the mean of the tokens, from about 5 on most maps read one
token. Sampled queries lie on the sphere ``‖z‖ = κ``: each points from the mean of the train tokens to one of them,
projected on the directions. `token_draw` says which.

Where maps also depend on the place, log-weights of places are those of a Gaussian on the grid,
``π = −‖place − μ‖² / (2τ²)``, with ``μ`` one of the places and ``τ`` 1, 2 or 4 cells, or none: ``π = 0``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexhead.errors import InputError
from convexhead.program.heads.token_draw import TokenDraw

WIDTHS = (1.0, 2.0, 4.0)
"""Standard deviations ``τ`` of maps over places, in cells of the grid. Chosen by hand."""
LOOKED_AT = 2e6
"""Numbers in the tokens that their metric is measured on. Chosen by hand: any ball is allowed."""
VISIBLE = 1e-10
"""Variance of a principal direction, relative to the largest, below which queries leave it out. Chosen by hand."""


@dataclass(frozen=True, eq=False)
class QueryBall:
    """See the module's text.

    Attributes
    ----------
    basis : Tensor (d, k)
        ``E``, float64.
    radius : float
        ``κ``.
    grid : (int, int) or None
        Of maps that depend on places.
    centre : Tensor (d,)
        The mean of the train tokens.
    """

    basis: Float[Tensor, "d k"]
    radius: float
    grid: tuple[int, int] | None
    centre: Float[Tensor, " d"]

    @classmethod
    def of(
        cls, draw: TokenDraw, *, radius: float, grid: tuple[int, int] | None, key_dim: int | None = None
    ) -> QueryBall:
        """Measure the metric of train tokens.

        Parameters
        ----------
        draw : TokenDraw
            The tokens, with the weights of their samples.
        radius, grid
            As the attributes.
        key_dim : int or None
            ``k``; None: all directions.

        Raises
        ------
        InputError
            More principal directions than channels.
        """
        s, d = draw.X.shape[1:]
        if key_dim is not None and key_dim > d:
            raise InputError(f"key_dim={key_dim} is more than the {d} channels: choose at most {d}, or None for all")
        seen, weights = draw.samples(max(1, int(LOOKED_AT // (s * d))))
        there = (seen > -math.inf).any(2, keepdim=True)
        size = float(torch.where(there, seen, 0.0).abs().max()) or 1.0  # squares must stay in range
        seen, w = torch.where(there, seen / size, 0.0), there * (weights / weights.sum())[:, None, None]
        total = w.sum()
        inside = torch.where(there, seen - seen.sum(1, keepdim=True) / there.sum(1, keepdim=True), 0.0)
        variances, directions = torch.linalg.eigh((w * inside).flatten(0, 1).T @ inside.flatten(0, 1) / total)
        kept = variances > VISIBLE * variances[-1]
        kept[: d - (key_dim or d)] = False
        basis = directions[:, kept] / variances[kept].sqrt() / size
        return cls(basis, radius, grid, size * (w * seen).sum((0, 1)) / total)

    def described(self) -> Float[Tensor, "k m"]:
        """What the program over the ball depends on, as numbers: radius and grid, then a direction, in each row."""
        facts = torch.tensor([self.radius, *(self.grid or (0, 0))], dtype=torch.float64)
        return torch.cat([facts.expand(self.basis.shape[1], -1), self.basis.T], dim=1)

    @property
    def n_places(self) -> int:
        """Maps over places that there are, the flat one first."""
        return 1 if self.grid is None else 1 + len(WIDTHS) * math.prod(self.grid)

    @property
    def longest(self) -> float:
        """The largest ``‖q‖``."""
        return self.radius * float(torch.linalg.matrix_norm(self.basis, 2)) * (1 + 1e-9) if self.basis.numel() else 0.0

    def log_weights(self, place: Int[Tensor, " j"]) -> Float[Tensor, "j s"]:
        """``π`` of numbered maps over places."""
        assert self.grid is not None
        h, w = self.grid
        places = torch.cartesian_prod(torch.arange(h).double(), torch.arange(w).double())
        width, centre = (place - 1).clamp_min(0) // (h * w), (place - 1).clamp_min(0) % (h * w)
        squares = (places - places[centre].unsqueeze(1)).square().sum(2)
        weights = -squares / (2 * torch.tensor(WIDTHS, dtype=torch.float64)[width].square().unsqueeze(1))
        return torch.where((place > 0).unsqueeze(1), weights, 0.0)

    def queries(self, z: Float[Tensor, "j k"], place: Int[Tensor, " j"]) -> Float[Tensor, "j m"]:
        """``(q)``, or ``(q, π)``."""
        q = z @ self.basis.T.to(z)
        return q if self.grid is None else torch.cat([q, self.log_weights(place.cpu()).to(z)], dim=1)

    def coordinates(self, queries: Float[Tensor, "j m"]) -> tuple[Float[Tensor, "j k"], Int[Tensor, " j"]]:
        """``z`` and the map over places of ``queries`` of this ball."""
        d, place = len(self.basis), torch.zeros(len(queries), dtype=torch.int64)
        queries = queries.double().cpu()
        if self.grid is not None:
            own, s = queries[:, d:], math.prod(self.grid)
            numbers = torch.arange(1, self.n_places)
            for j in own.any(1).nonzero()[:, 0].tolist():
                centre = int(own[j].argmax())  # the only 0 of its row
                candidates = numbers[(numbers - 1) % s == centre]
                place[j] = candidates[(self.log_weights(candidates) - own[j]).abs().sum(1).argmin()]
        return queries[:, :d] @ torch.linalg.pinv(self.basis).T, place

    def inside(self, z: Float[Tensor, "j k"]) -> Float[Tensor, "j k"]:
        """The nearest points of the ball, up to rounding well inside."""
        length = z.norm(dim=1, keepdim=True)
        return torch.where(length > self.radius, z * (self.radius * (1 - 1e-6) / length), z)

    def sample(
        self, draw: TokenDraw, count: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "j k"], Int[Tensor, " j"]]:
        """``z`` in the directions of tokens, and random maps over places; equal states give equal ones."""
        tokens = (draw.tokens(count, generator) - self.centre).unsqueeze(2)
        keys = torch.linalg.pinv(self.basis) @ tokens if self.basis.numel() else tokens[:, :0]
        length = keys.norm(dim=1, keepdim=True)
        z = torch.where(length > 0, keys * (self.radius / length), 0.0)[:, :, 0]
        return z, torch.randint(1, max(2, self.n_places), (count,), generator=generator)


def sample_queries(ball: QueryBall, draw: TokenDraw, count: int, generator: torch.Generator) -> Float[Tensor, "J m"]:
    """``count`` queries, the first of them zero without a place; samples of a single token have one map alone."""
    z, place = ball.sample(draw, 1 if draw.X.shape[1] == 1 else count, generator)
    z[0], place[0] = 0, 0
    return ball.queries(z, place)
