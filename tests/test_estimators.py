"""The estimators as their users see them."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

import convexhead as ch
from convexhead.path import best
from convexhead.program.losses import Squared
from kinds import pooled

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 6, 4))
Y = np.array(["ant", "bee", "cat", "dog"])[np.argmax(X.mean(1) + 0.3 * RNG.normal(size=(60, 4)), axis=1)]
CASES = [
    (head, activation, outputs)
    for head in ("self-attention", "mlp-mixer", "fno", "block-fno", "mlp", "linear")
    for activation in ("linear", "gated-relu")
    for outputs in (("shared", "grouped") if head == "block-fno" else ("shared",))
    if not (head == "linear" and activation == "gated-relu")
]
CASES += [("attentive", "linear", "all"), ("attentive", "linear", "each")]


def classifier(head="self-attention", activation="linear", outputs="shared", **parameters):
    defaults = {"beta_ratio": 0.25, "n_gates": 5, "n_blocks": 2, "random_state": 0, "tol": 1e-5}
    if head == "attentive":
        defaults |= {"n_queries": 3, "query_norm": outputs}
    else:
        defaults["outputs"] = outputs
    return ch.ConvexHeadClassifier(head, activation=activation, **{**defaults, **parameters})


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize(("head", "activation", "outputs", "pool"), pooled(CASES, "mean", "cls"))
def test_fitted_weights_are_what_the_certificate_says(head, activation, outputs, pool, intercept, tmp_path):
    clf = classifier(head, activation, outputs, pool=pool, fit_intercept=intercept).fit(X, Y)
    certificate = clf.certificate_
    assert certificate.converged
    scope = "sampled-queries" if head == "attentive" else "global"
    assert certificate.scope == (scope if activation == "linear" else "sampled-gates")
    # The objective, from public attributes alone.
    p = clf.predict_proba(X)
    loss = -np.log(p[np.arange(60), np.searchsorted(clf.classes_, Y)]).mean()
    if head == "linear":
        penalty = (clf.coef_**2).sum() / 2
        assert clf.coef_.shape == (4, 4)
    else:
        blocks = 5 ** (activation != "linear") * (2 if head == "block-fno" else 3 if outputs == "each" else 1)
        assert len(clf.mixing_) == len(clf.values_) == len(clf.singular_values_) == blocks
        penalty = sum(s.sum() for s in clf.singular_values_)
        for U, V, s in zip(clf.mixing_, clf.values_, clf.singular_values_, strict=True):
            assert V.shape[2] == (2 if outputs == "grouped" else 4)
            u, v = (w.reshape(len(w), w[0].size if len(w) else 0) for w in (U, V))
            np.testing.assert_allclose(u @ u.T, np.diag(s), atol=1e-8 * max(1, *s, 1))
            np.testing.assert_allclose(v @ v.T, np.diag(s), atol=1e-8 * max(1, *s, 1))
            assert (np.diff(s) <= 0).all()
    assert loss + clf.beta_ * penalty == pytest.approx(certificate.primal, rel=1e-5)
    # The module is the same function, on disk it is the same model, and an audit agrees.
    module = clf.to_module(torch.float64)
    logits = module(torch.from_numpy(X)).detach()
    np.testing.assert_allclose(torch.softmax(logits, -1).numpy(), p, atol=1e-10)
    clf.save(tmp_path / "model")
    again = ch.load(tmp_path / "model")
    np.testing.assert_array_equal(again.predict_proba(X), p)
    assert again.get_params().keys() == clf.get_params().keys()
    assert again.certificate_ == certificate
    assert (again.predict(X) == clf.predict(X)).all()
    audit = ch.certify(module, X, Y, beta=clf.beta_, tol=1e-5)
    assert audit.primal == pytest.approx(certificate.primal, rel=1e-9)
    assert audit.dual <= certificate.primal


@pytest.mark.parametrize("loss", ["squared", "huber", Squared()])
def test_regression_of_every_token(loss):
    targets = X[:, :, :2] ** 2
    reg = ch.ConvexHeadRegressor("mlp-mixer", loss=loss, pool=None, beta_ratio=0.05, tol=1e-4, random_state=0)
    reg.fit(X, targets)
    assert reg.certificate_.converged
    assert reg.predict(X).shape == targets.shape
    residual, spread = targets - reg.predict(X), targets - targets.mean(0)  # R² of each token's outputs, averaged
    assert reg.score(X, targets) == pytest.approx(1 - ((residual**2).sum(0) / (spread**2).sum(0)).mean())


def test_factors_of_a_plain_training_run_can_be_audited():
    clf = classifier().fit(X, Y)
    mixing, values = clf.mixing_[0] * 1.5, clf.values_[0]
    audit = ch.certify((mixing, values), X, Y, beta=clf.beta_, lower_bound=clf.certificate_)
    assert not audit.converged
    assert audit.primal > clf.certificate_.primal
    assert audit.gap <= audit.primal - clf.certificate_.dual + 1e-12


def test_beta_max_is_where_the_head_vanishes():
    largest = ch.beta_max(X, Y, head="self-attention")
    assert classifier(beta=1.001 * largest, tol=1e-8).fit(X, Y).n_heads_ == 0
    assert classifier(beta=0.99 * largest, tol=1e-8).fit(X, Y).n_heads_ > 0
    zero = classifier(beta=2 * largest).fit(X, Y)
    assert zero.certificate_.primal == pytest.approx(np.log(4))
    assert zero.predict_proba(X) == pytest.approx(0.25)


def test_path_is_warm_started_and_scored(tmp_path):
    rows = ch.regularization_path(
        X[:40], Y[:40], head="self-attention", beta_ratios=[0.1, 0.5, 0.02], X_val=X[40:], y_val=Y[40:], random_state=0
    )
    assert [row["beta_ratio"] for row in rows] == [0.5, 0.1, 0.02]
    assert all(row["converged"] and row["relative_gap"] <= 1e-3 for row in rows)
    assert np.diff([row["objective"] for row in rows]).max() < 0
    alone = ch.ConvexHeadClassifier(beta_ratio=0.02, random_state=0).fit(X[:40], Y[:40])
    assert rows[-1]["dual"] <= alone.certificate_.primal
    assert alone.certificate_.dual <= rows[-1]["objective"]
    chosen = best(rows)
    assert chosen["val_score"] == max(row["val_score"] for row in rows)
    chosen["model"].save(tmp_path / "best")
    assert (ch.load(tmp_path / "best").predict(X) == chosen["model"].predict(X)).all()


def test_a_search_solves_only_what_validation_chooses_to_the_end():
    parts = {"X_val": X[40:], "y_val": Y[40:], "random_state": 0, "tol": 1e-6}
    rows = ch.regularization_path(X[:40], Y[:40], beta_ratios=[0.1, 0.5, 0.02], search_tol=0.05, **parts)
    (chosen,) = [row for row in rows if row["model"] is not None]
    assert best(rows) is chosen
    assert chosen["converged"]
    assert chosen["relative_gap"] <= 1e-6
    seconds = [moment["seconds"] for moment in chosen["model"].history_]
    assert seconds == sorted(seconds)  # of the search and what came after it
    others = [row for row in rows if row is not chosen]
    assert all(row["gap"] is row["dual"] is row["relative_gap"] is None and not row["converged"] for row in others)
    solved = {
        row["beta_ratio"]: row for row in ch.regularization_path(X[:40], Y[:40], beta_ratios=[0.1, 0.5, 0.02], **parts)
    }
    for row in rows:
        assert solved[row["beta_ratio"]]["dual"] <= row["objective"] * (1 + 1e-9)
        assert row["objective"] <= 1.1 * solved[row["beta_ratio"]]["objective"]
    with pytest.raises(ValueError, match="pass X_val and y_val"):
        ch.regularization_path(X, Y, search_tol=0.05)


@pytest.mark.parametrize(
    ("limit", "reason"),
    [({"max_time": 1e-9}, "max_time"), ({"max_heads": 1}, "max_heads")],
)
def test_runs_that_stop_early_keep_an_honest_model(limit, reason):
    full = classifier(beta_ratio=0.02).fit(X, Y)
    with pytest.warns(ConvergenceWarning, match=reason):
        clf = classifier(beta_ratio=0.02, **limit).fit(X, Y)
    assert not clf.certificate_.converged
    assert reason in clf.stop_reason_
    assert clf.certificate_.dual <= full.certificate_.primal <= clf.certificate_.primal + 1e-9
    assert clf.n_heads_ <= limit.get("max_heads", 99)
    clf.predict(X)


@pytest.mark.parametrize("solver", ["fista", "column-generation"])
def test_an_interrupt_keeps_the_model(solver):
    calls = []

    def interrupt(row):
        calls.append(row)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.warns(ConvergenceWarning, match="interrupted"):
        clf = classifier(beta_ratio=0.01, tol=1e-9, solver=solver).fit(X, Y, callback=interrupt)
    assert clf.certificate_.gap > 0
    assert len(clf.history_) == 3


def test_history_and_certificate_are_plain_values():
    clf = classifier().fit(X, Y)
    json.dumps([clf.history_, clf.certificate_.to_dict()])
    assert "global optimum" in str(clf.certificate_)
    assert clf.history_[-1]["objective"] == pytest.approx(clf.certificate_.primal, rel=1e-4)


def test_the_same_seed_gives_the_same_head():
    first, second = (classifier(activation="gated-relu").fit(X, Y) for _ in range(2))
    np.testing.assert_array_equal(first.gates_, second.gates_)
    np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(X))
    explicit = classifier(activation="gated-relu", gates=first.gates_).fit(X, Y)
    assert explicit.certificate_.primal == pytest.approx(first.certificate_.primal, rel=2e-5)


def test_token_scale_does_not_matter():
    objectives = [classifier(tol=1e-6).fit(scale * X, Y).certificate_.primal for scale in (1e-2, 1.0, 1e2)]
    assert objectives == pytest.approx([objectives[1]] * 3, rel=3e-6)


def test_targets_without_signal_have_the_zero_model():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg = ch.ConvexHeadRegressor(random_state=0).fit(X, np.zeros(60))
    assert reg.n_heads_ == 0
    assert (reg.predict(X) == 0).all()


@pytest.mark.parametrize("solver", ["fista", "column-generation"])
def test_the_solver_can_be_named(solver, tmp_path):
    chosen, named = classifier(), classifier(solver=solver)
    assert named.fit(X, Y).certificate_.converged
    assert named.certificate_.primal == pytest.approx(chosen.fit(X, Y).certificate_.primal, rel=2e-5)
    named.save(tmp_path / "model")
    assert ch.load(tmp_path / "model").solver == solver
    rows = ch.regularization_path(X, Y, beta_ratios=[0.25], solver=solver, tol=1e-5, random_state=0)
    assert rows[0]["objective"] == named.certificate_.primal


def test_a_solver_of_another_kind_of_problem_is_refused():
    with pytest.raises(ch.InputError, match="ridge"):
        classifier(solver="ridge").fit(X, Y)
