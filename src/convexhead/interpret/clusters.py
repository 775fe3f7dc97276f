"""How a head groups tokens, and whether the groups are real.

A self-attention head compares tokens only through the few directions that its atoms retain. With ``A (d, r)`` their
orthonormal basis, tokens with the same latent embedding ``x A`` are treated alike: the head clusters tokens. Any
embedding can be cut into clusters, so what is reported are figures that can come out badly, each beside its value
when the clusters are assigned at random.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch import Tensor

from convexhead.errors import InputError
from convexhead.heads.base import Head
from convexhead.problem import Atoms

SAMPLE = 5_000
"""Tokens that the silhouette is estimated from, at most: it compares all pairs."""


def retained_directions(head: Head, atoms: Atoms, *, energy: float = 0.99) -> Float[Tensor, "d r"]:
    """Orthonormal basis of the token directions that a self-attention head looks at, strongest first.

    The leading eigenvectors of ``Σ_kl ⟨V_k, V_l⟩ (U_k U_lᵀ + U_kᵀ U_l)``: the query and the key side together.

    Parameters
    ----------
    head : Head
        Self-attention.
    atoms : Atoms
    energy : float
        Share of the trace that the directions keep.
    """
    if head.name != "self-attention":
        raise InputError(f"token directions are defined for the self-attention head, not for {head.name!r}")
    if not 0 < energy <= 1:
        raise InputError(f"energy must be in (0, 1], got {energy!r}")
    U, V = atoms.U.double(), atoms.V.double().flatten(1)
    gram = (V @ V.T) * (atoms.block.unsqueeze(1) == atoms.block)
    weighted = torch.einsum("kl,lij->kij", gram, U)
    sides = torch.einsum("kij,kmj->im", weighted, U) + torch.einsum("kji,kjm->im", weighted, U)
    values, Q = torch.linalg.eigh(sides)
    values, Q = values.clamp_min(0).flip(0), Q.flip(1)
    if float(values.sum()) == 0:
        return Q[:, :0]
    kept = int((values.cumsum(0) < energy * values.sum() * (1 - 1e-12)).sum()) + 1
    return Q[:, :kept]


def token_embedding(
    head: Head, atoms: Atoms, X: Float[Tensor, "n s d"], *, energy: float = 0.99
) -> Float[Tensor, "n s r"]:
    """``X_i A``: tokens as the head sees them, ``A`` from `retained_directions`."""
    if X.ndim != 3 or tuple(X.shape[1:]) != (head.s, head.d):
        raise InputError(f"tokens have shape {tuple(X.shape)}, but this head takes (n, {head.s}, {head.d})")
    return X.double() @ retained_directions(head, atoms, energy=energy).to(X.device)


@dataclass(frozen=True)
class ClusterFigures:
    """How real clusters are; each figure beside its mean over random assignments with the same sizes.

    Attributes
    ----------
    silhouette : float
        Mean of ``(b − a) / max(a, b)``, ``a`` the mean distance within the own cluster and ``b`` to the nearest other
        one (Rousseeuw 1987): 1 is perfect, 0 none.
    similarity_ratio : float
        Mean cosine similarity to the own cluster's other tokens minus that to all other tokens, over the spread of
        similarities: how much more alike tokens of a cluster are.
    """

    n_clusters: int
    silhouette: float
    silhouette_random: float
    similarity_ratio: float
    similarity_ratio_random: float

    def to_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return asdict(self)


def cluster_tokens(embedding: Float[Tensor, "n s r"], n_clusters: int, *, seed: int = 0) -> Int[Tensor, "n s"]:
    """k-means clusters of all tokens of all samples (best of ten starts)."""
    n, s, r = embedding.shape
    if not 2 <= n_clusters <= n * s:
        raise InputError(f"n_clusters={n_clusters} must be at least 2 and at most the {n * s} tokens")
    if r == 0:
        raise InputError("the head retains no direction (its weights are zero): there is nothing to cluster")
    found = KMeans(n_clusters, n_init=10, random_state=seed).fit(embedding.reshape(n * s, r).cpu().numpy())
    return torch.as_tensor(found.labels_.astype(np.int64)).view(n, s)


def choose_n_clusters(
    embedding: Float[Tensor, "n s r"], candidates: tuple[int, ...] = (2, 3, 4, 5, 6, 8, 10), *, seed: int = 0
) -> int:
    """The number of clusters with the best silhouette."""
    flat = embedding.flatten(0, 1).cpu().numpy()
    scores = [_silhouette(flat, cluster_tokens(embedding, k, seed=seed).flatten().numpy(), seed) for k in candidates]
    return candidates[int(np.argmax(scores))]


def cluster_figures(
    embedding: Float[Tensor, "n s r"], clusters: Int[Tensor, "n s"], *, permutations: int = 10, seed: int = 0
) -> ClusterFigures:
    """Figures of a clustering, and of ``permutations`` random ones of the same sizes."""
    flat, labels = embedding.flatten(0, 1).cpu().numpy(), clusters.flatten().cpu().numpy()
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(labels) for _ in range(permutations)]
    return ClusterFigures(
        n_clusters=len(np.unique(labels)),
        silhouette=_silhouette(flat, labels, seed),
        silhouette_random=float(np.mean([_silhouette(flat, other, seed) for other in shuffled])),
        similarity_ratio=_similarity_ratio(flat, labels),
        similarity_ratio_random=float(np.mean([_similarity_ratio(flat, other) for other in shuffled])),
    )


def _silhouette(flat: NDArray[np.float64], labels: NDArray[np.int64], seed: int) -> float:
    size = min(SAMPLE, len(flat))
    return float(silhouette_score(flat, labels, sample_size=size, random_state=seed))


def _similarity_ratio(flat: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Means over pairs through sums of unit vectors: nothing of the size of all pairs is formed."""
    unit = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-300)
    n, total, square = len(unit), unit.sum(0), unit.T @ unit
    pairs = n * (n - 1)
    all_sum, all_square = total @ total - n, (square * square).sum() - n
    mean = all_sum / pairs
    spread = np.sqrt(max(all_square / pairs - mean**2, 1e-300))
    within_sum, within_pairs = 0.0, 0
    for k in np.unique(labels):
        mine = unit[labels == k]
        within_sum += mine.sum(0) @ mine.sum(0) - len(mine)
        within_pairs += len(mine) * (len(mine) - 1)
    between_pairs = pairs - within_pairs
    if not within_pairs or not between_pairs:
        return 0.0
    return float((within_sum / within_pairs - (all_sum - within_sum) / between_pairs) / spread)
