"""The metric of the tokens: fitted on train, kept by the run, and applied wherever the run reads tokens."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power

import convexhead as ch
from command import call
from convexhead import runs
from convexhead.errors import InputError
from convexhead.tokens import SplitView, extract, whitened

pytest.importorskip("PIL")

FIT = ("--head", "mlp", "--beta-ratio", 0.1, "--fit-intercept")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = tmp_path_factory.mktemp("whiten") / "tokens"
    return extract("sklearn:digits", "patches:4", out, channels=8, reduce="pca", constant=True, dtype="float32")


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    assert call("fit", store.path, "--out", out, *FIT, "--whiten", "0.5") == 0
    return out


@pytest.fixture(scope="module")
def tokens(store):
    """Train and test tokens in the metric, by scipy."""
    plain = {split: store[split].read().astype(np.float64) for split in ("train", "test")}
    flat = plain["train"][..., :-1].reshape(-1, 8)
    M = np.eye(9)
    M[:8, :8] = fractional_matrix_power(flat.T @ flat / len(flat), -0.25)
    return {split: x @ M for split, x in plain.items()}


def printed(capsys, *arguments):
    capsys.readouterr()
    assert call(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_every_reader_of_the_run_applies_it(store, run, tokens, tmp_path, capsys):
    clf, labels = ch.load(run), store["test"].labels
    scores = np.einsum("nsd,kd,kc->nc", tokens["test"], clf.mixing_[0], clf.values_[0][:, 0]) / 4 + clf.intercept_
    np.testing.assert_allclose(clf.decision_function(store["test"]), scores, atol=2e-4)
    module = clf.to_module(raw_tokens=True)
    with torch.no_grad():
        out = module(torch.from_numpy(store["test"].unreduced().read()))
    np.testing.assert_allclose(out.numpy(), scores, atol=1e-3)

    top1 = printed(capsys, "evaluate", run, store.path)["top1"]
    assert top1 == pytest.approx((scores.argmax(1) == labels).mean(), abs=0.003)
    assert call("predict", run, store.path, "--split", "test", "--out", tmp_path / "p.csv") == 0
    with open(tmp_path / "p.csv", newline="") as file:
        p = np.array([[float(row[f"p:{k}"]) for k in range(10)] for row in csv.DictReader(file)])
    expected = np.exp(scores - scores.max(1, keepdims=True))
    np.testing.assert_allclose(p, expected / expected.sum(1, keepdims=True), atol=1e-3)
    audited = printed(capsys, "audit", run, store.path)["certificate"]
    assert audited["converged"]
    assert audited["primal"] == pytest.approx(clf.certificate_.primal, rel=1e-6)
    evidence = json.loads((run / "evidence.json").read_text())
    assert "--whiten 0.5" in evidence["command"]


def test_it_is_the_program_of_the_mapped_tokens(store, run, tokens):
    train, clf = store["train"], ch.load(run)
    by_hand = ch.ConvexHeadClassifier("mlp", beta=clf.beta_, fit_intercept=True, tol=1e-3)
    by_hand.fit(tokens["train"], train.labels)
    assert clf.certificate_.dual <= by_hand.certificate_.primal
    assert by_hand.certificate_.dual <= clf.certificate_.primal
    assert clf.beta_max_ == pytest.approx(ch.beta_max(tokens["train"], train.labels, head="mlp", fit_intercept=True),
                                          rel=1e-4)  # fmt: skip


def test_a_bound_in_another_metric_is_refused(store, run, capsys):
    train, clf = store["train"], ch.load(run)
    other = ch.ConvexHeadClassifier("mlp", beta=clf.beta_, fit_intercept=True, tol=0.1).fit(whitened(train, 0.6))
    assert other.certificate_.identity != clf.certificate_.identity
    with pytest.raises(InputError, match="tokens"):
        ch.certify(clf, train, beta=clf.beta_, lower_bound=other.certificate_)
    same = ch.ConvexHeadClassifier("mlp", beta=clf.beta_, fit_intercept=True, tol=0.1).fit(whitened(train, 0.5))
    assert same.certificate_.identity == clf.certificate_.identity
    assert ch.certify(clf, train, beta=clf.beta_, lower_bound=same.certificate_).dual >= same.certificate_.dual


def test_path_adam_and_stores_like_the_run(store, run, monkeypatch, tmp_path, capsys):
    def refuse(self):
        raise AssertionError("the whole split was read at once")

    with monkeypatch.context() as patch:
        patch.setattr(SplitView, "read", refuse)
        found = runs.path(store.path, tmp_path / "path", whiten=0.5, head="linear", beta_ratios=(0.3,), refit=True)
    reduction = ch.load(run).reduction_
    assert ch.load(tmp_path / "path").reduction_.identity == found.kept.reduction_.identity == reduction.identity
    adam = ("--head", "mlp", "--epochs", 1, "--whiten", 0.5)
    assert call("adam", store.path, "--out", tmp_path / "adam", *adam) == 0
    assert ch.load(tmp_path / "adam").reduction_.identity == reduction.identity
    assert call("extract", "sklearn:digits", "--like", run, "--out", tmp_path / "like") == 0
    like = printed(capsys, "evaluate", run, tmp_path / "like")["top1"]
    assert like == printed(capsys, "evaluate", run, store.path)["top1"]
    assert call("fit", tmp_path / "like", "--out", tmp_path / "twice", *FIT, "--whiten", "0.5") == 1
    assert "leave whiten out" in capsys.readouterr().err


@pytest.mark.parametrize("whiten", ["-0.5", "1.5", "nan"])
def test_what_is_no_metric(store, tmp_path, capsys, whiten):
    assert call("fit", store.path, "--out", tmp_path / "run", *FIT, f"--whiten={whiten}") == 1
    assert "whiten must be a number from 0 (tokens as they are) to 1" in " ".join(capsys.readouterr().err.split())
