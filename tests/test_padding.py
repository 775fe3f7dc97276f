"""Samples of different numbers of tokens: against sums over each sample's own tokens, written out."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch

import convexhead as ch

RNG = np.random.default_rng(11)
LENGTHS = [3, 1, 5, 2, 4, 4, 1, 3, 2, 5, 3, 2]
SAMPLES = [RNG.normal(size=(s, 2)) for s in LENGTHS]
LABELS = np.arange(12) % 3
TOKEN_LABELS = [RNG.integers(0, 3, size=s) for s in LENGTHS]
MASK = np.arange(5) < np.array(LENGTHS)[:, None]
ARRAY = np.full((12, 5, 2), np.nan)
ARRAY[MASK] = np.concatenate(SAMPLES)
BETA = 0.03


def attention(X, U):
    return X @ U @ X.T / len(X) @ X


def outputs_written_out(model, samples, pool):
    """``f_i`` of each sample from its own tokens alone."""
    found = []
    for X in samples:
        if model.head.name == "attentive":
            weights = np.exp(X @ model.queries.numpy().T)
            means = (weights / weights.sum(0)).T @ X
            f = np.einsum("jd,kjd,kc->c", means, model.mixing[0], model.values[0][:, 0])[None]
        elif model.head.name == "linear":
            f = X @ model.coef
        else:
            f = np.zeros((len(X), model.n_outputs))
            for U, V in zip(model.mixing[0], model.values[0], strict=True):
                if model.head.name == "mlp":
                    score = X @ U
                    f += np.outer(np.maximum(score, 0) if model.spec.activation == "relu" else score, V[0])
                else:
                    f += attention(X, U) @ V
        f = f + model.atoms.intercept.numpy()
        found.append({"mean": f.mean(0), "cls": f[0], None: f}[pool])
    return found


CASES = [(head, pool) for head in ("self-attention", "mlp", "linear") for pool in ("mean", "cls", None)]
CASES.append(("attentive", "mean"))
QUERIES = {"n_queries": 3, "query_position": False, "random_state": 0}
"""Of the attentive head, whose maps of places need one grid for all."""


@pytest.mark.parametrize(("head", "pool"), CASES)
def test_a_sample_is_its_own_tokens_and_no_more(head, pool):
    y = TOKEN_LABELS if pool is None else LABELS
    settings = {"pool": pool, "beta": BETA, "tol": 1e-7, "fit_intercept": True, **QUERIES}
    clf = ch.ConvexHeadClassifier(head, **settings).fit(SAMPLES, y)
    wanted = outputs_written_out(clf.model_, SAMPLES, pool)
    f = clf.decision_function(SAMPLES)
    for i, each in enumerate(wanted):
        assert np.allclose(f[i][: len(each)] if pool is None else f[i], each, atol=1e-10)
    # alone, with a mask, and in a module
    for i in (0, 1, 2):
        assert np.allclose(clf.decision_function(SAMPLES[i][None])[0], wanted[i], atol=1e-10)
    padded = clf.decision_function(ARRAY, mask=MASK)
    assert np.allclose(padded[MASK] if pool is None else padded, np.concatenate(wanted) if pool is None else wanted)
    module = clf.to_module(torch.float64)
    inside = module(torch.from_numpy(np.nan_to_num(ARRAY, nan=7.0)), torch.from_numpy(MASK)).detach().numpy()
    assert np.allclose(inside[MASK] if pool is None else inside, padded[MASK] if pool is None else padded)
    assert np.allclose(module(torch.from_numpy(SAMPLES[2][None])).detach().numpy()[0], wanted[2])
    assert 0 <= clf.score(SAMPLES, y) <= 1


@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("pool", ["mean", None])
def test_the_optimum_is_that_of_an_independent_solver(head, pool):
    clf = ch.ConvexHeadClassifier(head, pool=pool, beta=BETA, tol=1e-8)
    clf.fit(SAMPLES, TOKEN_LABELS if pool is None else LABELS)
    rows = np.concatenate(SAMPLES) if pool is None else np.stack([X.mean(0) for X in SAMPLES])
    y = np.concatenate(TOKEN_LABELS) if pool is None else LABELS
    Z = cp.Variable((2, 3))
    loss = cp.sum(cp.log_sum_exp(rows @ Z, axis=1)) - cp.sum(cp.multiply(np.eye(3)[y], rows @ Z))
    penalty = cp.sum_squares(Z) / 2 if head == "linear" else cp.normNuc(Z)
    problem = cp.Problem(cp.Minimize(loss / len(rows) + BETA * penalty))
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    assert clf.certificate_.primal == pytest.approx(problem.value, rel=1e-6)
    assert clf.certificate_.dual <= problem.value * (1 + 1e-8)


def test_attention_is_certified_and_audited_for_the_samples_own_tokens(tmp_path):
    clf = ch.ConvexHeadClassifier(beta=0.01, tol=1e-6, fit_intercept=True).fit(SAMPLES, LABELS)
    f = np.stack(outputs_written_out(clf.model_, SAMPLES, "mean"))
    log_p = f - np.log(np.exp(f).sum(1, keepdims=True))
    objective = -log_p[np.arange(12), LABELS].mean() + 0.01 * sum(clf.singular_values_[0])
    assert clf.certificate_.primal == pytest.approx(objective, rel=1e-9)
    masked = ch.ConvexHeadClassifier(beta=0.01, tol=1e-6, fit_intercept=True).fit(ARRAY, LABELS, mask=MASK)
    assert masked.certificate_.identity == clf.certificate_.identity
    assert ch.certify(clf, SAMPLES, LABELS, beta=0.01).identity == clf.certificate_.identity
    clf.save(tmp_path / "model")
    read = ch.load(tmp_path / "model")
    assert np.array_equal(read.predict(SAMPLES), clf.predict(SAMPLES))
    assert ch.certify(read, SAMPLES, LABELS, beta=0.01, lower_bound=clf.certificate_).converged


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_a_zero_token_counts_and_padding_does_not(offset):
    """Of the attentive head: zeros are tokens, which a softmax counts; far from 0 tokens are moved to be solved."""
    samples = [offset + X * (np.arange(len(X)) % 3 < 2)[:, None] for X in SAMPLES]
    settings = {"beta": BETA, "tol": 1e-6, "fit_intercept": True, **QUERIES}
    clf = ch.ConvexHeadClassifier("attentive", **settings).fit(samples, LABELS)
    q, rows = clf.queries_ @ np.eye(2), []
    for X in samples:
        weights = np.exp((X - offset) @ q.T)
        rows.append(((weights / weights.sum(0)).T @ X).ravel())
    rows = np.stack(rows) - offset
    Z, b = cp.Variable((rows.shape[1], 3)), cp.Variable((1, 3))
    f = rows @ Z + np.ones((12, 1)) @ b
    loss = cp.sum(cp.log_sum_exp(f, axis=1)) - cp.sum(cp.multiply(np.eye(3)[LABELS], f))
    problem = cp.Problem(cp.Minimize(loss / 12 + BETA * cp.normNuc(Z)))
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    assert clf.certificate_.converged
    assert clf.certificate_.primal == pytest.approx(problem.value, rel=2e-6)
    assert clf.certificate_.dual <= problem.value * (1 + 1e-8)
    audited = ch.certify(clf, samples, LABELS)
    assert audited.identity == clf.certificate_.identity
    assert audited.primal == pytest.approx(clf.certificate_.primal, rel=1e-9)


def test_equal_lengths_are_ordinary_tokens():
    X = RNG.normal(size=(12, 4, 2))
    plain = ch.ConvexHeadClassifier(beta=BETA, tol=1e-6).fit(X, LABELS)
    masked = ch.ConvexHeadClassifier(beta=BETA, tol=1e-6).fit(X, LABELS, mask=np.ones((12, 4), bool))
    assert masked.certificate_.to_dict() == plain.certificate_.to_dict()
    assert ch.ConvexHeadClassifier(beta=BETA, tol=1e-6).fit(list(X), LABELS).certificate_ == plain.certificate_
    with pytest.raises(ch.InputError, match="samples of 4 tokens each"):
        plain.predict(SAMPLES)


def test_depth_of_tokens_that_there_are():
    depths = [RNG.normal(size=(s, 1)) for s in LENGTHS]
    array = np.full((12, 5, 1), np.nan)
    array[MASK] = np.concatenate(depths)
    settings = {"head": "mlp", "pool": None, "beta": BETA, "tol": 1e-7}
    listed = ch.ConvexHeadRegressor(**settings).fit(SAMPLES, depths)
    masked = ch.ConvexHeadRegressor(**settings).fit(ARRAY, array, mask=MASK)
    assert listed.certificate_.to_dict() == masked.certificate_.to_dict()
    assert listed.score(SAMPLES, depths) == pytest.approx(masked.score(ARRAY, np.nan_to_num(array), mask=MASK))


def test_gated_and_relu_heads_take_any_length():
    gated = ch.ConvexHeadClassifier(activation="gated-relu", n_gates=4, beta=BETA, random_state=0, tol=1e-5)
    assert gated.fit(SAMPLES, LABELS).certificate_.converged
    y = np.array([np.maximum(X[:, 0], 0).mean() for X in SAMPLES])
    relu = ch.ConvexHeadRegressor("mlp", activation="relu", beta=1e-3, random_state=0).fit(SAMPLES, y)
    wanted = np.stack(outputs_written_out(relu.model_, SAMPLES, "mean"))
    assert np.allclose(relu.predict(SAMPLES), wanted[:, 0], atol=1e-10)
    assert relu.certificate_.dual <= 1e-3 + 1e-12  # one atom of norm 1 fits exactly


REFUSED = {
    "a head of positions": (lambda: ch.ConvexHeadClassifier("fno").fit(SAMPLES, LABELS), "by their position"),
    "maps of places": (lambda: ch.ConvexHeadClassifier("attentive").fit(SAMPLES, LABELS), "query_position=False"),
    "queries of places": (
        lambda: ch.ConvexHeadClassifier("attentive", queries=np.ones((2, 7))).fit(SAMPLES, LABELS),
        "by their position",
    ),
    "no tokens": (lambda: ch.ConvexHeadClassifier().fit(ARRAY, LABELS, mask=np.zeros((12, 5), bool)), "no tokens"),
    "another mask": (lambda: ch.ConvexHeadClassifier().fit(ARRAY, LABELS, mask=MASK[:, :4]), "mask"),
    "a mask of numbers": (lambda: ch.ConvexHeadClassifier().fit(ARRAY, LABELS, mask=2 * MASK), "True where a token"),
    "NaN in a token": (lambda: ch.ConvexHeadClassifier().fit(ARRAY, LABELS, mask=np.ones((12, 5))), "NaN"),
    "unequal channels": (
        lambda: ch.ConvexHeadClassifier().fit([*SAMPLES[:-1], np.ones((2, 3))], LABELS),
        "same number of channels",
    ),
    "labels of other tokens": (
        lambda: ch.ConvexHeadClassifier(pool=None).fit(SAMPLES, TOKEN_LABELS[::-1]),
        "one target for each token",
    ),
    "token 0 left out": (
        lambda: ch.ConvexHeadClassifier(pool="cls").fit(np.nan_to_num(ARRAY), LABELS, mask=MASK[:, ::-1]),
        "reads token 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(ch.InputError, match=message):
        call()


def test_paths_and_beta_max_take_any_length():
    rows = ch.regularization_path(
        SAMPLES, LABELS, beta_ratios=[0.5, 0.1], X_val=SAMPLES[::-1], y_val=LABELS[::-1], head="mlp", tol=1e-6
    )
    alone = ch.ConvexHeadClassifier("mlp", beta=rows[1]["beta"], tol=1e-6).fit(SAMPLES, LABELS)
    assert rows[1]["objective"] == pytest.approx(alone.certificate_.primal, rel=1e-5)
    assert rows[1]["val_score"] == alone.score(SAMPLES, LABELS)
    assert rows[0]["beta"] == pytest.approx(0.5 * ch.beta_max(SAMPLES, LABELS, head="mlp"))


def test_labels_of_one_token_are_a_column():
    X = RNG.normal(size=(12, 1, 2))
    clf = ch.ConvexHeadClassifier("mlp", pool=None, beta=BETA, tol=1e-6).fit(X, LABELS[:, None])
    pooled = ch.ConvexHeadClassifier("mlp", beta=BETA, tol=1e-6).fit(X, LABELS)
    assert clf.certificate_.primal == pytest.approx(pooled.certificate_.primal, rel=1e-5)
    assert clf.predict(X).shape == (12, 1)
    assert clf.score(X, LABELS[:, None]) == pooled.score(X, LABELS)
