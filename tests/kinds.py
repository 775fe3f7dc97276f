"""Every kind of head, small: what tests run over, and heads for them."""

from __future__ import annotations

from typing import Any

import torch

from convexhead.program.heads import HEADS, Head, make_head

VARIANTS = {"block-fno": ("shared", "grouped"), "attentive": ("all", "each")}
"""What ``outputs`` or ``query_norm`` may be, of the heads that have one of these."""
MASKED = [name for name in HEADS if HEADS[name].takes_masks]
"""Heads that a ReLU can act on."""
QUERIES = 3
"""Of an attentive head."""


def cases(*activations: str) -> list[tuple[str, str, str]]:
    """``(name, activation, variant)`` of every head with every activation that it takes."""
    return [
        (name, activation, variant)
        for name in HEADS
        for activation in activations
        for variant in VARIANTS.get(name, ("shared",))
        if activation == "linear" or name in MASKED
    ]


def pooled(cases: list[tuple[str, ...]], *pools: str) -> list[tuple[str, ...]]:
    """``(*case, pool)`` of every case with every one of these pools that the head takes."""
    return [(*case, pool) for case in cases for pool in pools if pool == "mean" or case[0] != "attentive"]


def head_of(
    name: str,
    s: int,
    d: int,
    *,
    pool: str = "mean",
    grid: tuple[int, int] | None = None,
    n_blocks: int = 2,
    variant: str = "shared",
    places: bool = True,
) -> Head:
    """A head. Its queries, where it has some, are random, of content and with ``places`` of place; the first is 0."""
    own: dict[str, Any] = {"outputs": variant}
    if name == "attentive":
        queries = torch.randn(QUERIES, d + s * places, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        queries[0] = 0
        own = {"queries": queries, "query_norm": variant if variant in VARIANTS[name] else "all"}
    return make_head(name, s, d, pool=pool, grid=grid, n_blocks=n_blocks, **own)
