"""What a trained head did, read from its weights."""

from convexhead.interpret.attention import token_contributions
from convexhead.interpret.clusters import (
    ClusterFigures,
    choose_n_clusters,
    cluster_figures,
    cluster_tokens,
    retained_directions,
    token_embedding,
)
from convexhead.interpret.spectra import effective_rank, spectra

__all__ = [
    "ClusterFigures",
    "choose_n_clusters",
    "cluster_figures",
    "cluster_tokens",
    "effective_rank",
    "retained_directions",
    "spectra",
    "token_contributions",
    "token_embedding",
]
