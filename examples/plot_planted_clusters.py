"""
Planted clusters of tokens
==========================

Attention finds the groups of tokens that decide the label. k-means on the raw tokens finds others.

Tokens belong to one of three groups, told apart in two quiet channels. Four louder channels hold four other groups
that the targets have nothing to do with. The targets depend on how a sample's tokens are spread over the three groups,
through two attention heads that are orthogonal on both sides: the planted rank of Z is two.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

import convexhead as ch
from convexhead.interpret import (
    choose_n_clusters,
    cluster_figures,
    cluster_tokens,
    effective_rank,
    spectra,
    token_embedding,
)

PLANTED_RANK = 2


def planted(n: int = 500, s: int = 9, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Tokens ``(n, s, 6)``, targets ``(n, 2)`` and the planted group of every token ``(n, s)``."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.ones(3), size=n)
    groups = np.stack([rng.choice(3, size=s, p=p) for p in share])
    corners = np.array([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]])  # of a triangle
    quiet = corners[groups]
    loud = 4 * np.eye(4)[rng.integers(0, 4, size=(n, s))] + 0.3 * rng.normal(size=(n, s, 4))
    # The teacher: two attention heads on the quiet channels, orthogonal to each other on both sides.
    U = np.stack([np.eye(2), [[1.0, 0.0], [0.0, -1.0]]]) / 2**0.5
    V = np.stack([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    gram = np.einsum("nsd,nse->nde", quiet, quiet) / s
    y = np.einsum("nd,kde,nef,kfc->nc", quiet.mean(1), U, gram, V, optimize=True)
    y += 0.05 * y.std(0) * rng.normal(size=y.shape)
    quiet = quiet + 0.1 * rng.normal(size=quiet.shape)
    return np.concatenate([quiet, loud], axis=2), y, groups


def study(seed: int = 0) -> dict[str, Any]:
    """Fit the head, cluster tokens as it sees them and as they are."""
    X, y, groups = planted(seed=seed)
    tokens = torch.as_tensor(X)
    head = ch.ConvexHeadRegressor("self-attention", beta_ratio=0.1, tol=1e-5, random_state=0).fit(X, y)
    embedding = token_embedding(head, X, energy=0.9)
    k = choose_n_clusters(embedding, (2, 3, 4, 5, 6))
    return {
        "certificate": head.certificate_,
        "planted_rank": PLANTED_RANK,
        "rank": head.n_heads_,
        "effective_rank": {name: effective_rank(values) for name, values in spectra(head).items()},
        "directions": embedding.shape[2],
        "n_clusters": k,
        "ari_head": adjusted_rand_score(groups.ravel(), cluster_tokens(embedding, k).flatten()),
        "ari_raw": adjusted_rand_score(groups.ravel(), cluster_tokens(tokens, 3).flatten()),
        "figures": cluster_figures(embedding, k),
        "raw_figures": cluster_figures(tokens, 3),
    }


# %%
# How well the clusters of the head's latent embedding and those of the raw tokens agree with the planted groups, and
# the figures that tell real clusters from what k-means finds in any cloud.

if __name__ == "__main__":
    found = study()
    for name, value in found.items():
        print(f"{name:>15}: {value}")
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    axis.bar(["as the head sees them", "raw tokens"], [found["ari_head"], found["ari_raw"]])
    axis.set_ylabel("agreement with the planted groups\n(adjusted Rand index)")
    plt.show()
