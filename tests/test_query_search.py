"""Queries that are found: against dense grids of queries, sampled ones, and what may be said of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import convexhead as ch
from convexhead.program.heads.query_ball import WIDTHS, QueryBall

RNG = np.random.default_rng(0)
X = RNG.normal(size=(80, 9, 3))
LOUD = (X @ RNG.normal(size=3)).argmax(1)  # a class is written on the token that a query can find
Y = (X[np.arange(80), LOUD] @ RNG.normal(size=(3, 3))).argmax(1)
SETTINGS = {"head": "attentive", "queries": "search", "beta_ratio": 0.2, "random_state": 0, "query_position": False}
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def flat():
    """Queries in the plane of two directions, on content alone."""
    return ch.ConvexHeadClassifier(**SETTINGS, key_dim=2).fit(X, Y)


def rewards(clf, queries):
    """``‖Σ_i φ_q(X_i) R_iᵀ‖₂ / β`` of every query, from the fitted head's public attributes."""
    R = (clf.predict_proba(X) - np.eye(3)[Y]) / len(X)
    scores = np.einsum("nsd,jd->njs", X, queries)
    weights = np.exp(scores - scores.max(2, keepdims=True))
    M = np.einsum("njs,nsd,nc->jdc", weights / weights.sum(2, keepdims=True), X, R)
    return np.linalg.norm(M, 2, axis=(1, 2)) / clf.beta_


def test_no_query_of_a_dense_grid_pays(flat):
    ball = flat.model_.head.ball
    angle, radius = np.meshgrid(np.linspace(0, 2 * np.pi, 90), np.linspace(0, ball.radius, 20))
    z = torch.from_numpy(np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1, 2))
    found = rewards(flat, ball.queries(z, torch.zeros(len(z), dtype=torch.int64)).numpy())
    assert found.max() <= 1.01
    assert rewards(flat, flat.queries_).min() >= 0.9  # those that are used pay for themselves, up to the tolerance
    inside, _ = ball.coordinates(torch.from_numpy(flat.queries_.copy()))
    assert float(inside.norm(dim=1).max()) <= ball.radius


def test_found_queries_are_better_than_many_sampled_ones_and_fewer(flat):
    shared = {**SETTINGS, "key_dim": 2, "beta": flat.beta_, "query_norm": "each"}
    sampled = ch.ConvexHeadClassifier(**{**shared, "queries": None, "n_queries": 60}).fit(X, Y)
    assert flat.certificate_.primal < sampled.certificate_.primal
    assert len(flat.queries_) < 12
    # What is proven holds for all queries of the ball, so it lies below what sampled ones attain.
    assert flat.certificate_.dual <= sampled.certificate_.primal


def test_few_directions_are_certified_over_the_whole_ball(flat):
    certificate = flat.certificate_
    assert certificate.scope == "global"
    assert certificate.converged
    assert certificate.bound == "branch and bound over queries"
    assert 0.99 <= certificate.rewards[0] <= 1.01
    # No probe of the ball that anybody trains lies below the bound: here 16 queries by L-BFGS, from several starts.
    basis, radius = flat.model_.head.ball.basis, flat.model_.head.ball.radius
    tokens, labels = torch.from_numpy(X), torch.from_numpy(Y)
    for seed in range(3):
        torch.manual_seed(seed)
        z, V, W = (torch.randn(*shape).double().requires_grad_() for shape in ((16, 2), (16, 3, 3), (16, 3, 3)))
        optimizer = torch.optim.LBFGS([z, V, W], max_iter=150, line_search_fn="strong_wolfe")

        def objective(z=z, V=V, W=W):
            length = z.norm(dim=1, keepdim=True)
            queries = z / length * radius * length.tanh() @ basis.T
            read = (tokens @ queries.T).softmax(1).mT @ tokens
            loss = torch.nn.functional.cross_entropy(torch.einsum("njd,jdm,jmc->nc", read, V, W), labels)
            return loss + flat.beta_ / 2 * (V.square().sum() + W.square().sum())

        def closure(objective=objective, optimizer=optimizer):
            optimizer.zero_grad()
            value = objective()
            value.backward()
            return value

        optimizer.step(closure)
        assert objective().item() >= certificate.dual


def test_three_directions_are_certified_as_tightly_as_asked():
    clf = ch.ConvexHeadClassifier(**{**SETTINGS, "beta_ratio": 0.4}, tol=0.02).fit(X[:40], Y[:40])
    assert clf.model_.head.ball.basis.shape[1] == 3
    assert clf.certificate_.scope == "global"
    assert clf.certificate_.converged


def test_an_estimate_is_never_called_a_proof(flat, monkeypatch):
    monkeypatch.setattr("convexhead.certificate.certify.MAX_KEYS", 0)
    certificate = ch.certify(flat, X, Y, random_state=0)
    assert certificate.dual <= flat.certificate_.dual
    assert certificate.scope == "estimated"
    assert not certificate.converged
    assert certificate.estimated_gap < 0.01
    assert 0.99 <= certificate.rewards[0] <= 1.01
    assert certificate.ascents > len(flat.queries_)
    assert "not proven" in str(certificate)


@pytest.mark.slow
def test_a_seed_decides_and_other_seeds_agree(flat):
    again = ch.ConvexHeadClassifier(**SETTINGS, key_dim=2).fit(X, Y)
    assert np.array_equal(again.queries_, flat.queries_)
    other = ch.ConvexHeadClassifier(**{**SETTINGS, "random_state": 1, "beta": flat.beta_}, key_dim=2).fit(X, Y)
    assert other.certificate_.primal == pytest.approx(flat.certificate_.primal, rel=5e-3)
    # It is one program over the ball, whatever queries were found: a bound for one head is a bound for the other.
    assert other.certificate_.identity == flat.certificate_.identity
    assert ch.certify(other, X, Y, lower_bound=flat.certificate_).dual >= flat.certificate_.dual - 1e-9


def test_a_found_head_is_saved_with_its_ball(flat, tmp_path):
    flat.save(tmp_path / "model")
    read = ch.load(tmp_path / "model")
    assert read.certificate_ == flat.certificate_
    assert np.array_equal(read.predict_proba(X), flat.predict_proba(X))
    assert ch.certify(read, X, Y).identity == flat.certificate_.identity
    module = flat.to_module(torch.float64)
    np.testing.assert_allclose(module(torch.from_numpy(X)).detach().numpy(), flat.decision_function(X), atol=1e-10)


@pytest.mark.slow
def test_places_are_searched_too_and_an_intercept_may_be_fitted():
    settings = {**SETTINGS, "query_position": True, "fit_intercept": True, "beta_ratio": 0.5, "key_dim": 1}
    clf = ch.ConvexHeadClassifier(**settings).fit(X, Y)
    assert clf.queries_.shape[1] == 12
    assert clf.certificate_.rewards[0] <= 1.01
    ball = clf.model_.head.ball
    z, place = ball.coordinates(torch.from_numpy(clf.queries_.copy()))
    np.testing.assert_allclose(ball.queries(z, place).numpy(), clf.queries_, atol=1e-9)


def test_maps_over_places_are_numbered():
    ball = QueryBall(torch.eye(2).double(), 1.0, (2, 3), torch.zeros(2).double())
    place = torch.arange(ball.n_places)
    assert ball.n_places == 1 + 6 * len(WIDTHS)
    weights = ball.log_weights(place)
    assert not weights[0].any()
    assert (weights[1:].max(1).values == 0).all()
    z = torch.randn(len(place), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = ball.coordinates(ball.queries(z, place))
    torch.testing.assert_close(found[0], z)
    assert torch.equal(found[1], place)


REFUSED = {
    "cross-validation": lambda: ch.ConvexHeadClassifierCV("attentive", queries="search", cv=2).fit(X, Y),
    "a path": lambda: ch.regularization_path(X, Y, head="attentive", queries="search", beta_ratios=[0.5, 0.2]),
    "a checkpoint": lambda: ch.ConvexHeadClassifier(**SETTINGS).fit(X, Y, checkpoint="unused"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_search_says_so(name):
    with pytest.raises(ch.InputError, match="queries='search'"):
        REFUSED[name]()
