"""Bounds on what softmax queries read: never below anything that anybody finds, and close where they may be."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from convexhead.dual_norm.ball import cover
from convexhead.dual_norm.query_bound import largest_reward
from convexhead.dual_norm.softmax import Reads

KINDS = [
    "normal", "large", "small", "scales", "offset", "duplicates", "one token", "near duplicates", "collinear",
    "integers", "outlier", "equal tokens", "masked",
]  # fmt: skip


def nasty(kind, rng):
    """Tokens ``(n, s, d)`` and log-weights ``(n, s)`` of a kind."""
    n, s, d = (int(rng.integers(low, high)) for low, high in ((1, 9), (2, 7), (2, 5)))
    X, pi = rng.normal(size=(n, s, d)), np.zeros((n, s))
    match kind:
        case "large" | "small":
            X *= 1e6 if kind == "large" else 1e-6
        case "scales":
            X *= 10.0 ** rng.uniform(-6, 6, size=(n, 1, d))
        case "offset":
            X += 10.0 ** rng.uniform(2, 8)
        case "duplicates":
            X = X[:, rng.integers(0, s, s)]
        case "one token":
            X = X[:, :1]
        case "near duplicates":
            X = X[:, rng.integers(0, s, s)] + 1e-9 * X
        case "collinear":
            X = X[:1, :1] * rng.normal(size=(n, s, 1))
        case "integers":
            X = rng.integers(-1, 2, size=(n, s, d)).astype(float)
        case "outlier":
            X[0, 0] *= 1e5
        case "equal tokens":
            X = np.broadcast_to(X[:, :1], X.shape).copy()
        case "masked":
            X[:, -1], pi = 1e9, np.tile(rng.normal(size=s), (n, 1))
            pi[:, -1] = -math.inf
    return X, pi[:, : X.shape[1]]


def read(X, R, E, z, pi):
    """``M(z) (b, d, c)`` in extended precision, straight from the definition."""
    X, R, E, z, pi = (np.asarray(part, dtype=np.longdouble) for part in (X, R, E, z, pi))
    scores = np.einsum("nsd,dk,bk->bns", X, E, z) + pi
    w = np.exp(scores - scores.max(2, keepdims=True))
    w /= w.sum(2, keepdims=True)
    return np.einsum("bns,nsd,nc->bdc", w, np.where(np.isfinite(pi)[..., None], X, 0), R)


def attained(X, R, E, rho, pi, rng, m=800):
    """The largest norm at many queries of the ball: inside, on its surface, and where two tokens tie."""
    k = E.shape[1]
    z = rng.normal(size=(m, k))
    z *= rho / np.linalg.norm(z, axis=1, keepdims=True)
    z[: m // 2] *= rng.uniform(size=(m // 2, 1)) ** 4
    M = read(X, R, E, z, pi).astype(float)
    values = np.linalg.norm(M, 2, axis=(1, 2))
    best = z[values.argsort()[-3:]]
    near = np.concatenate([best + step * rho * rng.normal(size=(200, 1, k)) for step in (0.03, 1e-3)]).reshape(-1, k)
    near *= np.minimum(1, rho / np.linalg.norm(near, axis=1, keepdims=True))
    return max(values.max(), np.linalg.norm(read(X, R, E, near, pi).astype(float), 2, axis=(1, 2)).max())


def tensors(*parts):
    return [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_query_reads_more_than_the_bound(kind):
    for seed, (k, rho, most) in enumerate(((1, 0.5, 99), (2, 5.0, 300), (3, 5.0, 300), (2, 1e3, 4), (1, 1e3, 99))):
        rng = np.random.default_rng([KINDS.index(kind), seed])
        X, pi = nasty(kind, rng)
        R = rng.normal(size=(len(X), int(rng.integers(1, 4))))
        if seed % 2:  # as with an intercept: what is common to all tokens cancels
            R -= R.mean(0)
        E = np.linalg.qr(rng.normal(size=(X.shape[2], min(k, X.shape[2]))))[0]
        tX, tR, tE, tpi = tensors(X, R, E, pi)
        absent = (tpi == -math.inf).unsqueeze(2)
        places = tpi[:1] if kind == "masked" else None
        found = largest_reward(
            tX.masked_fill(absent, -math.inf), tR, tE, rho, places=places, rtol=1e-2, most_cells=most
        )
        assert max(found.lower, attained(X, R, E, rho, pi, rng)) <= found.upper, (kind, seed)
        assert float(found.z.norm()) <= rho
        own = np.linalg.norm(read(X, R, E, found.z.numpy()[None], pi)[0].astype(float), 2)
        assert found.lower <= own + found.upper * 1e-6 + (found.upper - found.lower), (kind, seed)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_boxes_are_bounded(k):
    """Boxes of any size, by queries in them and at their corners."""
    rng = np.random.default_rng(k)
    X, R = rng.normal(size=(6, 5, 4)), rng.normal(size=(6, 3))
    E = np.linalg.qr(rng.normal(size=(4, k)))[0]
    reads = Reads.of(*tensors(X, R, E), 30.0)
    corners = np.array(list(itertools.product((-1.0, 1.0), repeat=k)))
    for size in (1e-3, 0.1, 0.5, 2.0, 20.0):
        z0, F = rng.normal(size=(8, k)), size * rng.normal(size=(8, k, k))
        values, bounds = reads.bound(*tensors(z0 / reads.unit, F / reads.unit))
        for i in range(8):
            z = z0[i] + np.concatenate([corners, rng.uniform(-1, 1, size=(300, k))]) @ F[i]
            norms = np.linalg.norm(read(X, R, E, z, np.zeros((6, 5))).astype(float), 2, axis=(1, 2))
            assert norms.max() <= float(bounds[i]) * reads.scale
            if size == 1e-3:
                assert float(bounds[i]) * reads.scale <= norms.max() * (1 + 1e-4)
        assert bool((values <= bounds).all())


def test_errors_fall_with_the_square_of_the_box():
    rng = np.random.default_rng(0)
    reads = Reads.of(*tensors(rng.normal(size=(5, 4, 3)), np.array([[1.0], [2], [3], [1], [2]]), np.eye(3)[:, :1]), 9.0)
    errors = []
    for size in (0.02, 0.01, 0.005):
        F = torch.full((1, 1, 1), size / reads.unit).double()
        _, bound = reads.bound(torch.zeros(1, 1).double(), F)
        grid = torch.linspace(-1, 1, 201).double().view(-1, 1) * F[0]
        errors.append(float(bound - reads.value_and_slope(grid)[0].max()))
    assert errors[0] >= 4 * errors[1] >= 16 * errors[2] > 0


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_cells_cover_the_ball(k):
    """Every point is in the box of a cell, however the cells were halved."""
    rng = np.random.default_rng(k)
    z = rng.normal(size=(150, k))
    z *= 3.0 * rng.uniform(size=(150, 1)) / np.linalg.norm(z, axis=1, keepdims=True)
    z[:50] *= 3.0 / np.linalg.norm(z[:50], axis=1, keepdims=True)
    cells = cover(k, 3.0, torch.zeros(()).double())
    for _ in range(9):
        z0, F = cells.boxes()
        points = torch.from_numpy(z).unsqueeze(1) - z0
        coordinates = torch.linalg.solve(F.transpose(1, 2), points.unsqueeze(3)).squeeze(3)
        assert bool((coordinates.abs().amax(2) <= 1 + 1e-9).any(1).all())
        cells = cells.halve(torch.eye(k).double())


def problem(n=30, s=6, d=4, k=2, c=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, s, d, generator=generator).double()
    R = torch.randn(n, c, generator=generator).double() / n
    return X, R - R.mean(0), torch.linalg.qr(torch.randn(d, k, generator=generator).double())[0]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("rtol", [0.05, 1e-3])
def test_the_interval_closes(k, rtol):
    found = largest_reward(*problem(k=k), 2.0, rtol=rtol)
    assert found.lower <= found.upper <= found.lower * (1 + rtol) * (1 + 1e-6)


def test_a_search_that_is_late_has_a_bound(monkeypatch):
    X, R, E = problem()
    whole = largest_reward(X, R, E, 4.0)
    assert largest_reward(X, R, E, 4.0, late=lambda: True).upper == math.inf
    climbed, bounded, value_and_slope, bound = [], [], Reads.value_and_slope, Reads.bound
    monkeypatch.setattr(Reads, "value_and_slope", lambda *how: climbed.append(1) or value_and_slope(*how))
    monkeypatch.setattr(Reads, "bound", lambda *how: bounded.append(1) or bound(*how))
    largest_reward(X, R, E, 4.0, places=torch.zeros(5, X.shape[1]), late=lambda: True)
    assert len(climbed) == 1  # where the ascents of the first map begin
    hurried = largest_reward(X, R, E, 4.0, late=lambda: bool(bounded))
    assert hurried.cells < whole.cells
    assert whole.lower <= hurried.upper < math.inf


def test_a_bound_that_is_enough_ends_the_search():
    X, R, E = problem()
    whole = largest_reward(X, R, E, 4.0)
    lax = largest_reward(X, R, E, 4.0, enough=2 * whole.upper)
    assert lax.cells < whole.cells
    assert whole.lower <= lax.upper <= 2 * whole.upper


def test_starts_are_ascended():
    """A start that is the maximiser is found at once."""
    X, R, E = problem()
    whole = largest_reward(X, R, E, 4.0)
    told = largest_reward(X, R, E, 4.0, starts=whole.z.unsqueeze(0), most_cells=0)
    assert told.lower == pytest.approx(whole.lower, rel=1e-9)


@pytest.mark.parametrize("scale", [2.0**-80, 1.0, 2.0**80])
def test_scales_change_nothing(scale):
    X, R, E = problem()
    plain, scaled = largest_reward(X, R, E, 4.0), largest_reward(X * scale, R / scale, E, 4.0 / scale)
    assert scaled.cells == plain.cells
    assert scaled.upper == pytest.approx(plain.upper, rel=1e-12)
    torch.testing.assert_close(scaled.z * scale, plain.z)


def test_without_residuals_nothing_is_read():
    X, R, E = problem()
    assert largest_reward(X, 0 * R, E, 4.0).upper == 0


def test_every_map_over_places_is_bounded():
    X, R, E = problem()
    places = torch.tensor([[0.0] * 6, [0.0, -3, -3, -3, -3, -3], [-1.0, 0, -1, -2, -3, -4]]).double()
    each = [largest_reward(X, R, E, 2.0, places=place.unsqueeze(0)) for place in places]
    found = largest_reward(X, R, E, 2.0, places=places)
    best = max(range(3), key=lambda place: each[place].lower)
    assert found.place == best
    assert found.lower == pytest.approx(each[best].lower, rel=1e-9)
    assert max(part.lower for part in each) <= found.upper <= max(part.upper for part in each) * (1 + 1e-9)
    assert found.cells < sum(part.cells for part in each)
    assert largest_reward(X, R, E, 2.0, places=places, most_cells=1).upper == math.inf


def test_samples_of_different_length_read_their_own_tokens():
    X, R, E = problem()
    padded = torch.cat([X, torch.full((len(X), 2, 4), -math.inf).double()], 1)
    assert largest_reward(padded, R, E, 2.0).upper == pytest.approx(largest_reward(X, R, E, 2.0).upper, rel=1e-9)
