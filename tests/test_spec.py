"""Each setting is written once: signatures, docstrings, commands and files say what `Spec` says."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields

import numpy as np
import pytest
from sklearn.base import clone

import convexhead as ch
from convexhead.cli import adam, fit
from convexhead.estimator_base import HeadEstimator
from convexhead.program.losses import Huber
from convexhead.spec import OF_CLASSIFIERS, OF_QUERIES, Spec

DEFAULTS = {each.name: each.default for each in fields(Spec)}
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(20, 4, 3)), np.arange(20) % 2


def defaults_of(function):
    return {
        name: parameter.default for name, parameter in inspect.signature(function).parameters.items() if name != "self"
    }


def test_estimators_have_the_settings_as_parameters():
    classifier, regressor = defaults_of(ch.ConvexHeadClassifier), defaults_of(ch.ConvexHeadRegressor)
    assert list(classifier) == list(DEFAULTS)
    assert list(regressor) == [name for name in DEFAULTS if name not in OF_CLASSIFIERS]
    assert classifier == DEFAULTS
    of_both = {name: value for name, value in DEFAULTS.items() if name not in OF_CLASSIFIERS}
    assert regressor == {**of_both, "loss": "squared"}


def test_estimators_that_choose_beta_have_all_settings_but_beta():
    own = {"beta_ratios": None, "cv": 5, "scoring": None, "refit": True}
    pairs = [
        (ch.ConvexHeadClassifierCV, ch.ConvexHeadClassifier),
        (ch.ConvexHeadRegressorCV, ch.ConvexHeadRegressor),
    ]
    for choosing, plain in pairs:
        fixed = {name: value for name, value in defaults_of(plain).items() if name not in ("beta", "beta_ratio")}
        assert defaults_of(choosing) == fixed | own


def test_every_setting_is_documented_in_its_order():
    text = inspect.getdoc(ch.ConvexHeadClassifier)
    parameters = re.split(r"\n(?:Parameters|Attributes)\n-+\n", text)[1]
    assert re.findall(r"^(\w+) : ", parameters, re.MULTILINE) == list(DEFAULTS)


def test_every_view_is_documented():
    documented = inspect.getdoc(ch.ConvexHeadClassifier).split("Attributes\n")[1]
    views = {name for cls in (HeadEstimator, ch.ConvexHeadClassifier) for name in vars(cls) if name.endswith("_")}
    views = {name for name in views if not name.startswith("_")}
    assert views
    assert {name for name in views if not re.search(rf"^(\w+, )*{name}\b", documented, re.MULTILINE)} == set()


@pytest.mark.parametrize("function", [fit.fit, fit.path, adam.adam, ch.certify], ids=["fit", "path", "adam", "certify"])
def test_commands_and_audits_have_the_same_defaults(function):
    own = {name: value for name, value in defaults_of(function).items() if name in DEFAULTS}
    required = {"beta"} if function is ch.certify else set()
    assert len(own) >= 9
    for name, value in own.items():
        if name not in required and not (name == "loss" and value is None):
            assert value == DEFAULTS[name], name


WRONG = {
    "head": "hed",
    "activation": "gelu",
    "loss": "hinge",
    "beta": 0.0,
    "beta_ratio": -1,
    "pool": "max",
    "grid": (5, 5),
    "n_gates": 0,
    "gates": np.zeros((1, 1)),
    "n_blocks": 1.5,
    "outputs": "split",
    "n_queries": 2.5,
    "queries": "all",
    "query_scale": 0,
    "query_position": "no",
    "key_dim": 0,
    "query_norm": "none",
    "fit_intercept": "yes",
    "class_weight": {0: -1.0},
    "label_smoothing": 1.0,
    "pos_weight": [1.0, 0.0],
    "ignore_index": 0.5,
    "solver": "adam",
    "tol": float("nan"),
    "max_heads": True,
    "max_time": float("inf"),
    "max_memory": "8GB",
    "random_state": "seed",
    "device": "abacus",
    "distributed": 1,
    "verbose": -1,
}


def test_every_setting_is_tried():
    assert WRONG.keys() == DEFAULTS.keys()


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_refused_by_name(name):
    settings = {"activation": "gated-relu", "head": "mlp", name: WRONG[name]}
    if name in OF_QUERIES:
        settings = {"head": "attentive", name: WRONG[name]}
    reg = (ch.ConvexHeadClassifier if name in OF_CLASSIFIERS else ch.ConvexHeadRegressor)(**settings)
    with pytest.raises(ch.InputError, match=name):
        reg.fit(X, Y.astype(float))
    assert not hasattr(reg, "model_")


def test_settings_are_kept_in_plain_types():
    spec = Spec(tol=np.float32(0.5), n_gates=np.int64(3), fit_intercept=np.bool_(True), pool="none", loss=Huber(2.0))
    assert (spec.tol, spec.n_gates, spec.fit_intercept, spec.pool) == (0.5, 3, True, None)
    assert [type(value) for value in (spec.tol, spec.n_gates, spec.fit_intercept)] == [float, int, bool]
    with pytest.raises(AttributeError):
        spec.tol = 0.1


def test_checkpoints_compare_what_determines_the_iterates():
    changed = {"max_time": 1.0, "max_memory": 1e9, "device": "cpu", "distributed": True, "verbose": 3}
    facts = Spec().facts()
    assert Spec(**changed).facts() == facts
    assert not facts.keys() & changed.keys()
    others = {"head": "mlp", "tol": 0.1, "gates": np.ones((1, 3)), "loss": "squared", "grid": (1, 4), "beta": 1.0}
    for name, value in others.items():
        told = Spec(**{name: value}).facts()
        assert [key for key in told if told[key] != facts.get(key)] == [name]


def test_saved_models_hold_the_settings_by_name(tmp_path):
    clf = ch.ConvexHeadClassifier("mlp", beta_ratio=0.5, grid=(2, 2), tol=0.01, random_state=3).fit(X, Y)
    clf.save(tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "config.json").read_text())["parameters"]
    assert saved.keys() == clf.get_params().keys() - {"gates", "queries", "loss", *OF_CLASSIFIERS}  # these only if set
    assert clone(ch.load(tmp_path / "model")).get_params() == clf.get_params()
    settings = {"loss": "binary-cross-entropy", "pos_weight": [1.0, 3.0]}
    other = {"class_weight": {0: 1.0, 1: 2.5}, "label_smoothing": 0.1, "ignore_index": 9}
    for more, labels in ((settings, np.eye(2)[Y]), (other, Y)):
        clf = ch.ConvexHeadClassifier("mlp", beta_ratio=0.5, **more).fit(X, labels)
        clf.save(tmp_path / "model")
        read = ch.load(tmp_path / "model")
        assert {name: getattr(read, name) for name in more} == more
        assert np.array_equal(read.predict_proba(X), clf.predict_proba(X))
