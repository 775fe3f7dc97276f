"""`Model`: what was trained, and the estimators as views of it."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

import convexhead as ch
from convexhead.interpret import spectra
from convexhead.model import Model

RNG = np.random.default_rng(3)
X = RNG.normal(size=(40, 4, 4))
Y = np.array(["ant", "bee"])[(X[:, :, 0] * X[:, :, 1]).mean(1).astype(int) + (X[:, 0, 2] > 0)]
CASES = {
    "attention": {"head": "self-attention", "beta_ratio": 0.1},
    "gated": {"head": "mlp", "activation": "gated-relu", "n_gates": 3, "beta_ratio": 0.3, "fit_intercept": True},
    "grouped": {"head": "block-fno", "outputs": "grouped", "n_blocks": 2, "beta_ratio": 0.1},
    "linear": {"head": "linear", "beta_ratio": 0.1},
    "attentive": {"head": "attentive", "n_queries": 3, "beta_ratio": 0.3},
}


def fit(**settings):
    return ch.ConvexHeadClassifier(random_state=0, **settings).fit(X, Y)


FITTED = {name: fit(**settings) for name, settings in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_copies_are_the_same_head(name, tmp_path):
    clf = FITTED[name]
    clf.save(tmp_path / "model")
    others = {
        "pickle": pickle.loads(pickle.dumps(clf)),
        "deepcopy": copy.deepcopy(clf),
        "from_model": ch.ConvexHeadClassifier.from_model(clf.model_),
        "load": ch.load(tmp_path / "model"),
        "Model.load": ch.ConvexHeadClassifier.from_model(Model.load(tmp_path / "model")),
    }
    for how, other in others.items():
        np.testing.assert_array_equal(other.decision_function(X), clf.decision_function(X), err_msg=how)
        assert other.get_params().keys() == clf.get_params().keys()
        assert other.certificate_ == clf.certificate_
        assert other.n_features_in_ == 4
    assert not hasattr(clone(clf), "model_")


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_the_formula_of_the_public_weights(name):
    """``f = Σ mix(X, U_k) V_k + b``, written out from views alone for the heads that a line is enough for."""
    clf = FITTED[name]
    f = clf.model_.outputs(X)[:, 0] - clf.intercept_
    if name == "attention":
        expected = sum(
            np.einsum("nsd,de,nte,ntf,fc->nc", X, U, X, X, V) / 16
            for U, V in zip(clf.mixing_[0], clf.values_[0], strict=True)
        )
    elif name == "gated":
        expected = sum(
            np.einsum("nsd,kd,kc,ns->nc", X, U, V[:, 0], X @ g >= 0) / 4
            for g, U, V in zip(clf.gates_, clf.mixing_, clf.values_, strict=True)
        )
    elif name == "attentive":
        q, places = clf.queries_[:, :4], clf.queries_[:, 4:]
        weights = np.exp(np.einsum("nsd,jd->nsj", X, q) + places.T)
        means = np.einsum("nsj,nsd->njd", weights / weights.sum(1, keepdims=True), X)
        expected = np.einsum("njd,kjd,kc->nc", means, clf.mixing_[0], clf.values_[0][:, 0])
    elif name == "linear":
        expected = X.mean(1) @ clf.coef_
    else:
        expected = np.stack(
            [sum((X.mean(1)[:, g : g + 2] @ U.sum(0)) * V[0, 0] for U, V in zip(us, vs, strict=True))
             for g, us, vs in zip((0, 2), clf.mixing_, clf.values_, strict=True)], axis=1,
        )  # fmt: skip
    np.testing.assert_allclose(f, expected, atol=1e-9)


def test_views_are_there_after_fit_only():
    clf = ch.ConvexHeadClassifier()
    for name in ("certificate_", "mixing_", "classes_", "origin_", "model_", "n_features_in_"):
        assert not hasattr(clf, name)
    with pytest.raises(AttributeError, match="has no beta_ yet: call fit first"):
        _ = clf.beta_
    assert not hasattr(FITTED["attention"], "coef_")
    assert not hasattr(FITTED["linear"], "mixing_")
    assert FITTED["linear"].gates_ is None
    reg = ch.ConvexHeadRegressor("mlp", beta_ratio=0.5, random_state=0).fit(X, X[:, 0, 0])
    assert not hasattr(reg, "classes_")


def test_parts_of_a_model_are_not_changed_in_place():
    """A certificate would be for weights that are no longer there."""
    clf = copy.deepcopy(FITTED["gated"])
    for array in (clf.mixing_[0], clf.values_[0], clf.intercept_, clf.gates_):
        with pytest.raises(ValueError, match="read-only"):
            array *= 2
    with pytest.raises(ValueError, match="read-only"):
        FITTED["linear"].coef_[:] = 0
    with pytest.raises(AttributeError, match=r"beta_ cannot be set.*from_model"):
        clf.beta_ = 1.0
    other = clf.from_model(replace(clf.model_, classes=np.array([5, 7])))
    assert set(other.predict(X)) <= {5, 7}


def test_later_settings_do_not_change_a_fitted_head():
    clf = copy.deepcopy(FITTED["attention"])
    before = clf.predict_proba(X)
    clf.set_params(head="mlp", pool="cls", grid=(1, 4), n_blocks=3)
    np.testing.assert_array_equal(clf.predict_proba(X), before)


def test_a_model_is_of_one_estimator():
    with pytest.raises(ch.InputError, match="ConvexHeadRegressor is not the estimator of this model"):
        ch.ConvexHeadRegressor.from_model(FITTED["linear"].model_)


def test_models_are_audited_and_interpreted_as_their_estimators_are():
    clf = FITTED["gated"]
    audits = [ch.certify(head, X, Y, beta=clf.beta_, random_state=0) for head in (clf, clf.model_)]
    assert audits[0] == audits[1]
    assert audits[0].primal == pytest.approx(clf.certificate_.primal, rel=1e-9)
    for name, values in spectra(clf.model_).items():
        torch.testing.assert_close(values, spectra(clf)[name], rtol=0, atol=0)


def test_a_module_says_what_its_outputs_mean():
    module = FITTED["attention"].to_module()
    assert module.classes == ["ant", "bee"]
    assert module.class_names is module.origin is module.fitted_behind is None
    assert copy.deepcopy(module).classes == pickle.loads(pickle.dumps(module)).classes == ["ant", "bee"]


def test_names_of_columns_are_those_of_the_last_fit():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(X[:, 0], columns=list("abcd"))
    clf = ch.ConvexHeadClassifier("mlp", beta_ratio=0.5, random_state=0).fit(table, Y)
    assert list(clf.feature_names_in_) == list(clf.model_.feature_names) == list("abcd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clf.fit(X[:, :1], Y)
    assert not hasattr(clf, "feature_names_in_")
    assert clf.model_.feature_names is None


@pytest.mark.parametrize("search_tol", [None, 0.1])
def test_a_path_has_models_that_can_be_saved(search_tol, tmp_path):
    rows = ch.regularization_path(
        X[:30], Y[:30], beta_ratios=[0.5, 0.2], X_val=X[30:], y_val=Y[30:], search_tol=search_tol, random_state=0
    )
    solved = [row for row in rows if row["model"] is not None]
    assert len(solved) == (2 if search_tol is None else 1)
    for row in solved:
        row["model"].save(tmp_path / "model")
        assert ch.load(tmp_path / "model").beta_ratio == row["beta_ratio"]
        assert row["model"].beta_ == row["beta"] == row["model"].certificate_.beta


def test_a_warning_names_the_line_of_the_user():
    with pytest.warns(ConvergenceWarning) as caught:
        fit(tol=1e-9, max_time=1e-9)
    assert caught[0].filename == __file__
    with pytest.warns(ConvergenceWarning) as caught:
        ch.regularization_path(X, Y, beta_ratios=[0.1], tol=1e-9, max_time=1e-9)
    assert caught[0].filename == __file__


class Derived(ch.ConvexHeadClassifier):
    """A user's own estimator, with a parameter of its own and a fixed tolerance."""

    def __init__(self, head="mlp", *, beta_ratio=0.3, note=""):
        super().__init__(head, beta_ratio=beta_ratio, tol=0.05, random_state=0)
        self.note = note


def test_estimators_can_be_derived_from():
    derived = clone(Derived(note="mine")).fit(X, Y)
    assert derived.note == "mine"
    assert derived.certificate_ == fit(head="mlp", beta_ratio=0.3, tol=0.05).certificate_
    np.testing.assert_array_equal(Derived.from_model(derived.model_).predict(X), derived.predict(X))


def test_what_earlier_versions_pickled_is_refused():
    old = copy.copy(FITTED["linear"])
    state = {"head": "linear", "certificate_": old.certificate_, "coef_": old.coef_}
    with pytest.raises(ch.FileFormatError, match="pickled by an earlier version"):
        old.__setstate__(state)
