"""Tokens whose hyperplanes float64 can hardly tell apart: no bound lies below a value that anybody attains."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import convexhead as ch
from convexhead.certificate.certify import certify_atoms
from convexhead.dual_norm.ascent import LocalMaxima
from convexhead.dual_norm.norm import DualNorm, NormOracle
from convexhead.dual_norm.scores import scores_of
from convexhead.errors import InputError
from convexhead.program.activations import ReLU
from convexhead.program.heads import make_head
from convexhead.program.losses import Squared
from convexhead.program.operator import Operator
from convexhead.program.patterns import cells, hyperplanes_of, pack_signs
from convexhead.program.problem import Problem
from convexhead.solvers.relu import ExactRounds


def offset_sample():
    """``|z|`` less its line, seen through tokens ``(1, 1e4 + z)``; the objective of three heads made by hand."""
    z = np.random.default_rng(0).uniform(-1, 1, 200)
    X = np.stack([np.ones(200), 1e4 + z], 1)
    line = np.linalg.lstsq(np.stack([np.ones(200), z], 1), np.abs(z), rcond=None)[0]
    y = np.abs(z) - line[0] - line[1] * z
    beta = 1e-6
    # |z| = max(z, 0) + max(−z, 0) with z = (−1e4, 1)·x; the constant is a head of its own, the slope is left out.
    U = np.array([[-1e4, 1.0], [1e4, -1.0], [1.0, 0.0]])
    v = np.array([1.0, 1.0, -line[0]])
    f = np.maximum(X @ U.T, 0) @ v
    return X, y, beta, 0.5 * np.mean((f - y) ** 2) + beta * (np.linalg.norm(U, axis=1) * np.abs(v)).sum()


def outlier_sample():
    """Thirty normal tokens, one of them 1e10 long; the objective of one head made by hand."""
    X = np.random.default_rng(0).normal(size=(30, 2))
    X[0] = 1e10, 0.0
    beta = 0.01
    return X, np.maximum(-X[:, 1], 0), beta, beta


@pytest.mark.parametrize("sample", [offset_sample, outlier_sample])
def test_heads_made_by_hand_are_not_below_the_bound(sample, monkeypatch):
    monkeypatch.setattr(ExactRounds, "most_steps", 2)
    monkeypatch.setattr("convexhead.drive.MAX_ATTEMPTS", 1)
    X, y, beta, by_hand = sample()
    head = ch.ConvexHeadRegressor("mlp", activation="relu", beta=beta, tol=0.05, random_state=0, fit_intercept=False)
    certificate = head.fit(X, y).certificate_
    assert certificate.dual <= by_hand
    assert certificate.dual <= certificate.primal
    assert certificate.primal <= 1.01 * by_hand


def nasty(kind, rng):
    """Tokens ``(n, w)`` of a kind of geometry."""
    w = int(rng.integers(1, 4))
    n = int(rng.integers(2, 13))
    X = rng.normal(size=(n, w))
    small = 10.0 ** rng.uniform(-17, -4)
    match kind:
        case "columns":
            return X * 10.0 ** rng.uniform(-12, 12, size=(1, w))
        case "rows":
            return X * 10.0 ** rng.uniform(-12, 12, size=(n, 1))
        case "integers":
            return rng.integers(-2, 3, size=(n, w)).astype(float)
        case "near integers":
            return rng.integers(-1, 2, size=(n, w)) + small * X
        case "duplicates":
            return X[rng.integers(0, n, n)] * rng.choice([1.0, -1.0, 3.0, 0.1], size=(n, 1))
        case "near duplicates":
            return X[rng.integers(0, n, n)] + small * rng.normal(size=(n, w))
        case "offset":
            return X + 10.0 ** rng.uniform(2, 14)
        case "constant and offset":
            return np.concatenate([np.ones((n, 1)), X[:, 1:] + 10.0 ** rng.uniform(0, 12)], 1)
        case "tiny rows":
            X[: n // 2] *= 10.0 ** rng.uniform(-20, -3)
            return X
        case _:
            return X[:, :1] * rng.normal(size=(1, w)) + small * rng.normal(size=(n, w))  # collinear


KINDS = [
    "columns", "rows", "integers", "near integers", "duplicates", "near duplicates", "offset", "constant and offset",
    "tiny rows", "collinear",
]  # fmt: skip


def attained(X, R, rng):
    """The largest ``‖Σ_i R_i max(x_iᵀ u, 0)‖`` over many unit ``u``, in extended precision."""
    n, w = X.shape
    X, R = X.astype(np.longdouble), R.astype(np.longdouble)
    U = [rng.normal(size=(300, w)), X, np.eye(w)]
    if w == 2:
        U.append(np.stack([-X[:, 1], X[:, 0]], 1))  # on the hyperplanes, where maxima lie as a rule
    if w == 3:
        U.append(np.cross(X[rng.integers(0, n, 100)], X[rng.integers(0, n, 100)]))
    U = np.concatenate([part.astype(np.longdouble) for part in U])
    U = np.concatenate([U, -U])
    length = np.sqrt((U**2).sum(1))
    U = U[length > 0] / length[length > 0, None]
    return np.sqrt(((np.maximum(U @ X.T, 0) @ R) ** 2).sum(1)).max()


def build(X, Y):
    head = make_head("mlp", 1, X.shape[1])
    return Problem(
        Operator(torch.from_numpy(X).unsqueeze(1), head, ReLU(head)), torch.from_numpy(Y).unsqueeze(1), Squared()
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["as chosen", "branch and bound", "product of norms"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_attained_value_is_above_the_bound(kind, method, monkeypatch):
    monkeypatch.setattr("convexhead.dual_norm.norm.WORK", 1e6)
    for seed in range(6):
        rng = np.random.default_rng([KINDS.index(kind), seed])
        X = nasty(kind, rng)
        R = rng.normal(size=(len(X), int(rng.integers(1, 3))))
        if seed % 2:  # nearly orthogonal to the tokens: what is left is rounding, or nearly
            Q, _ = np.linalg.qr(X)
            R -= Q @ (Q.T @ R)
            R -= Q @ (Q.T @ R)
        oracle = NormOracle(build(X, np.zeros_like(R)))
        if method != "as chosen":
            oracle.method = method
        residual = torch.from_numpy(R).unsqueeze(1)
        maxima = oracle.search(residual, generator=torch.Generator().manual_seed(seed), n_starts=4, iterations=5)
        assert oracle.bound(residual, maxima, rtol=1e-3).upper >= attained(X, R, rng)


def descend(X, Y, beta, heads, rng):
    """The lowest objective of ReLU networks that L-BFGS finds from a few starts, and numpy alone."""
    n, w = X.shape
    c = Y.shape[1]
    unit = np.linalg.norm(X, axis=1).max()

    def objective(x):
        U, V = x[: heads * w].reshape(heads, w), x[heads * w :].reshape(heads, c)
        A = X @ U.T
        E = np.maximum(A, 0) @ V - Y
        T = (E @ V.T) * (A > 0)
        gradient = np.concatenate([(T.T @ X / n + beta * U).ravel(), (np.maximum(A, 0).T @ E / n + beta * V).ravel()])
        return 0.5 * (E**2).sum() / n + 0.5 * beta * (x**2).sum(), gradient

    best = objective(np.zeros(heads * (w + c)))[0]
    for _ in range(3):
        start = np.concatenate([rng.normal(size=heads * w) / unit, rng.normal(size=heads * c)])
        best = min(best, minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 300}).fun)
    return best


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_network_is_below_the_dual(kind, monkeypatch):
    """At any dual point, the one of a network that others have trained or that of none."""
    monkeypatch.setattr("convexhead.dual_norm.norm.WORK", 1e6)
    for seed in range(3):
        rng = np.random.default_rng([1, KINDS.index(kind), seed])
        X = nasty(kind, rng)
        Y = rng.normal(size=(len(X), int(rng.integers(1, 3))))
        problem = build(X, Y)
        beta = 10.0 ** rng.uniform(-3, 0) * float(np.linalg.norm(X, axis=1).mean()) / len(X)
        reached = descend(X, Y, beta, 4, rng)
        generator = torch.Generator().manual_seed(seed)
        for dual_point in (None, torch.from_numpy(Y + rng.normal(size=Y.shape) * 0.1).unsqueeze(1)):
            certificate = certify_atoms(
                problem, problem.empty(), beta, tol=1e-2, dual_point=dual_point, generator=generator
            )
            assert certificate.dual <= reached * (1 + 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_rows_lose_is_charged(kind):
    """Every row is its plane's up to ``lost``, and chains of close rows are not one plane."""
    for seed in range(5):
        X = nasty(kind, np.random.default_rng([2, KINDS.index(kind), seed]))
        (scores,) = scores_of(build(X, np.zeros((len(X), 1))).operator)
        u = np.random.default_rng(seed).normal(size=(50, X.shape[1]))
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        own = u.astype(np.longdouble) @ X.T.astype(np.longdouble)
        if scores.dimension:
            seen = torch.from_numpy(u) @ scores.basis.T @ scores.planes.T
            written = (scores.scale * seen[:, scores.plane]).numpy()
        else:
            written = np.zeros_like(own)
        assert (np.abs(own - written) <= scores.lost.numpy()).all()


def test_a_chain_of_close_rows_is_not_one_plane():
    angle = torch.arange(2000, dtype=torch.float64) * 4e-15
    K = torch.stack([torch.ones_like(angle), angle], 1)
    planes, of, scale = hyperplanes_of(K)
    assert float((K / K.norm(dim=1, keepdim=True) - planes[of]).norm(dim=1).max()) <= 1e-14
    assert bool((scale > 0).all())


def test_planes_far_closer_than_before_have_their_cells():
    """In the plane every cell is found, whatever its width."""
    z = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    K = torch.stack([torch.ones_like(z), 1e4 + z], 1)
    found = pack_signs(cells(K) @ K.T >= 0)
    assert len(found) == len(set(found)) == 80


def test_cells_that_rounding_hides_are_refused():
    generator = torch.Generator().manual_seed(0)
    K = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    K[1:] = K[0] + 1e-9 * K[1:]
    with pytest.raises(InputError, match="cannot be listed in float64"):
        cells(K)
    X = K.numpy()
    with pytest.raises(InputError, match="cannot be listed in float64"):
        ch.ConvexHeadRegressor("mlp", activation="gated-relu", n_gates="all").fit(X, X[:, 0])
    assert NormOracle(build(X, np.zeros((12, 1)))).method == "branch and bound"


def test_a_search_above_the_bound_refutes_it():
    maxima = LocalMaxima(torch.ones(1), torch.ones(1, 1), torch.ones(1, 1, 1), torch.zeros(1, dtype=torch.int64))
    assert not DualNorm(1.0, "faces", maxima, 1).refuted
    for upper in (0.999, math.nan):
        refuted = DualNorm(upper, "faces", maxima, 1)
        assert refuted.refuted
        assert refuted.upper == math.inf


def test_a_refuted_bound_is_replaced_and_said(monkeypatch):
    monkeypatch.setattr(
        "convexhead.dual_norm.norm.largest_norm_on_faces", lambda form, parts: (0.0, form.L.new_zeros(0, 2))
    )
    monkeypatch.setattr("convexhead.dual_norm.norm.doubt_of", lambda form, parts: 0.0)
    rng = np.random.default_rng(0)
    problem = build(rng.normal(size=(6, 2)), rng.normal(size=(6, 1)))
    certificate = certify_atoms(problem, problem.empty(), 0.1, tol=1e-2)
    assert certificate.scope == "estimated"
    assert certificate.bound == "product of norms"
    assert not certificate.converged
    assert "refuted" in str(certificate)


def test_rows_that_all_vanish_on_a_flat_have_a_face_there(monkeypatch):
    """Rows a little farther apart than those that are one plane, and closer than float64 resolves on a flat."""
    monkeypatch.setattr("convexhead.dual_norm.norm.WORK", 1e6)
    for apart in (1.05e-14, 1.2e-14, 1.4e-14, 1e-13):
        X = apart / math.sqrt(2) * np.eye(5)[1:]
        X[:, 0] = 1.0
        R = np.random.default_rng(0).normal(size=(4, 2))
        oracle, residual = NormOracle(build(X, np.zeros_like(R))), torch.from_numpy(R).unsqueeze(1)
        maxima = oracle.search(residual, generator=torch.Generator().manual_seed(0))
        assert oracle.bound(residual, maxima).upper >= attained(X, R, np.random.default_rng(0))
