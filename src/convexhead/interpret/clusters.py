"""A head may group tokens; these figures say whether the groups are real.

Tokens with the same latent embedding (`token_embedding`) are treated alike: the head clusters tokens. k-means cuts any
cloud of points into clusters, so every figure stands beside its value on a cloud without any: the same tokens with
every principal coordinate permuted over all of them, clustered anew. That keeps how each direction is distributed and
destroys what directions have to do with each other. Clusters that are no better than this are not real.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score
from torch import Tensor

from convexhead.errors import InputError

SAMPLE = 2_000
"""Largest number of tokens that a silhouette is estimated from, since it compares all pairs. Chosen by hand."""
CANDIDATES = (2, 3, 4, 5, 6, 8, 10)
"""Numbers of clusters that `choose_n_clusters` tries. Chosen by hand."""
STARTS = 4
"""Random starts of k-means, the best of which counts. Chosen by hand."""

Points = NDArray[np.float64]


class Figure(NamedTuple):
    """One figure of a clustering beside its mean and largest value over permuted tokens."""

    value: float
    permuted: float
    permuted_largest: float

    @property
    def is_real(self) -> bool:
        """Whether it is above that of every permutation."""
        return self.value > self.permuted_largest


@dataclass(frozen=True)
class ClusterFigures:
    """Three figures say how real the clusters of tokens are.

    Attributes
    ----------
    n_clusters : int
    silhouette : Figure
        Mean of ``(b − a) / max(a, b)``, ``a`` the mean distance within the own cluster and ``b`` to the nearest other
        one (Rousseeuw 1987): 1 is perfect, 0 none.
    similarity_ratio : Figure
        Mean cosine similarity to the own cluster's other tokens minus that to all other tokens, over the spread of
        similarities: how much more alike tokens of a cluster are.
    agreement : Figure
        Adjusted Rand index between images: of two labellings of all tokens, one by centres found on one half of the
        images, one by centres found on the other. 1: other images give the same clusters; 0: unrelated ones.
    """

    n_clusters: int
    silhouette: Figure
    similarity_ratio: Figure
    agreement: Figure


def cluster_tokens(embedding: Float[Tensor, "n s r"], n_clusters: int, *, seed: int = 0) -> Int[Tensor, "n s"]:
    """Cluster all tokens of all samples by k-means, the largest cluster first."""
    labels = _kmeans(_points(embedding, n_clusters), n_clusters, seed).labels_
    order = np.argsort(-np.bincount(labels, minlength=n_clusters), kind="stable")
    return torch.as_tensor(np.argsort(order)[labels]).view(embedding.shape[:2])


def choose_n_clusters(
    embedding: Float[Tensor, "n s r"], candidates: Sequence[int] = CANDIDATES, *, seed: int = 0
) -> int:
    """Return the number of clusters with the best silhouette."""
    points = _points(embedding, max(candidates))
    scores = [_silhouette(points, _kmeans(points, k, seed).labels_, seed) for k in candidates]
    return candidates[int(np.argmax(scores))]


def cluster_figures(
    embedding: Float[Tensor, "n s r"], n_clusters: int, *, permutations: int = 10, seed: int = 0
) -> ClusterFigures:
    """Measure the clusters that `cluster_tokens` finds, beside those of ``permutations`` permuted clouds.

    Parameters
    ----------
    embedding : Tensor (n, s, r)
        Of at least two images: as a head sees them, or raw features.
    """
    if len(embedding) < 2:
        raise InputError("cluster figures compare images: give at least two")
    rng = np.random.default_rng(seed)
    points = _points(embedding, n_clusters)
    found = _figures(points, embedding.shape[1], n_clusters, seed)
    centred = points - points.mean(0)
    rotated = centred @ np.linalg.svd(centred, full_matrices=False)[2].T
    null = np.array(
        [
            _figures(rng.permuted(rotated, axis=0), embedding.shape[1], n_clusters, seed)
            for _ in range(max(1, permutations))
        ]
    )
    figures = [Figure(*map(float, row)) for row in zip(found, null.mean(0), null.max(0), strict=True)]
    return ClusterFigures(n_clusters, *figures)


def _points(embedding: Float[Tensor, "n s r"], n_clusters: int) -> Points:
    n, s, r = embedding.shape
    if not 2 <= n_clusters < n * s:
        raise InputError(f"n_clusters={n_clusters} must be at least 2 and fewer than the {n * s} tokens")
    if r == 0:
        raise InputError("the head retains no direction (its weights are zero): there is nothing to cluster")
    return embedding.double().reshape(n * s, r).cpu().numpy()


def _kmeans(points: Points, n_clusters: int, seed: int) -> KMeans:
    return KMeans(n_clusters, n_init=STARTS, random_state=seed).fit(points)


def _figures(points: Points, s: int, n_clusters: int, seed: int) -> tuple[float, float, float]:
    """Return silhouette, similarity ratio and agreement of ``points (n·s, r)``."""
    labels = _kmeans(points, n_clusters, seed).labels_
    even = np.arange(len(points)) // s % 2 == 0
    halves = [_kmeans(points[half], n_clusters, seed).predict(points) for half in (even, ~even)]
    return _silhouette(points, labels, seed), _similarity_ratio(points, labels), float(adjusted_rand_score(*halves))


def _silhouette(points: Points, labels: NDArray[np.int32], seed: int) -> float:
    return float(silhouette_score(points, labels, sample_size=min(SAMPLE, len(points)), random_state=seed))


def _similarity_ratio(points: Points, labels: NDArray[np.int32]) -> float:
    """Compute means over pairs through sums of unit vectors: nothing of the size of all pairs is formed."""
    unit = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-300)
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
