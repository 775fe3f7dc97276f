"""These functions read from its weights what a trained head does."""

from convexhead.interpret.clusters import (
    ClusterFigures,
    choose_n_clusters,
    cluster_figures,
    cluster_tokens,
)
from convexhead.interpret.contributions import head_contributions, head_lift, token_contributions
from convexhead.interpret.embedding import principal_embedding, retained_directions, token_embedding
from convexhead.interpret.filters import Filters, fourier_filters, mixing_matrix
from convexhead.interpret.fitted import FittedHead
from convexhead.interpret.queries import query_maps, query_strengths
from convexhead.interpret.spectra import effective_rank, spectra

__all__ = [
    "ClusterFigures",
    "Filters",
    "FittedHead",
    "choose_n_clusters",
    "cluster_figures",
    "cluster_tokens",
    "effective_rank",
    "fourier_filters",
    "head_contributions",
    "head_lift",
    "mixing_matrix",
    "principal_embedding",
    "query_maps",
    "query_strengths",
    "retained_directions",
    "spectra",
    "token_contributions",
    "token_embedding",
]
