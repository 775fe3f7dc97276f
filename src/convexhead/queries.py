"""The queries of an attentive head, as settings and data ask for them."""

from __future__ import annotations

from dataclasses import replace

import torch

from convexhead import inputs
from convexhead.errors import InputError
from convexhead.model import Model
from convexhead.program.heads.attentive import Attentive
from convexhead.program.heads.base import resolve_grid
from convexhead.program.heads.query_ball import QueryBall, sample_queries
from convexhead.program.heads.token_draw import TokenDraw
from convexhead.reading import Data
from convexhead.runtime.stored_tokens import Tokens
from convexhead.spec import Spec


def make_queries(spec: Spec, data: Data, generator: torch.Generator) -> torch.Tensor | None:
    """Explicit or sampled queries of the attentive head; None for the others."""
    if spec.head != Attentive.name:
        return None
    if spec.queries is not None:
        return inputs.as_weights(spec.queries, "queries")
    draw = token_draw(data)
    return sample_queries(query_ball(spec, data, draw), draw, spec.n_queries, generator)


def token_draw(data: Data) -> TokenDraw:
    """The tokens that queries are sampled from; samples count what they count in a score."""
    return TokenDraw.of(_present_tokens(data), None if data.counts is None else data.counts.sum(1))


def query_ball(spec: Spec, data: Data, draw: TokenDraw) -> QueryBall:
    """The ball that queries are sampled or searched in.

    Raises
    ------
    InputError
        Maps of places for samples of different numbers of tokens.
    """
    if data.padded is not None and spec.query_position:
        raise InputError(
            "maps of places need samples of the same number of tokens: pass query_position=False for samples of "
            "different numbers"
        )
    s = draw.X.shape[1]
    grid = resolve_grid(s, data.grid if spec.grid is None else spec.grid) if spec.query_position else None
    return QueryBall.of(draw, radius=spec.query_scale, grid=grid, key_dim=spec.key_dim)


def _present_tokens(data: Data) -> Tokens:
    """The tokens, with those that are not there as the attentive head takes them."""
    if data.padded is None:
        return data.tokens
    return data.padded.in_memory().masked_fill(~data.padded.mask.unsqueeze(2), Attentive.absent)


def without_idle_queries(model: Model) -> Model:
    """The same function with the queries that it uses, or with one where that is none."""
    assert model.queries is not None
    used, block = torch.unique(model.atoms.block, return_inverse=True)
    used = used if len(used) else torch.zeros(1, dtype=torch.int64)
    head = model.spec.make_head(
        model.head.s, model.head.d, grid=model.head.grid, queries=model.queries[used], ball=model.head.ball
    )
    return replace(model, head=head, atoms=replace(model.atoms, block=block))
