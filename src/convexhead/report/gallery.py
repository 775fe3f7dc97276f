"""The data behind a report's gallery: images, logits, contributions of every head to every class, clusters.

Contributions ``C_i[t, k, c]`` are kept as one byte each, in units of the largest of their map (an image, a head, a
class): a map is exact to 0.4% of its strongest token. Sums and logits are float32. Where all of it would be larger than
the budget, an image keeps the classes of its largest logits and its true one.
"""

from __future__ import annotations

import base64
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from convexhead.interpret import (
    choose_n_clusters,
    cluster_figures,
    cluster_tokens,
    head_contributions,
    principal_embedding,
    query_maps,
    query_strengths,
    token_embedding,
)
from convexhead.report.evidence import Evidence

BUDGET = 5_000_000
"""Bytes that the contributions of all runs of a report may take together. Chosen by hand: the page stays small."""
HEADS = 24
"""Largest number of heads that can be chosen by themselves, the strongest first. Chosen by hand."""
QUERIES, LOOKED_AT = 6, 5
"""Numbers of queries whose maps are drawn, the strongest first, and of images. Chosen by hand: so many fit a page."""
STEP = 8
"""Images at a time."""

Array = NDArray[Any]


def gallery(model: Any, evidence: Evidence, *, size: int, budget: int) -> dict[str, Any]:
    """What the page's script reads, as JSON values; arrays are base64 of little-endian numbers.

    ====================  ================  =====================================================================
    ``heads``             ``K``             the strongest, by themselves; 0 stands for all heads, 1 for the strongest
    ``shown``             ``(g, m)``        int16, the classes that are kept of each image, most likely first
    ``logits``            ``(g, c)``        float32
    ``sums``, ``scales``  ``(g, m, K+1)``   float32, of each map its sum and its largest contribution
    ``maps``              ``(g, m, K+1, s)``  int8, of the patches alone
    ====================  ================  =====================================================================
    """
    sample, tokens = evidence.arrays["sample"][:size], evidence.arrays["tokens"][:size]
    labels, about = evidence.arrays["labels"][sample], evidence.about
    strongest = strongest_heads(model)[:HEADS]
    logits = model.model_.outputs(tokens)[:, 0]
    g, s, c = len(tokens), tokens.shape[1], logits.shape[1]
    m = min(c, max(3, budget // max(1, g * s * (len(strongest) + 1))))
    order = np.argsort(-logits, axis=1, kind="stable")
    for row, label in zip(order, labels, strict=True):  # the true class is always among them
        if label >= 0 and label not in row[:m]:
            row[m - 1] = label
    shown = order[:, :m]
    parts = [_maps(model, tokens[i : i + STEP], shown[i : i + STEP], strongest) for i in range(0, g, STEP)]
    maps = np.concatenate(parts).astype(np.float64)  # (g, m, K+1, s)
    scales = np.abs(maps).max(-1)
    small = np.rint(maps / np.maximum(scales, 1e-300)[..., None] * 127)
    (h, w) = grid = patch_grid(model)
    return {
        "grid": list(grid),
        "classes": about["classes"],
        "heads": len(strongest),
        "images": [
            {
                "file": about["files"][i],
                "label": int(labels[i]),
                "predicted": int(evidence.arrays["predicted"][row]),
                "wrong": bool(evidence.arrays["predicted"][row] != evidence.arrays["labels"][row]),
                "confidence": round(float(evidence.arrays["confidence"][row]), 4),
            }
            for i, row in enumerate(sample)
        ],
        "intercept": [round(float(b), 6) for b in model.intercept_],
        "kept": m,
        "shown": _pack(shown, "<i2"),
        "logits": _pack(logits, "<f4"),
        "sums": _pack(maps.sum(-1), "<f4"),
        "scales": _pack(scales, "<f4"),
        "maps": _pack(small[..., -h * w :], "i1"),
    }


def patch_grid(model: Any) -> tuple[int, int]:
    """The grid of the patches, which are the last ``h * w`` tokens: before them is the class token, if it is read."""
    origin = model.origin_
    grid: tuple[int, int] = model.grid_
    return (origin.token_pool or origin.grid) if origin is not None and origin.class_token else grid


def strongest_heads(model: Any) -> Array:
    """Atoms by falling singular value over all blocks: positions in the order in which the model keeps them."""
    if hasattr(model, "coef_"):
        return np.zeros(1, np.int64)
    return np.argsort(-np.concatenate(model.singular_values_), kind="stable")


def clusters(model: Any, evidence: Evidence, *, size: int) -> dict[str, Any]:
    """Clusters of the sample's tokens as the head sees them and as they are, with their figures.

    Rows of ``figures``: the head's latent embedding, raw features, and raw features reduced to as many principal
    components as the embedding has directions (figures are easier to come by in few dimensions).
    """
    tokens = torch.from_numpy(evidence.arrays["tokens"]).double()
    embedding = token_embedding(model, tokens)
    if embedding.shape[2] == 0:
        return {"figures": [], "head": "", "raw": "", "n": [0, 0]}
    rank = embedding.shape[2]
    clouds = {
        "as the head sees them": embedding,
        "raw features": tokens,
        f"raw, {rank} principal components": principal_embedding(tokens, rank),
    }
    numbers = {name: choose_n_clusters(cloud) for name, cloud in clouds.items()}
    figures = [
        {"tokens": name, "dimensions": cloud.shape[2], **asdict(cluster_figures(cloud, numbers[name]))}
        for name, cloud in clouds.items()
    ]
    h, w = patch_grid(model)
    seen, raw = (cluster_tokens(clouds[name], numbers[name])[:size, -h * w :] for name in list(clouds)[:2])
    n = [numbers[name] for name in list(clouds)[:2]]
    return {"figures": figures, "head": _pack(seen, "u1"), "raw": _pack(raw, "u1"), "n": n}


def strongest_queries(model: Any, evidence: Evidence) -> dict[str, Any]:
    """What the strongest queries of an attentive head look at, in the first image of each of a few classes.

    =============  ==============  ============================================================================
    ``of``         number          of all queries
    ``queries``    ``k``           rows of ``queries_``, the strongest first
    ``shares``     ``k``           ``‖Z_j‖_F²`` of each, as a share of the sum over all queries
    ``labels``     ``g``           outputs that the images belong to, −1 for a class that training never saw
    ``files``      ``g``
    ``maps``       ``(g, k, h, w)``  of the patches alone
    =============  ==============  ============================================================================
    """
    labels = evidence.arrays["labels"][evidence.arrays["sample"]]
    rows = np.sort(np.unique(labels, return_index=True)[1])[:LOOKED_AT]
    squares = query_strengths(model).numpy() ** 2
    queries = np.argsort(-squares, kind="stable")[:QUERIES]
    h, w = patch_grid(model)
    maps = query_maps(model, evidence.arrays["tokens"][rows]).numpy()[:, -h * w :, queries]
    return {
        "of": len(squares),
        "queries": queries.tolist(),
        "shares": (squares[queries] / squares.sum()).tolist(),
        "labels": labels[rows].tolist(),
        "files": [evidence.about["files"][row] for row in rows],
        "maps": maps.transpose(0, 2, 1).reshape(len(rows), len(queries), h, w).tolist(),
    }


def _maps(model: Any, tokens: Array, shown: Array, strongest: Array) -> Array:
    """``(b, m, K+1, s)``: all heads, then each of the strongest, for the classes that are shown."""
    parts = head_contributions(model, tokens).numpy()  # (b, s, k, c)
    picked = np.take_along_axis(parts, shown[:, None, None, :], axis=3)
    both = np.concatenate([picked.sum(2, keepdims=True), picked[:, :, strongest]], axis=2)
    return both.transpose(0, 3, 2, 1)


def _pack(array: Any, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array).astype(dtype).tobytes()).decode()
