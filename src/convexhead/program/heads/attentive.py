"""Attentive: tokens are averaged by softmax maps of fixed queries, as the attentive probes of the field do.

    φ_j(X) = Xᵀ softmax(X q_j + π_j) ∈ R^d        the mean of the tokens under the map of query j
    f      = Σ_j φ_j(X)ᵀ Z_j,   Z_j (d, c)

The queries ``q_j (d,)`` and the log-weights of places ``π_j (s,)`` are given, so the maps are fixed and the program is
convex. Its penalty is one of two:

    "all"     ‖[Z_1; …; Z_J]‖_*    the queries share latent directions, Z_j = Σ_k u_kj v_kᵀ        U (J, d), v (1, c)
    "each"    Σ_j ‖Z_j‖_*          every query has its own, Z_j = Σ_{k in j} u_k v_kᵀ              u (d,), v (1, c)

A probe that trains ``Σ_j φ_jᵀ V_j W`` with weight decay, ``V_j (d, m)``, ``W (m, c)``, has for these queries the
optimal value of the first, and one that splits its values over the queries, ``Σ_j φ_jᵀ V_j W_j`` ("efficient probing",
Psomas et al., ICLR 2026), that of the second, if ``m`` is large enough. A query of zeros has the mean of the tokens.

`convexhead.program.heads.query_ball` says which queries there are to sample and to search.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.errors import InputError, choose
from convexhead.program.heads.base import Data, GradientCost, Head, mix_features, mix_features_adjoint
from convexhead.program.heads.query_ball import QueryBall

QUERY_NORMS = ("all", "each")
LINEAR_ONLY = "the attentive head takes activation='linear' only: a softmax makes its maps"
PREPARED = 16
"""Samples are prepared in batches as if each took this part of the numbers it takes. Chosen by hand: a product over few
samples is slow."""


class Attentive(Head):
    """``U (J, d)`` or, with a norm for each query, ``u (d,)``; ``v (1, c)``.

    Parameters
    ----------
    queries : Tensor (J, d) or (J, d + s)
        ``q_j``, or ``(q_j, π_j)``. Kept in float64.
    query_norm : {"all", "each"}
    ball : QueryBall or None
        What the queries were found in: the program is then over all queries of this ball, with a norm for each.

    Raises
    ------
    InputError
        Queries of another shape, or with NaN or infinity; a pooling other than the mean; a ball and one norm for all.
    """

    name = "attentive"
    takes_masks = False
    homogeneous = False
    absent = -math.inf
    queries: Float[Tensor, "J m"]

    def __init__(
        self,
        n_tokens: int,
        n_channels: int,
        *,
        queries: Float[Tensor, "J m"],
        query_norm: str = "all",
        ball: QueryBall | None = None,
        **options: object,
    ) -> None:
        super().__init__(n_tokens, n_channels, **options)  # type: ignore[arg-type]
        self.query_norm = choose("query_norm", query_norm, QUERY_NORMS)
        self.ball, self.scope = ball, "sampled-queries" if ball is None else "global"
        if ball is not None and query_norm == "all":
            raise InputError("queries are searched one by one, so each has a norm: pass query_norm='each'")
        if self.pool != "mean":
            raise InputError(f"the attentive head pools tokens by its queries: pool={self.pool!r} is not for it")
        if queries.ndim != 2 or queries.shape[1] not in (self.d, self.d + self.s) or not len(queries):
            raise InputError(
                f"queries have shape {tuple(queries.shape)}, but this head needs (J, {self.d}) with J >= 1, or "
                f"(J, {self.d + self.s}): {self.d} channels, then log-weights of the {self.s} places"
            )
        if not torch.isfinite(queries).all():
            raise InputError("queries contain NaN or infinity")
        self.queries = queries.detach().double()
        self.any_length = queries.shape[1] == self.d
        self.n_groups = len(queries) if query_norm == "each" else 1
        self.feature_vector = "features" if query_norm == "all" else None
        self.mixing_shape = (self.d,) if query_norm == "each" else (len(queries), self.d)
        self.value_rows = 1

    def asking(self, queries: Tensor | None) -> Attentive:
        other: Attentive = object.__new__(type(self))  # torch.compile does not follow copy.copy
        other.__dict__.update(self.__dict__)
        other.queries = self.queries if queries is None else queries
        return other

    @property
    def divisions(self) -> int:
        return 0  # a softmax is over a sample's own tokens

    def present(self, X: Tensor) -> Tensor:
        return X.masked_fill(self._is_absent(X), 0.0) if self.any_length else X

    def _is_absent(self, X: Tensor) -> Tensor:
        return torch.eq(X, self.absent).all(2, keepdim=True)

    def mix_bound(self, norms: Tensor) -> Tensor:
        # A mean of tokens is no longer than the longest of them.
        return norms if self.query_norm == "each" else math.sqrt(len(self.queries)) * norms

    def operations(self, largest: float) -> float:
        # With products of size S in a score, which is a sum of d + 1 of them, the error of a weight is relatively at
        # most that of its exponential, the sum of s weights and twice a score's. Where that exceeds 1, means of tokens
        # still differ by no more than twice the longest: twice the count covers both.
        places = self.queries[:, self.d :]
        longest = float(self.queries[:, : self.d].norm(dim=1).max())
        S = largest * (longest if self.ball is None else max(longest, self.ball.longest))
        S += float(places.abs().max()) if places.shape[1] else 0.0
        return super().operations(largest) + 4 * (self.d + 4) * S + 2 * self.s + 32

    def maps(self, X: Tensor) -> Tensor:
        """``softmax(X q_j + π_j)`` over a sample's own tokens, ``(b, s, d) -> (b, s, J)``."""
        queries = self.queries.to(X.device, X.dtype)
        scores = self.present(X) @ queries[:, : self.d].T
        if self.any_length:
            scores = scores.masked_fill(self._is_absent(X), -math.inf)
        else:
            scores = scores + queries[:, self.d :].T
        return torch.softmax(scores, dim=1)

    def prepare_linear(self, X: Tensor, *, reuse: bool) -> Data:
        return {"features": self.maps(X).mT @ self.present(X)}  # (b, J, d)

    def linear_mix(self, data: Data, U: Tensor, group: Tensor) -> Tensor:
        if self.query_norm == "each":
            return mix_features(data["features"], U, group)
        # A product that is wide and not high is faster than its transpose.
        return (U.flatten(1) @ data["features"].flatten(1).T).T[:, None, :, None]

    def linear_mix_adjoint(self, data: Data, T: Tensor, group: Tensor) -> Tensor:
        if self.query_norm == "each":
            return mix_features_adjoint(data["features"], T, group)
        return (T[:, 0, :, 0].T @ data["features"].flatten(1)).unflatten(1, self.mixing_shape)

    def network_linear_mix(self, X: Tensor, U: Tensor, group: Tensor) -> Tensor:
        data = self.prepare_linear(X, reuse=False)
        if self.query_norm == "each":
            return (data["features"][:, group] * U).sum(2)[:, None, :, None]
        return self.linear_mix(data, U, group)

    def linear_workspace(self, k: int) -> int:
        return k + len(self.queries) * (self.s + self.d) // PREPARED

    # Σ_i φ_j(X_i) R_iᵀ, of all queries in one product.
    def gradient_cost(self, c: int, *, gates: int) -> GradientCost | None:
        return GradientCost(c / 4, c + len(self.queries) * (self.s + self.d) // PREPARED)

    def gradient(self, batches: Iterable[tuple[Data, Tensor]], block: Tensor) -> Tensor:
        total: Tensor | None = None
        for data, R in batches:
            features = data["features"] if len(block) == self.n_groups else data["features"][:, block]
            if total is None:
                total = R.new_zeros(R.shape[2], features[0].numel())
            total.addmm_(R[:, 0].T, features.flatten(1))
        assert total is not None
        return total.T.contiguous().view(len(block), self.mixing_size, -1)

    @property
    def score_width(self) -> int:
        return 1

    def preactivation(self, data: Data, U: Tensor, group: Tensor) -> Tensor:
        raise InputError(LINEAR_ONLY)

    def preactivation_adjoint(self, data: Data, A: Tensor, group: Tensor) -> Tensor:
        raise InputError(LINEAR_ONLY)
