"""Enumerated activation patterns against counts in closed form and against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

import convexhead as ch
from convexhead.errors import InputError
from convexhead.program.activations import GatedReLU
from convexhead.program.heads import make_head
from convexhead.program.patterns import (
    UnreliableError,
    all_gates,
    cells,
    hyperplanes,
    most_cells,
    pack_signs,
    preactivation_rows,
    sample_patterns,
)


def brute_force(K: torch.Tensor) -> set[bytes]:
    """Every sign vector, kept if a linear program finds a point with those signs."""
    K = K.numpy()
    found = set()
    for signs in itertools.product((False, True), repeat=len(K)):
        s = np.where(signs, 1.0, -1.0)
        # max t: s_i K_i g ≥ t, |g| ≤ 1
        A = np.hstack([-s[:, None] * K, np.ones((len(K), 1))])
        solution = linprog(
            [0.0] * K.shape[1] + [-1.0], A_ub=A, b_ub=np.zeros(len(K)), bounds=[(-1, 1)] * K.shape[1] + [(0, 1)]
        )
        if solution.status == 0 and -solution.fun > 1e-7:
            found.add(np.asarray(signs).tobytes())
    return found


def patterns(K: torch.Tensor, gates: torch.Tensor) -> list[bytes]:
    return pack_signs(gates @ K.T >= 0)


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (5, 1), (6, 2), (7, 3), (9, 3), (8, 4), (7, 5), (5, 8)])
def test_general_position_has_covers_count(n, rank):
    K = torch.randn(n, rank, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    found = patterns(K, cells(K))
    assert len(set(found)) == len(found)
    expected = most_cells(len(hyperplanes(K)), min(n, rank)) if rank > 1 else 2
    assert len(found) == expected
    rho = min(n, rank)
    if n > rho:
        assert len(found) <= 2 * rho * (math.e * (n - 1) / rho) ** rho


@pytest.mark.parametrize("exponent", range(1, 17))
def test_nearly_dependent_hyperplanes_have_all_cells_or_are_refused(exponent):
    """Few enough of them to be independent, and one that lies near the span of the others."""
    K = torch.randn(5, 6, generator=torch.Generator().manual_seed(exponent), dtype=torch.float64)
    K[4] = K[:4].sum(0) + 10.0**-exponent * K[4]
    own = hyperplanes(K)
    try:
        points = cells(K)
    except UnreliableError:
        assert exponent > 8
        return
    signs = {tuple(row) for row in (points @ own.T > 0).tolist()}
    assert len(signs) == len(points)
    # Float64 sees 5 independent rows or, in the end, the fewer cells of 5 rows of rank 4.
    assert len(points) == 32 or (exponent > 12 and len(points) == most_cells(5, 4))


@pytest.mark.parametrize("seed", range(12))
def test_degenerate_arrangements_match_brute_force(seed):
    rng = np.random.default_rng(seed)
    n, rank, columns = rng.integers(2, 9), rng.integers(1, 5), rng.integers(1, 6)
    # Small integers: parallel rows, opposite rows, zero rows, many hyperplanes through one line.
    K = rng.integers(-1, 2, size=(n, rank)) @ rng.integers(-1, 2, size=(rank, columns))
    K = torch.as_tensor(K, dtype=torch.float64)
    own = hyperplanes(K)
    found = patterns(own, cells(K))
    assert len(set(found)) == len(found)
    assert set(found) == (brute_force(own) if len(own) else {b""})


HEADS = ["self-attention", "mlp-mixer", "fno", "block-fno", "mlp"]


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("name", HEADS)
def test_rows_are_the_preactivation(name, pool):
    X = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    head = make_head(name, 4, 2, pool=pool, n_blocks=2)
    U = torch.randn(1, *head.mixing_shape, dtype=torch.float64)
    for group in range(head.n_groups):
        K = preactivation_rows(head, X, group)
        A = head.preactivation(head.prepare(X), U, torch.tensor([group]))
        torch.testing.assert_close(K @ U.flatten(), A.flatten())


@pytest.mark.parametrize("name", ["mlp", "fno", "self-attention"])
def test_no_sampled_gate_has_a_pattern_that_was_not_enumerated(name):
    generator = torch.Generator().manual_seed(1)
    n, s, d = {"mlp": (8, 1, 3), "fno": (2, 2, 2), "self-attention": (2, 2, 2)}[name]
    X = torch.randn(n, s, d, generator=generator, dtype=torch.float64)
    head = make_head(name, s, d)
    gates = all_gates(head, X)
    known = {row.tobytes() for row in GatedReLU(head, gates).pack_masks(X).transpose(0, 1).numpy()}
    assert len(known) == len(gates)
    sampled = torch.randn(4000, *head.gate_shape, generator=generator, dtype=torch.float64)
    assert {row.tobytes() for row in GatedReLU(head, sampled).pack_masks(X).transpose(0, 1).numpy()} <= known


def test_all_gates_of_an_estimator():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(12, 2)), rng.integers(0, 2, 12)
    every = ch.ConvexHeadClassifier("mlp", activation="gated-relu", n_gates="all", random_state=0, tol=1e-6).fit(X, y)
    assert len(every.gates_) == 24
    some = ch.ConvexHeadClassifier(
        "mlp", activation="gated-relu", gates=every.gates_[:5], beta=every.beta_, tol=1e-6, random_state=0
    ).fit(X, y)
    assert every.certificate_.primal <= some.certificate_.primal * (1 + 1e-6)


def test_too_many_patterns_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match=r"may have .* patterns, more than 20000: sample them"):
        ch.ConvexHeadClassifier("mlp", activation="gated-relu", n_gates="all").fit(
            rng.normal(size=(200, 5)), np.arange(200) % 2
        )


@pytest.mark.slow
@pytest.mark.parametrize("data_driven", [False, True])
@pytest.mark.parametrize("name", ["mlp", "block-fno", "self-attention"])
def test_sampled_patterns_are_distinct_and_seeded(name, data_driven):
    X = torch.randn(70, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    head = make_head(name, 4, 2, n_blocks=2)

    def draw(tokens, n_gates, seed):
        return sample_patterns(head, tokens, n_gates, torch.Generator().manual_seed(seed), data_driven=data_driven)

    gates = draw(X, 12, 0)
    assert tuple(gates.shape) == (12, *head.gate_shape)
    assert torch.equal(gates, draw(X, 12, 0))
    assert not torch.equal(gates, draw(X, 12, 1))
    few = draw(X[:1, :, :], 5000, 0) if name == "mlp" else None
    if few is not None:  # four tokens in the plane have eight patterns
        assert len(few) == 8
        packed = GatedReLU(head, few).pack_masks(X[:1]).transpose(0, 1).reshape(8, -1)
        assert len({bytes(row.numpy()) for row in packed}) == 8


def test_more_gates_than_patterns():
    X, y = np.random.default_rng(0).normal(size=(3, 1, 2)), np.array([0, 1, 0])
    clf = ch.ConvexHeadClassifier("mlp", activation="gated-relu", n_gates=50, beta_ratio=0.3, random_state=0).fit(X, y)
    assert len(clf.gates_) == 6
    assert clf.certificate_.converged
