"""Bad input: each gives one clear line of a documented type, and nothing good is lost."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

import convexhead as ch
from convexhead.program.losses import Huber

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 6, 4))
Y = np.arange(24) % 3


def with_value(value):
    bad = X.copy()
    bad[3, 2, 1] = value
    return bad


def fit(X=X, y=Y, **parameters):
    return ch.ConvexHeadClassifier(random_state=0, **parameters).fit(X, y)


def weighed(sample_weight):
    return ch.ConvexHeadClassifier().fit(X, Y, sample_weight)


def regress(y, **parameters):
    return ch.ConvexHeadRegressor(random_state=0, **parameters).fit(X, y)


FITTED = fit(beta_ratio=0.3)
FACTORS = (FITTED.mixing_[0], FITTED.values_[0])

CASES = {
    # tokens
    "NaN": (lambda: fit(with_value(np.nan)), "NaN"),
    "infinity": (lambda: fit(with_value(np.inf)), "infinity"),
    "one dimension": (lambda: fit(np.zeros(24)), "Expected 2D array"),
    "four dimensions": (lambda: fit(X.reshape(24, 2, 3, 4)), r"flatten the grid to \(n, s, d\)"),
    "no samples": (lambda: fit(X[:0], Y[:0]), "0 sample"),
    "no channels": (lambda: fit(X[:, :, :0]), "at least one token and one channel"),
    "constant tokens": (lambda: fit(np.ones_like(X)), "tokens are constant"),
    "text": (lambda: fit(np.full((24, 6, 4), "a")), "could not convert string"),
    "complex": (lambda: fit(X + 1j), "Complex data not supported"),
    # labels
    "lengths differ": (lambda: fit(X, Y[:-1]), "inconsistent numbers of samples: 24 tokens, 23 targets"),
    "one class": (lambda: fit(X, np.zeros(24, int)), "only one class"),
    "no labels": (lambda: fit(X, None), "requires y to be passed"),
    "NaN label": (lambda: fit(X, np.where(Y == 0, np.nan, Y)), "NaN"),
    "continuous labels": (lambda: fit(X, RNG.normal(size=24)), "Unknown label type"),
    "two columns of labels": (lambda: fit(X, np.stack([Y, Y], 1)), "labels of several columns"),
    "rows that do not sum to 1": (lambda: fit(X, np.full((24, 3), 0.5)), "use loss='binary-cross-entropy'"),
    "labels for several labels": (lambda: fit(loss="binary-cross-entropy"), "an indicator matrix"),
    "indicators above 1": (lambda: fit(X, np.full((24, 3), 2), loss="binary-cross-entropy"), "0, 1 or between"),
    "class weights of indicators": (
        lambda: fit(X, np.eye(3)[Y], loss="binary-cross-entropy", class_weight="balanced"),
        "use pos_weight",
    ),
    "positive weight of labels": (lambda: fit(pos_weight=2.0), "use class_weight"),
    "positive weights of other classes": (
        lambda: fit(X, np.eye(3)[Y], loss="binary-cross-entropy", pos_weight=[1.0, 2.0]),
        "one for each of the 3 classes",
    ),
    "class weight of no class": (lambda: fit(class_weight={7: 2.0}), "class_weight names 7"),
    "negative sample weight": (lambda: weighed(np.full(24, -1.0)), "at least 0"),
    "sample weights of other samples": (lambda: weighed(np.ones(23)), r"sample_weight must be \(24,\)"),
    "no sample weighs anything": (lambda: weighed(np.zeros(24)), "sample weights are zero"),
    "weights of tokens that are pooled": (lambda: weighed(np.ones((24, 6))), r"sample_weight must be \(24,\)"),
    "weights of single probabilities": (
        lambda: ch.ConvexHeadClassifier(pool=None).fit(X, np.full((24, 6, 3), 1 / 3), np.ones((24, 6, 3))),
        r"sample_weight must be \(24,\) or \(24, 6\)",
    ),
    "sample weights of text": (lambda: weighed(["a"] * 24), "sample_weight must be an array of numbers"),
    "lists of labels": (lambda: fit(y=[["a", "b"], ["a"]] * 12), "MultiLabelBinarizer"),
    "sets of labels": (lambda: fit(y=[{1, 2}, {1}] * 12), "MultiLabelBinarizer"),
    "no token counts": (lambda: fit(y=np.full((24, 6), -1), pool=None), "no label counts"),
    "one column of indicators": (
        lambda: fit(y=(Y[:, None] > 0).astype(int), loss="binary-cross-entropy"),
        "of one column use loss='cross-entropy'",
    ),
    "rows 2e-5 from 1": (lambda: fit(y=np.eye(3)[Y] * (1 - 2e-5)), "do not sum to 1"),
    "a negative probability": (lambda: fit(y=np.array([[1.01, -0.01, 0.0]] * 24)), r"outside \[0, 1\]"),
    "infinite target": (lambda: regress(np.where(Y == 0, np.inf, Y)), "infinity"),
    "targets for every token missing": (lambda: regress(RNG.normal(size=24), pool=None), r"must be \(n, s, c\)"),
    "targets for tokens that are pooled": (lambda: regress(RNG.normal(size=(24, 6, 2))), r"must be \(n,\) or \(n, c\)"),
    # parameters
    "negative beta": (lambda: fit(beta=-1.0), "beta must be a positive number"),
    "zero beta": (lambda: fit(beta=0.0), "beta must be a positive number"),
    "NaN beta": (lambda: fit(beta=float("nan")), "beta must be a positive number"),
    "negative ratio": (lambda: fit(beta_ratio=-0.1), "beta_ratio must be a positive number"),
    "zero tol": (lambda: fit(tol=0.0), "tol must be a positive number"),
    "tol of text": (lambda: fit(tol="small"), "tol must be a positive number"),
    "negative time": (lambda: fit(max_time=-1), "max_time must be a positive number"),
    "no heads allowed": (lambda: fit(max_heads=0), "max_heads must be a positive integer"),
    "fractional gates": (lambda: fit(activation="gated-relu", n_gates=2.5), "n_gates must be a positive integer"),
    "unknown head": (lambda: fit(head="self-atention"), "did you mean 'self-attention'"),
    "unknown activation": (lambda: fit(activation="gatedrelu"), "did you mean 'gated-relu'"),
    "unknown pool": (lambda: fit(pool="max"), "choose one of 'mean', 'cls', 'none'"),
    "one label a sample for every token": (lambda: fit(pool=None), r"y must be labels \(n, 6\)"),
    "labels of other tokens": (lambda: fit(X, np.zeros((24, 5), int), pool=None), "there are 6 tokens a sample"),
    "unknown loss": (lambda: regress(RNG.normal(size=24), loss="square"), "did you mean 'squared'"),
    "huber without width": (lambda: Huber(0.0), "delta must be positive"),
    "grid that does not fit": (lambda: fit(head="fno", grid=(2, 2)), "does not hold 6 tokens"),
    "blocks that do not divide": (lambda: fit(head="block-fno", n_blocks=3), "divisor of the 4 channels"),
    "outputs that do not divide": (
        lambda: fit(head="block-fno", n_blocks=2, outputs="grouped"),
        "divisible by n_blocks=2",
    ),
    "unknown outputs": (lambda: fit(head="block-fno", outputs="common"), "unknown outputs"),
    "gated linear head": (lambda: fit(head="linear", activation="gated-relu"), "activation='linear' only"),
    "gates of the wrong shape": (lambda: fit(activation="gated-relu", gates=np.ones((2, 3))), r"needs \(J, 4, 4\)"),
    "no gates": (lambda: fit(activation="gated-relu", gates=np.ones((0, 4, 4))), "with J >= 1"),
    "NaN in gates": (lambda: fit(activation="gated-relu", gates=np.full((1, 4, 4), np.nan)), "gates contain NaN"),
    "gates of text": (lambda: fit(activation="gated-relu", gates="many"), "gates is a str"),
    "unknown device": (lambda: fit(device="abacus"), "cannot be used here"),
    # using
    "other channels": (lambda: FITTED.predict(X[:, :, :3]), "3 features, but this head was fitted with 4"),
    "other tokens": (lambda: FITTED.predict(X[:, :5]), "5 tokens a sample, but this head was fitted with 6"),
    "NaN in prediction": (lambda: FITTED.predict(with_value(np.nan)), "NaN"),
    "raw tokens without reduction": (lambda: FITTED.to_module(raw_tokens=True), "no reduction"),
    # paths and audits
    "empty path": (lambda: ch.regularization_path(X, Y, beta_ratios=[]), "beta_ratios must be some positive"),
    "beta given to a path": (lambda: ch.regularization_path(X, Y, beta=1.0), "sets beta itself"),
    "misspelt parameter": (lambda: ch.regularization_path(X, Y, haed="mlp"), "did you mean 'head'"),
    "audit without beta": (lambda: ch.certify(FITTED, X, Y, beta=-1), "beta must be a positive number"),
    "audit of other tokens": (lambda: ch.certify(FITTED, X[:, :5], Y, beta=1.0), "these weights are for"),
    "audit of other classes": (lambda: ch.certify(FITTED, X, Y % 2, beta=1.0), "2 classes, but the weights have 3"),
    "audit of NaN": (
        lambda: ch.certify((FACTORS[0] * np.nan, FACTORS[1]), X, Y, beta=1.0),
        "training they come from diverged",
    ),
    "audit of wrong shapes": (lambda: ch.certify((FACTORS[0][:, :2], FACTORS[1]), X, Y, beta=1.0), "needed are"),
    "audit of gated factors without gates": (
        lambda: ch.certify(FACTORS, X, Y, beta=1.0, activation="gated-relu"),
        "pass gates=",
    ),
    "audit of something else": (lambda: ch.certify(3, X, Y, beta=1.0), "weights must be"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_line(name):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    first = str(caught.value).strip().splitlines()[0]
    assert 10 < len(first) < 300


def test_unfitted():
    with pytest.raises(NotFittedError):
        ch.ConvexHeadClassifier().predict(X)
    with pytest.raises(NotFittedError):
        ch.certify(ch.ConvexHeadClassifier(), X, Y, beta=1.0)


@pytest.fixture
def saved(tmp_path):
    FITTED.save(tmp_path / "model")
    return tmp_path / "model"


def damage(folder, how):
    config = folder / "config.json"
    weights = folder / "weights.safetensors"
    if how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif how == "no weights":
        weights.unlink()
    elif how == "half a config":
        config.write_text(config.read_text()[:200])
    elif how == "foreign config":
        config.write_text('{"model_type": "bert"}')
    elif how == "newer version":
        config.write_text(json.dumps({**json.loads(config.read_text()), "version": 99}))
    elif how == "no config":
        config.unlink()
    elif how == "missing key":
        stripped = json.loads(config.read_text())
        del stripped["parameters"]
        config.write_text(json.dumps(stripped))
    elif how == "weights of another head":
        config.write_text(json.dumps({**json.loads(config.read_text()), "n_features_in_": 5}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated weights", "damaged"),
        ("no weights", "missing or damaged"),
        ("half a config", "damaged"),
        ("foreign config", "not a convexhead model"),
        ("newer version", "upgrade convexhead"),
        ("no config", "not a model folder"),
        ("missing key", "complete model"),
        ("weights of another head", "complete model"),
    ],
)
def test_damaged_models(saved, how, message):
    damage(saved, how)
    with pytest.raises(ch.FileFormatError, match=message):
        ch.load(saved)


def test_saving_never_replaces_something_else(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    with pytest.raises(ch.InputError, match="not a model folder"):
        FITTED.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "precious"


def test_a_save_that_fails_keeps_the_old_model(saved, monkeypatch):
    before = ch.load(saved).predict(X)
    monkeypatch.setattr("convexhead.model_folder.to_bytes", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fit(beta_ratio=0.9).save(saved)
    np.testing.assert_array_equal(ch.load(saved).predict(X), before)
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_missing_optional_package_names_the_extra(monkeypatch):
    from convexhead.errors import require

    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ch.MissingExtraError, match=r"pip install 'convexhead\[report\]'"):
        require("jinja2", "report")


def test_half_precision_tensors_are_fine():
    clf = fit(torch.tensor(X).half(), torch.tensor(Y), beta_ratio=0.3)
    assert clf.certificate_.converged
