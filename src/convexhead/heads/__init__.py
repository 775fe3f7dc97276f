"""The heads by name. A new head is one file with a `Head` subclass and one line here."""

from __future__ import annotations

from convexhead.errors import choose
from convexhead.heads.base import Head
from convexhead.heads.block_fno import BlockFNO
from convexhead.heads.fno import FNO
from convexhead.heads.linear import Linear
from convexhead.heads.mlp import MLP
from convexhead.heads.mlp_mixer import MLPMixer
from convexhead.heads.self_attention import SelfAttention

HEADS: dict[str, type[Head]] = {head.name: head for head in (SelfAttention, MLPMixer, FNO, BlockFNO, MLP, Linear)}


def make_head(
    name: str,
    n_tokens: int,
    n_channels: int,
    *,
    pool: str = "mean",
    grid: tuple[int, int] | None = None,
    n_blocks: int = 4,
    outputs: str = "shared",
) -> Head:
    """Build the head called ``name``; ``n_blocks`` and ``outputs`` concern block-FNO alone."""
    head = HEADS[choose("head", name, HEADS)]
    own = {"n_blocks": n_blocks, "outputs": outputs} if head is BlockFNO else {}
    return head(n_tokens, n_channels, pool=pool, grid=grid, **own)


__all__ = ["HEADS", "Head", "make_head"]
