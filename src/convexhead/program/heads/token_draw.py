"""Random tokens by content and weight: the order of samples does not matter, and a weight of 2 is the sample twice.

Samples with the same tokens are one, whose weight is the sum of theirs. A draw is an exponential race: with ``u`` in
(0, 1) a hash of a sample's tokens and of a seed, the samples with the smallest

    −log(u) / w

are random ones without repetition, each first with probability ``w / Σ w``. Where more are asked for than there are,
races with other seeds follow. One token of a drawn sample is found by a race of its own tokens.

Hashes are of the tokens as they are read, in float64. Those of principal components and whitened tokens may change
with how many are read at a time, so for a store of such tokens draws are reproduced only by reading the same rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from convexhead.runtime.ranks import Ranks
from convexhead.runtime.stored_tokens import CHUNK_BYTES, AllTokens, Tokens, chunk_rows, read_ahead

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class TokenDraw:
    """What tokens are drawn from.

    Attributes
    ----------
    X : AllTokens (n, s, d)
        Rows of ``−∞`` are tokens that a sample does not have.
    rows : int array (m,)
        Where each different sample is, in the order of their hashes.
    weights : float array (m,)
        What it counts.
    hashes : uint64 array (m,)
        Of its tokens, whatever their order.
    """

    X: AllTokens
    rows: NDArray[np.int64]
    weights: NDArray[np.float64]
    hashes: Hashes

    @classmethod
    def of(cls, X: Tokens, weights: Float[Tensor, " n"] | None = None, ranks: Ranks | None = None) -> TokenDraw:
        """Read and hash all tokens.

        Parameters
        ----------
        X : Tensor (n, s, d) or StoredTokens
        weights : Tensor (n,) or None
            None: all count alike.
        ranks : Ranks or None
            The processes that share the samples, each with its own ``X``; all of them draw the same.
        """
        ranks = ranks or Ranks()
        chunks = read_ahead(X, chunk_rows(X, CHUNK_BYTES["cpu"]))
        found = [_of_samples(_of_tokens(chunk), _there(chunk)) for _, chunk in chunks]
        n = int(ranks.sum(torch.tensor(len(X)))[0])
        every = ranks.join(torch.from_numpy(np.concatenate(found).view(np.int64)), n).numpy().view(np.uint64)
        hashes, rows, which = np.unique(every, return_index=True, return_inverse=True)
        each = np.ones(n) if weights is None else weights.double().cpu().numpy()
        return cls(AllTokens(X, ranks, n), rows, np.bincount(which, each, len(rows)).astype(np.float64), hashes)

    def samples(self, count: int, seed: int = 0) -> tuple[Float[Tensor, "k s d"], Float[Tensor, " k"]]:
        """All different samples with their weights, or ``count`` random ones that weigh alike; float64 on the CPU."""
        if count >= len(self.rows):
            return self._read(np.arange(len(self.rows))), torch.from_numpy(self.weights)
        chosen = np.sort(_winners(self.hashes, self.weights, count, seed))
        return self._read(chosen), torch.ones(count, dtype=torch.float64)

    def tokens(self, count: int, generator: torch.Generator) -> Float[Tensor, "count d"]:
        """One random token of each of ``count`` random samples, float64 on the CPU."""
        seed = int(torch.randint(2**62, (1,), generator=generator))
        drawn: list[Tensor] = []
        while len(drawn) < count:
            seed += 1
            chosen = _winners(self.hashes, self.weights, min(count - len(drawn), len(self.rows)), seed)
            for sample in self._read(chosen):
                own = sample[_there(sample)]
                hashes, first, times = np.unique(_of_tokens(own), return_index=True, return_counts=True)
                drawn.append(own[first[_winners(hashes, times.astype(np.float64), 1, seed)[0]]])
        return torch.stack(drawn)

    def _read(self, chosen: NDArray[np.int64]) -> Float[Tensor, "k s d"]:
        """The samples ``chosen (k,)``."""
        return self.X[torch.from_numpy(self.rows[chosen])].double().cpu()


def _there(tokens: Float[Tensor, "... d"]) -> Tensor:
    """Which tokens a sample has."""
    return (tokens > -math.inf).any(-1)


def _winners(hashes: Hashes, weights: NDArray[np.float64], count: int, seed: int) -> NDArray[np.int64]:
    """Which win the race, the first of them first."""
    start = _mixed(np.array([seed], np.uint64))
    u = ((_mixed(hashes ^ start) >> np.uint64(11)) + 0.5) * 2.0**-53
    order: NDArray[np.int64] = np.argsort(-np.log(u) / weights, kind="stable")[:count]
    return order


def _of_tokens(tokens: Float[Tensor, "... d"]) -> Hashes:
    """A hash of the numbers in each token: ``Σ_k a_k x_k`` of their bits, ``a_k`` random odd numbers."""
    bits = (tokens.detach().cpu().double() + 0.0).numpy().view(np.uint64)  # −0 becomes 0
    odd = _mixed(np.arange(1, tokens.shape[-1] + 1, dtype=np.uint64)) | np.uint64(1)
    # Low bits of a product hold only low bits of its factors, which float32 numbers leave empty.
    return _mixed(((bits ^ (bits >> np.uint64(32))) * odd).sum(-1, dtype=np.uint64))


def _of_samples(hashes: Hashes, there: Tensor) -> Hashes:
    """A hash of the tokens that each sample has."""
    return _mixed(np.where(there.cpu().numpy(), hashes, np.uint64(0)).sum(1, dtype=np.uint64))


def _mixed(x: Hashes) -> Hashes:
    """Every bit of the result depends on every bit of ``x``: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
