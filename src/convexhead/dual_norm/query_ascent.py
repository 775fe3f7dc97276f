"""Search for the queries that a residual rewards most: batched ascent in the ball from many starts.

    h(R) = max_q ‖M(q)‖₂,   M(q) = Σ_i φ_q(X_i) R_iᵀ (d, c),      ∇_q ‖M‖₂ = Σ_i (R_i b) X_iᵀ [w_i ⊙ (X_i a − φ_qᵀ a)]

with the leading singular vectors ``a, b`` of ``M`` and the map ``w_i`` of the query. Each start keeps its map over
places and a step of its own along the normalised gradient, halved where the value fell. The values found never exceed
the maximum: they are estimates from below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexhead.dual_norm.climb import climb
from convexhead.program.heads.attentive import Attentive
from convexhead.program.heads.query_ball import QueryBall
from convexhead.program.heads.token_draw import TokenDraw
from convexhead.program.operator import Operator
from convexhead.runtime.clock import never
from convexhead.runtime.stored_tokens import CHUNK_BYTES, chunk_rows

NUMBERS = 4_000_000
"""Numbers of workspace that a batch of samples may take. Chosen by hand."""
STARTS = 256
"""Sampled starts of a search that is to find nothing. Chosen by hand."""
ITERATIONS = 12
"""Steps of its ascents. Chosen by hand."""
SAME = 0.05
"""Distance of two queries, in units of the radius, up to which they are one. Chosen by hand."""


@dataclass(frozen=True)
class QueryMaxima:
    """The queries at which ascents ended, highest first.

    Attributes
    ----------
    values : Tensor (j,)
        ``‖M(q)‖₂``.
    z : Tensor (j, k)
        Float64, on the CPU.
    place : Tensor (j,)
        Their maps over places.
    radius : float
        Of the ball.
    """

    values: Float[Tensor, " j"]
    z: Float[Tensor, "j k"]
    place: Int[Tensor, " j"]
    radius: float

    def __len__(self) -> int:
        return len(self.values)

    def select(self, index: Tensor) -> QueryMaxima:
        """Return the maxima that ``index`` picks."""
        return replace(self, values=self.values[index], z=self.z[index], place=self.place[index])

    def sorted(self) -> QueryMaxima:
        """Return the same maxima, highest first."""
        return self.select(self.values.argsort(descending=True, stable=True))

    def merge(self, other: QueryMaxima) -> QueryMaxima:
        """Return these maxima and then ``other``'s."""
        return QueryMaxima(
            torch.cat([self.values, other.values]),
            torch.cat([self.z, other.z]),
            torch.cat([self.place, other.place]),
            self.radius,
        )

    def distances(self, others: QueryMaxima) -> Float[Tensor, "j i"]:
        """Distances to other queries in units of the radius; infinite with another map over places."""
        far = torch.cdist(self.z, others.z) / self.radius
        return torch.where(self.place.unsqueeze(1) == others.place, far, torch.inf)

    def distinct(self, apart: float = SAME) -> QueryMaxima:
        """Keep the first of those that are nearly one query: up to this distance, in units of the radius."""
        return self.select(~(self.distances(self) <= apart).tril(-1).any(1))


def ascend_queries(
    operator: Operator,
    R: Float[Tensor, "n 1 c"],
    ball: QueryBall,
    z: Float[Tensor, "j k"],
    place: Int[Tensor, " j"],
    *,
    iterations: int,
    late: Callable[[], bool] = never,
) -> QueryMaxima:
    """Ascend from every ``z_j`` on its map over places.

    Parameters
    ----------
    operator : Operator
        Of an attentive head, in any precision.
    R : Tensor (n, 1, c)
        Residuals.
    ball : QueryBall
        Where queries stay.
    late : callable () -> bool
        Whether to end where the ascents are.
    """

    def value_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
        return _values_and_slopes(operator, R, ball, z, place)

    step = ball.radius / 2
    values, z = climb(z.double(), value_and_slope, ball.inside, step=step, iterations=iterations, late=late)
    order = values.argsort(descending=True, stable=True)
    return QueryMaxima(values[order], z[order], place[order], ball.radius)


def price(
    operator: Operator,
    ball: QueryBall,
    R: Float[Tensor, "n 1 c"],
    known: QueryMaxima,
    draw: TokenDraw,
    generator: torch.Generator,
    *,
    starts: int,
    late: Callable[[], bool] = never,
) -> QueryMaxima:
    """The queries that ``R`` rewards most: ascents from ``known`` ones and from ``starts`` sampled by ``draw``."""
    z, place = ball.sample(draw, starts, generator)
    z, place = torch.cat([known.z, z]), torch.cat([known.place, place])
    return ascend_queries(operator, R, ball, z, place, iterations=ITERATIONS, late=late).distinct()


def mean_token(operator: Operator) -> Float[Tensor, " d"]:
    """The mean of all tokens of all samples, in float64 on the CPU."""
    X = operator.X
    total, step = torch.zeros(X.shape[2], dtype=torch.float64), chunk_rows(X, CHUNK_BYTES["cpu"])
    for i in range(0, len(X), step):
        total += X[i : i + step].double().sum((0, 1)).cpu()
    return operator.ranks.sum(total)[0] / (operator.n * X.shape[1])


def _values_and_slopes(
    operator: Operator, R: Tensor, ball: QueryBall, z: Tensor, place: Tensor
) -> tuple[Float[Tensor, " j"], Float[Tensor, "j k"]]:
    """``‖M(q)‖₂`` and its gradient in ``z``, float64 on the CPU; two passes over the tokens."""
    head = operator.head
    assert isinstance(head, Attentive)
    asked = head.asking(ball.queries(z, place).to(operator.device))
    size = max(1, NUMBERS // (len(z) * (head.s + head.d)))
    chunks = range(0, len(operator), size)
    M = torch.zeros(len(z) * head.d, R.shape[2], dtype=torch.float64, device=operator.device)
    for i in chunks:
        X = operator.X[i : i + size].to(operator.device, operator.dtype)
        features = asked.prepare_linear(X, reuse=False)["features"]
        M += (features.flatten(1).T @ R[i : i + size, 0].to(X.dtype)).double()
    (M,) = operator.ranks.sum(M)
    left, sigma, right = torch.linalg.svd(M.view(len(z), head.d, -1), full_matrices=False)
    a, b = left[:, :, 0].to(operator.dtype), right[:, 0].to(operator.dtype)  # (j, d), (j, c)
    slope = torch.zeros(len(z), head.d, dtype=torch.float64, device=operator.device)
    for i in chunks:
        X = operator.X[i : i + size].to(operator.device, operator.dtype)
        maps, X = asked.maps(X), asked.present(X)
        read = X @ a.T  # (b, s, j)
        pull = maps * (read - (maps * read).sum(1, keepdim=True)) * (R[i : i + size, 0].to(X.dtype) @ b.T).unsqueeze(1)
        slope += (pull.flatten(0, 1).T @ X.flatten(0, 1)).double()
    (slope,) = operator.ranks.sum(slope)
    return sigma[:, 0].cpu(), slope.cpu() @ ball.basis
