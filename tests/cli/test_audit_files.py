"""``convexhead audit`` of linear heads that others trained, from their files, on a store of real images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import convexhead as ch

pytest.importorskip("PIL")
from PIL import Image
from sklearn.linear_model import LogisticRegression

from command import call

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
CLASSES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photos")
    for c, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for i in range(20):
            pixels = rng.integers(0, 200, (8, 8, 3))
            pixels[..., c] += 12
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:03}.png")
    out = tmp_path_factory.mktemp("work") / "tokens"
    assert call("extract", folder, "--backbone", "patches:4", "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def probe(store):
    train = ch.TokenStore.open(store)["train"]
    X, y = train.read().astype(np.float64).mean(1), np.array(train.class_names)[train.labels]
    return LogisticRegression(C=30, max_iter=4, tol=1e-12).fit(X, y)


def call_json(capsys, *arguments):
    capsys.readouterr()
    assert call(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_file_is_audited_with_two_numbers(store, probe, tmp_path, capsys):
    own = {"coef_": probe.coef_, "intercept_": probe.intercept_, "classes_": probe.classes_.astype(str), "C": probe.C}
    np.savez(tmp_path / "probe.npz", **own)
    found = call_json(capsys, "audit", tmp_path / "probe.npz", store)
    assert found["beta"] == pytest.approx(1 / (60 * 30))
    assert found["reference"]["run"] is None
    assert found["proven"]["dual"] < found["certificate"]["dual"] <= found["reference"]["primal"]
    least, most = found["distance"]["at_least"], found["distance"]["at_most"]
    assert 0 < least < most < found["proven"]["relative_gap"]
    assert most - least < 2e-3
    assert "softmax" not in found["program"]

    alone = call_json(capsys, "audit", tmp_path / "probe.npz", store, "--no-reference")
    assert alone["distance"] is None
    assert alone["certificate"] == found["proven"]
    assert call("audit", tmp_path / "probe.npz", store) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "above the optimum: of the objective" in words
    assert "proven from these weights alone: objective" in words
    assert "not converged" not in words
    assert call("audit", tmp_path / "probe.npz", store, "--no-reference") == 0
    assert "the true distance may be far smaller" in " ".join(capsys.readouterr().out.split())


def test_state_dicts_need_beta_and_the_outputs_of_the_store(store, probe, tmp_path, capsys):
    weights = {"head.weight": torch.from_numpy(probe.coef_), "head.bias": torch.from_numpy(probe.intercept_)}
    torch.save(weights, tmp_path / "linear_head.pth")
    assert call("audit", tmp_path / "linear_head.pth", store) == 1
    assert "--beta" in capsys.readouterr().err
    found = call_json(capsys, "audit", tmp_path / "linear_head.pth", store, "--beta", 0.002)
    assert found["certificate"]["beta"] == 0.002

    torch.save({"weight": weights["head.weight"].repeat(2, 1)}, tmp_path / "six.pth")
    assert call("audit", tmp_path / "six.pth", store, "--beta", 0.002) == 1
    assert "the labels have 3 classes, but the weights have 6 outputs" in capsys.readouterr().err
    np.savez(tmp_path / "named.npz", coef_=probe.coef_, classes_=["blue", "green", "pink"])
    assert call("audit", tmp_path / "named.npz", store, "--beta", 0.002) == 1
    assert "'red' are not among the classes" in capsys.readouterr().err
    assert call("audit", tmp_path / "missing.npz", store, "--beta", 0.002) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_classes_are_matched_by_name(store, probe, tmp_path, capsys):
    order = [2, 0, 1]
    np.savez(tmp_path / "turned.npz", coef_=probe.coef_[order], intercept_=probe.intercept_[order],
             classes_=probe.classes_[order].astype(str))  # fmt: skip
    np.savez(tmp_path / "sorted.npz", coef_=probe.coef_, intercept_=probe.intercept_)
    one, two = (call_json(capsys, "audit", tmp_path / f"{name}.npz", store, "--beta", 0.001, "--no-reference")
                for name in ("turned", "sorted"))  # fmt: skip
    assert one["certificate"]["primal"] == pytest.approx(two["certificate"]["primal"], rel=1e-12)


@pytest.mark.slow
def test_runs_of_adam_are_told_their_distance(store, tmp_path, capsys):
    settings = ("--heads", 4, "--epochs", 5, "--lr", 0.05)
    for head in ("linear", "mlp"):
        assert call("adam", store, "--head", head, *settings, "--out", tmp_path / head) == 0
    linear = call_json(capsys, "audit", tmp_path / "linear", store)
    assert 0 < linear["distance"]["at_least"] < linear["distance"]["at_most"] < linear["proven"]["relative_gap"]
    mlp = call_json(capsys, "audit", tmp_path / "mlp", store)
    assert mlp["distance"] is None  # the optimum of a head that mixes tokens is for the user to find
    assert mlp["certificate"] == mlp["proven"]
    assert call("audit", tmp_path / "mlp", store) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "proven from these weights alone: objective" in words
    assert "give that run with --reference" in words


def test_an_attentive_probe_is_audited_with_what_it_lacks(store, tmp_path, capsys):
    d = ch.TokenStore.open(store)["train"].read().shape[2]
    torch.manual_seed(0)
    state = {"queries": torch.randn(2, d), "values": torch.randn(2, d, 2), "head.weight": torch.randn(3, 4)}
    torch.save(state, tmp_path / "probe.pth")
    assert call("audit", tmp_path / "probe.pth", store) == 1
    assert "beta must be" in capsys.readouterr().err
    found = call_json(capsys, "audit", tmp_path / "probe.pth", store, "--beta", 0.01)
    assert "2 queries" in found["program"]
    assert found["certificate"]["scope"] == "sampled-queries"
    assert 0 < found["distance"]["at_least"] <= found["distance"]["at_most"]
    assert len(found["missing"]["query"]) == d
    assert call("audit", tmp_path / "probe.pth", store, "--beta", 0.01) == 0
    assert "query" in capsys.readouterr().out
