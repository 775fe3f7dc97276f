"""The heads by name. A new head is one file with a `Head` subclass and one line here."""

from __future__ import annotations

import numbers
from typing import Any

from torch import Tensor

from convexhead.errors import InputError, choose
from convexhead.program.heads.attentive import Attentive
from convexhead.program.heads.base import POOLS, Head, resolve_grid
from convexhead.program.heads.block_fno import OUTPUTS, BlockFNO
from convexhead.program.heads.fno import FNO
from convexhead.program.heads.linear import Linear
from convexhead.program.heads.mlp import MLP
from convexhead.program.heads.mlp_mixer import MLPMixer
from convexhead.program.heads.query_ball import QueryBall
from convexhead.program.heads.self_attention import SelfAttention

KINDS = (SelfAttention, Attentive, MLPMixer, FNO, BlockFNO, MLP, Linear)
HEADS: dict[str, type[Head]] = {head.name: head for head in KINDS}


def make_head(
    name: Any,
    n_tokens: int,
    n_channels: int,
    *,
    pool: Any = "mean",
    grid: Any = None,
    n_blocks: Any = 4,
    outputs: Any = "shared",
    queries: Tensor | None = None,
    query_norm: str = "all",
    ball: QueryBall | None = None,
) -> Head:
    """Build the head called ``name`` from what a user passes.

    ``n_blocks`` and ``outputs`` concern block-FNO alone, ``queries``, ``query_norm`` and ``ball`` the attentive head,
    which needs the first.
    """
    head = HEADS[choose("head", name, HEADS)]
    own: dict[str, Any] = {}
    if head is BlockFNO:
        if not isinstance(n_blocks, numbers.Integral) or isinstance(n_blocks, bool):
            raise InputError(f"n_blocks must be a positive integer, got {n_blocks!r}")
        own = {"n_blocks": int(n_blocks), "outputs": choose("outputs", outputs, OUTPUTS)}
    if head is Attentive:
        if queries is None:
            raise InputError("head='attentive' needs the queries of its maps: pass queries=, (J, d)")
        own = {"queries": queries, "query_norm": query_norm, "ball": ball}
    return head(n_tokens, n_channels, pool=choose("pool", pool, POOLS), grid=resolve_grid(n_tokens, grid), **own)


__all__ = ["HEADS", "Head", "make_head"]
