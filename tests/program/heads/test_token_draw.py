"""Tokens that are drawn by content and weight."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from convexhead.program.heads.query_ball import QueryBall
from convexhead.program.heads.token_draw import TokenDraw

X = torch.randn(11, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TIMES = torch.tensor([1, 2, 3, 1, 1, 4, 1, 2, 1, 1, 3])
WEIGHTS = TIMES.double()


def drawn(draw, count=30, seed=4):
    return draw.tokens(count, torch.Generator().manual_seed(seed))


def queries(draw):
    ball = QueryBall.of(draw, radius=2.0, grid=None)
    return ball.queries(*ball.sample(draw, 30, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_does_not_matter_and_a_weight_is_a_repetition(dtype):
    tokens, generator = X.to(dtype), torch.Generator().manual_seed(1)
    weighed = TokenDraw.of(tokens, WEIGHTS)
    repeated = tokens.repeat_interleave(TIMES, 0)[torch.randperm(int(TIMES.sum()), generator=generator)]
    for other in (TokenDraw.of(repeated), TokenDraw.of(tokens.flip(0), WEIGHTS.flip(0))):
        assert torch.equal(drawn(other), drawn(weighed))
        assert torch.equal(queries(other), queries(weighed))
    assert torch.equal(drawn(TokenDraw.of(repeated[:, torch.randperm(5, generator=generator)])), drawn(weighed))
    assert not torch.equal(drawn(weighed, seed=5), drawn(weighed))
    assert not torch.equal(drawn(TokenDraw.of(tokens)), drawn(weighed))


def test_tokens_are_those_of_samples_each_as_often_as_the_others():
    assert set(map(tuple, drawn(TokenDraw.of(X), 1100).tolist())) == set(map(tuple, X.flatten(0, 1).tolist()))
    draw = TokenDraw.of(X)
    per_sample = (drawn(draw, 4 * 11)[:, None] == X[:, None].flatten(0, 2)).all(2).double().argmax(1) // 5
    assert torch.equal(per_sample.bincount(), torch.full((11,), 4))  # races without repetition, one after the other


def test_the_first_of_a_race_is_as_likely_as_its_weight():
    draw, times = TokenDraw.of(X, WEIGHTS), 4000
    generator = torch.Generator().manual_seed(0)
    first = torch.cat([draw.tokens(1, generator) for _ in range(times)])
    which = (first[:, None] == X.flatten(0, 1)).all(2).double().argmax(1)
    expected = times * (WEIGHTS / WEIGHTS.sum()).repeat_interleave(5) / 5
    chi_squared = float(((which.bincount(minlength=55) - expected) ** 2 / expected).sum())
    assert chi_squared < 100  # of 54 degrees of freedom: one in 10,000


def test_tokens_that_are_not_there_are_never_drawn():
    mask = torch.arange(5) < torch.arange(11)[:, None] % 5 + 1
    padded = X.masked_fill(~mask.unsqueeze(2), -math.inf)
    longer = torch.cat([padded, padded.new_full((11, 2, 3), -math.inf)], 1)
    assert drawn(TokenDraw.of(padded), 100).isfinite().all()
    assert torch.equal(drawn(TokenDraw.of(longer)), drawn(TokenDraw.of(padded)))
    torch.testing.assert_close(queries(TokenDraw.of(longer)), queries(TokenDraw.of(padded)))


def test_different_samples_have_different_hashes():
    generator = np.random.default_rng(0)
    tokens = torch.from_numpy(generator.integers(0, 3, (60_000, 1, 12)).astype(np.float32))  # few bits are set
    draw = TokenDraw.of(tokens)
    assert len(draw.rows) == len(tokens.unique(dim=0))
    assert draw.weights.sum() == len(tokens)
    tiny = TokenDraw.of(1e-300 * tokens[:1000].double())
    assert len(tiny.rows) == len(tokens[:1000].unique(dim=0))


def test_the_metric_is_that_of_weighted_tokens():
    ball = QueryBall.of(TokenDraw.of(X, WEIGHTS), radius=1.0, grid=None)
    repeated = X.repeat_interleave(TIMES, 0)
    scores = (repeated - repeated.mean(1, keepdim=True)) @ ball.basis
    covariance = scores.flatten(0, 1).T @ scores.flatten(0, 1) / scores[..., 0].numel()
    torch.testing.assert_close(covariance, torch.eye(3).double())
    torch.testing.assert_close(ball.centre, repeated.mean((0, 1)))
