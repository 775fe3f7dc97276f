"""Linear heads that others trained: what is certified is their own objective, and the bound lies below its optimum.

Objectives and optima are computed here by scipy and scikit-learn, from the tools' own definitions.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    RidgeClassifier,
    RidgeClassifierCV,
    SGDClassifier,
)
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, Normalizer, StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils import compute_sample_weight

import convexhead as ch
from convexhead.audit import audit

warnings.filterwarnings("ignore", category=FutureWarning, module="sklearn")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::sklearn.exceptions.ConvergenceWarning")
NAMES = np.array(["cat", "dog", "eel", "fox"])


def data(seed, classes, n=70, d=6):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    y = (X @ rng.normal(size=(d, classes)) + 2 * rng.normal(size=(n, classes))).argmax(1)
    y[:classes] = np.arange(classes)
    return X, NAMES[:classes][y]


def binomial(X, signs, w, b, omega=None):
    """The weighted mean of the logistic loss of one row of weights."""
    return np.average(np.logaddexp(0, -signs * (X @ w + b)), weights=omega)


def own_objective(coef, intercept, X, y, weight, classes, omega=None):
    """``weighted mean loss + (weight/2)‖coef‖²`` with one row for two classes, as scikit-learn writes it."""
    coef, intercept = np.atleast_2d(coef), np.broadcast_to(intercept, len(np.atleast_2d(coef)))
    penalty = weight / 2 * np.square(coef).sum()
    if len(coef) == 1:
        return binomial(X, np.where(y == classes[1], 1, -1), coef[0], intercept[0], omega) + penalty
    at = np.searchsorted(classes, y)
    losses = -log_softmax(X @ coef.T + intercept, 1)[np.arange(len(y)), at]
    return np.average(losses, weights=omega) + penalty


def optimum(X, y, weight, omega=None, *, fit_intercept):
    """The least value of `own_objective`, by scikit-learn's Newton method at its tightest."""
    C = 1 / (weight * (len(y) if omega is None else omega.sum()))
    solver = LogisticRegression(C=C, solver="newton-cg", tol=1e-12, max_iter=10_000, fit_intercept=fit_intercept)
    solver.fit(X, y, omega)
    return own_objective(solver.coef_, solver.intercept_, X, y, weight, solver.classes_, omega)


def signs_of(y, classes):
    Y = np.where(y[:, None] == classes, 1.0, -1.0)
    return Y[:, 1:] if len(classes) == 2 else Y


def ridge_objective(coef, intercept, X, Y, weight, omega=None):
    return np.average(np.square(X @ coef.T + intercept - Y).sum(1) / 2, weights=omega) + weight / 2 * np.sum(coef**2)


def ridge_optimum(X, Y, weight, omega=None, *, fit_intercept):
    """In closed form, from the normal equations."""
    share = np.full(len(X), 1 / len(X)) if omega is None else omega / omega.sum()
    shift, target = (share @ X, share @ Y) if fit_intercept else (np.zeros(X.shape[1]), np.zeros(Y.shape[1]))
    A = X - shift
    AtW = A.T * share
    W = np.linalg.solve(AtW @ A + weight * np.eye(X.shape[1]), AtW @ (Y - target))
    return ridge_objective(W.T, target - shift @ W, X, Y, weight, omega)


def weights_of(seed, y):
    """A ``sample_weight`` with zeros, a ``class_weight``, or neither; and what a sample weighs by both."""
    rng = np.random.default_rng(seed)
    kind = seed % 4
    given = rng.integers(0, 4, len(y)).astype(float) if kind in (1, 3) else None
    if given is not None:
        given[: len(np.unique(y))] = 1.5
    by_class = {0: None, 1: None, 2: "balanced", 3: {"cat": 2.5, "dog": 0.5}}[kind]
    return given, by_class, compute_sample_weight(by_class, y) * (1.0 if given is None else given)


def check(certificate, objective, lowest):
    assert certificate.primal == pytest.approx(objective, rel=1e-9)
    assert certificate.dual <= lowest + 1e-12 * abs(lowest)
    assert lowest <= certificate.primal * (1 + 1e-12)


def stopped_early(seed):
    rng = np.random.default_rng(seed)
    return {"fit_intercept": bool(rng.integers(2)), "max_iter": int(rng.integers(1, 12)), "tol": 1e-12}


def check_logistic(seed):
    classes, early = 2 + seed % 3, stopped_early(seed)
    X, y = data(seed, classes)
    C = float(10.0 ** np.random.default_rng(seed).uniform(-3, 3))
    given, by_class, omega = weights_of(seed, y)
    clf = LogisticRegression(C=C, solver=("lbfgs", "newton-cg", "saga")[seed // 3 % 3], class_weight=by_class, **early)
    clf.fit(X, y, given)
    weight = 1 / (omega.sum() * C)
    objective = own_objective(clf.coef_, clf.intercept_, X, y, weight, clf.classes_, omega)
    found = audit(clf, X, y, given, random_state=0)
    lowest = optimum(X, y, weight, omega, fit_intercept=early["fit_intercept"])
    check(found.certificate, objective, lowest)
    assert found.certificate.beta == pytest.approx(2 * weight if classes == 2 else weight)
    if found.distance is not None:  # the optimum lies between
        least, most = found.distance
        assert least - 1e-9 <= (objective - lowest) / objective <= most + 1e-9


def check_sgd(seed):
    classes = 2 + seed % 3
    X, y = data(seed, classes)
    alpha, early = float(10.0 ** np.random.default_rng(seed).uniform(-4, 0)), stopped_early(seed)
    given, by_class, omega = weights_of(seed, y)
    if classes > 2:  # a class weight would be another program for each class
        by_class, omega = None, np.ones(len(y)) if given is None else given
    clf = SGDClassifier(
        loss="log_loss", alpha=alpha, random_state=seed, average=bool(seed % 2), class_weight=by_class, **early
    )
    clf.fit(X, y, sample_weight=given)
    weight = alpha * len(y) / omega.sum()
    certificate, fit_intercept = ch.certify(clf, X, y, given), early["fit_intercept"]
    if classes == 2:
        objective = own_objective(clf.coef_, clf.intercept_, X, y, weight, clf.classes_, omega)
        check(certificate, objective, optimum(X, y, weight, omega, fit_intercept=fit_intercept))
        return
    objective = lowest = 0.0  # one-vs-rest: one program for each class
    for k, name in enumerate(clf.classes_):
        one, pair = np.where(y == name, "this", "rest"), np.array(["rest", "this"])
        b = np.broadcast_to(clf.intercept_, classes)[k]
        objective += own_objective(clf.coef_[k], b, X, one, weight, pair, omega)
        lowest += optimum(X, one, weight, omega, fit_intercept=fit_intercept)
    check(certificate, objective, lowest)


def check_ridge(seed):
    X, y = data(seed, 2 + seed % 3)
    rng = np.random.default_rng(seed)
    alpha, fit_intercept = float(10.0 ** rng.uniform(-2, 3)), bool(rng.integers(2))
    given, by_class, omega = weights_of(seed, y)
    clf = RidgeClassifier(
        alpha=alpha, fit_intercept=fit_intercept, solver="sag", max_iter=1 + seed % 5, tol=1e-12, class_weight=by_class
    )
    clf.fit(X, y, given)
    Y, weight = signs_of(y, clf.classes_), alpha / omega.sum()
    objective = ridge_objective(np.atleast_2d(clf.coef_), clf.intercept_, X, Y, weight, omega)
    check(ch.certify(clf, X, y, given), objective, ridge_optimum(X, Y, weight, omega, fit_intercept=fit_intercept))


def check_torch(seed):
    """A layer after some steps of SGD with weight decay on its weight, alone and as a state dict under a prefix."""
    classes = 1 if seed % 4 == 0 else 2 + seed % 3
    X, y = data(seed, max(classes, 2))
    at = torch.from_numpy(np.searchsorted(np.unique(y), y))
    torch.manual_seed(seed)
    layer = torch.nn.Linear(X.shape[1], classes, bias=bool(seed % 2)).double()
    decay, tokens = 10.0 ** np.random.default_rng(seed).uniform(-4, 0), torch.from_numpy(X)
    groups = [{"params": [layer.weight], "weight_decay": decay}]
    groups += [{"params": [layer.bias], "weight_decay": 0.0}] if layer.bias is not None else []
    steps = torch.optim.SGD(groups, lr=0.05)
    for _ in range(20):
        steps.zero_grad()
        f = layer(tokens)
        entropy = torch.nn.functional.cross_entropy
        loss = (
            torch.nn.functional.binary_cross_entropy_with_logits(f[:, 0], at.double())
            if classes == 1
            else entropy(f, at)
        )
        loss.backward()
        steps.step()
    objective = float(loss.detach())  # before the last step
    W, b = layer.weight.detach().numpy(), 0.0 if layer.bias is None else layer.bias.detach().numpy()
    objective = own_objective(W, b, X, y, decay, np.unique(y))
    fit_intercept = layer.bias is not None
    lowest = (
        optimum(X, y, decay, fit_intercept=fit_intercept)
        if classes != 2
        else softmax_optimum(X, y, decay, fit_intercept=fit_intercept)
    )
    state = {f"module.head.{key}": value for key, value in layer.state_dict().items()}
    for weights in (layer, state):
        check(ch.certify(weights, X, y, beta=decay), objective, lowest)


def softmax_optimum(X, y, weight, *, fit_intercept):
    """Two outputs for two classes, by scipy: scikit-learn has no such program."""
    classes, d = np.unique(y), X.shape[1]

    def value(w):
        return own_objective(w[: 2 * d].reshape(2, d), w[2 * d :] * fit_intercept, X, y, weight, classes)

    found = minimize(value, np.zeros(2 * d + 2), method="BFGS", options={"gtol": 1e-9, "maxiter": 10_000})
    return found.fun


KINDS = {"logistic": check_logistic, "sgd": check_sgd, "ridge": check_ridge, "torch": check_torch}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_lie_below_the_optimum_and_objectives_agree(kind, seed):
    KINDS[kind](seed)


@pytest.mark.table
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_heads_of_each_kind(kind):
    for seed in range(100, 300):
        KINDS[kind](seed)


def test_heads_that_chose_their_weight():
    X, y = data(0, 3)
    for options in ({}, {"use_legacy_attributes": False}):
        try:
            clf = LogisticRegressionCV(Cs=4, cv=3, max_iter=20, **options).fit(X, y)
        except TypeError:  # scikit-learn below 1.8
            continue
        weight = 1 / (len(y) * np.ravel(clf.C_)[0])
        objective = own_objective(clf.coef_, clf.intercept_, X, y, weight, clf.classes_)
        check(ch.certify(clf, X, y), objective, optimum(X, y, weight, fit_intercept=True))
    ridge = RidgeClassifierCV(alphas=(0.1, 1, 10)).fit(X, y)
    weight = ridge.alpha_ / len(y)
    lowest = ridge_optimum(X, signs_of(y, ridge.classes_), weight, fit_intercept=True)
    assert ch.certify(ridge, X, y).primal == pytest.approx(lowest, rel=1e-9)
    grid = GridSearchCV(make_pipeline(StandardScaler(), LogisticRegression()), {"logisticregression__C": [0.1, 1]})
    grid.fit(X, y)
    assert ch.certify(grid, X, y) == ch.certify(grid.best_estimator_, X, y)
    with pytest.raises(ch.InputError, match="beta must be given"):
        ch.certify(LogisticRegressionCV(Cs=3, cv=3, refit=False).fit(X, y), X, y)


@pytest.mark.parametrize("chain", [(StandardScaler(),), (MinMaxScaler(), PCA(3)), (Normalizer(), "passthrough")])
def test_a_pipeline_is_audited_in_the_features_of_its_head(chain):
    X, y = data(1, 3)
    steps = [(str(i), step) for i, step in enumerate(chain)]
    whole = Pipeline([*steps, ("head", LogisticRegression(C=0.5, max_iter=5))]).fit(X, y)
    inner, clf = whole[:-1].transform(X), whole["head"]
    weight = 2 / len(y)
    objective = own_objective(clf.coef_, clf.intercept_, inner, y, weight, clf.classes_)
    check(ch.certify(whole, X, y), objective, optimum(inner, y, weight, fit_intercept=True))
    ours = make_pipeline(StandardScaler(), ch.ConvexHeadClassifier("linear", beta=0.05)).fit(X, y)
    assert ch.certify(ours, X, y).primal == pytest.approx(ours[-1].certificate_.primal, rel=1e-9)


class OnGPU:
    """An array that, like cupy's, refuses to become numpy's in silence."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    def get(self):
        return self.array

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")


def test_an_estimator_of_another_library_is_known_by_its_name_and_attributes():
    X, y = data(2, 3)
    known = LogisticRegression(C=0.2, max_iter=4).fit(X, y)
    Foreign = type("LogisticRegression", (BaseEstimator,), {"fit": lambda self: self})
    foreign = Foreign()
    vars(foreign).update(
        coef_=OnGPU(known.coef_), intercept_=OnGPU(known.intercept_), classes_=known.classes_, C=0.2, penalty="l2",
        fit_intercept=True, class_weight=None,
    )  # fmt: skip
    assert ch.certify(foreign, X, y) == ch.certify(known, X, y)
    foreign.penalty = "elasticnet"
    with pytest.raises(ch.InputError, match="penalty 'elasticnet'"):
        ch.certify(foreign, X, y)


def test_what_is_another_program_is_refused_in_words():
    X, y = data(3, 3)
    two = np.where(y == "cat", "cat", "dog")
    refused = {
        "no penalty": LogisticRegression(C=np.inf).fit(X, y),
        "penalty l1_ratio=0.5|penalty 'elasticnet'": elastic(X, y),
        "penalises the intercept": LogisticRegression(solver="liblinear").fit(X, two),
        "one-vs-rest with class_weight": SGDClassifier(loss="log_loss", class_weight="balanced").fit(X, y),
        "loss 'hinge'": SGDClassifier().fit(X, y),
        "penalty 'l1'": SGDClassifier(loss="log_loss", penalty="l1").fit(X, two),
        "constraint": RidgeClassifier(positive=True).fit(X, y),
        "LinearSVC cannot be audited": LinearSVC().fit(X, y),
        "LinearRegression cannot be audited": LinearRegression().fit(X, np.arange(len(X))),
        "OneVsRestClassifier cannot be audited": OneVsRestClassifier(LogisticRegression()).fit(X, y),
        "Sequential is no plain": torch.nn.Sequential(torch.nn.Linear(6, 3)),
        "beta must be given": torch.nn.Linear(6, 3),
        "it holds 0": {"scale": torch.ones(3)},
        "it holds 2 .'a.', 'b.'": {"a.weight": torch.ones(3, 6), "b.weight": torch.ones(3, 6)},
        "'bn.running_mean'": {"fc.weight": torch.ones(3, 6), "bn.running_mean": torch.ones(6)},
    }
    for words, weights in refused.items():
        with pytest.raises(ch.InputError, match=words):
            ch.certify(weights, X, two if "penalises" in words or "'l1'" in words else y)
    balanced = LogisticRegression(class_weight="balanced").fit(X, y)
    with pytest.raises(ch.InputError, match="class_weight='balanced', which with a sample_weight"):
        ch.certify(balanced, X, y, np.ones(len(y)))
    with pytest.raises(ch.InputError, match="not of the same samples"):
        ch.certify(balanced, X, y[:5])
    with pytest.raises(ch.InputError, match="one label a sample"):
        ch.certify(balanced, X, np.eye(3)[np.arange(len(y)) % 3])
    liblinear = LogisticRegression(solver="liblinear", fit_intercept=False, tol=1e-10).fit(X, two)
    assert ch.certify(liblinear, X, two).converged
    with pytest.raises(NotFittedError, match="not fitted"):
        ch.certify(LogisticRegression(), X, y)
    with pytest.raises(ch.InputError, match="gates, queries and intercept go with factors"):
        ch.certify(liblinear, X, two, intercept=[0.0])
    with pytest.raises(ch.InputError, match="not among the classes"):
        ch.certify(RidgeClassifier().fit(X, two), X, y)
    with pytest.raises(ch.InputError, match="a pipeline reads a table"):
        ch.certify(make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y), X[:, None].repeat(2, 1), y)


def elastic(X, y):
    try:
        return LogisticRegression(l1_ratio=0.5, solver="saga", penalty="elasticnet").fit(X, y)
    except (ValueError, TypeError):
        return LogisticRegression(l1_ratio=0.5, solver="saga").fit(X, y)


def test_files_of_weights(tmp_path):
    from safetensors.torch import save_file

    X, y = data(4, 3)
    clf = LogisticRegression(C=0.3, max_iter=5).fit(X, y)
    expected = ch.certify(clf, X, y)
    own = {"coef_": clf.coef_, "intercept_": clf.intercept_, "classes_": clf.classes_.astype(str)}
    np.savez(tmp_path / "own.npz", **own, C=clf.C)
    np.savez(tmp_path / "plain.npz", coef=clf.coef_, intercept=clf.intercept_)
    state = {"linear.weight": torch.from_numpy(clf.coef_), "linear.bias": torch.from_numpy(clf.intercept_)}
    torch.save(state, tmp_path / "linear_head.pth")
    torch.save({"epoch": 3, "model": state, "optimizer": {"state": {0: torch.ones(2)}}}, tmp_path / "nested.pt")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "head.safetensors")
    assert ch.certify(tmp_path / "own.npz", X, y) == expected
    for name in ("plain.npz", "linear_head.pth", "nested.pt", "head.safetensors"):
        assert ch.certify(str(tmp_path / name), X, y, beta=1 / (0.3 * len(y))) == expected
        with pytest.raises(ch.InputError, match="beta must be given"):
            ch.certify(tmp_path / name, X, y)


def test_files_that_are_refused(tmp_path):
    X, y = data(5, 3)
    torch.save(torch.nn.Linear(6, 3), tmp_path / "code.pth")
    torch.save([torch.ones(3, 6)], tmp_path / "list.pth")
    np.savez(tmp_path / "objects.npz", coef_=np.array([SimpleNamespace()], object))
    np.savez(tmp_path / "scaled.npz", coef_=np.ones((3, 6)), scale_=np.ones(6))
    np.savez(tmp_path / "turned.npz", coef_=np.ones((6, 3)), intercept_=np.ones(3))
    np.savez(tmp_path / "twice.npz", coef_=np.ones((3, 6)), weight=np.ones((3, 6)))
    np.savez(tmp_path / "named.npz", coef_=np.ones((3, 6)), classes_=["cat", "dog"])
    (tmp_path / "head.joblib").write_bytes(b"\x80")
    (tmp_path / "head.h5").write_bytes(b"")
    for kind in ("npz", "pth", "safetensors"):
        (tmp_path / f"broken.{kind}").write_bytes(b"nothing of the kind")
    words = {
        "code.pth": "may run code", "list.pth": "no state dict", "objects.npz": "save plain ones",
        "scaled.npz": "scale_", "turned.npz": "a row for each output", "twice.npz": "each once",
        "named.npz": "3 rows of weights, but classes of shape", "head.joblib": "is a pickle",
        "head.h5": "no file of weights", "none.pth": "there is no file",
        "broken.npz": "broken.npz", "broken.pth": "not a file of torch.save",
        "broken.safetensors": "not a safetensors file",
    }  # fmt: skip
    for name, told in words.items():
        with pytest.raises((ch.InputError, ch.FileFormatError), match=told) as caught:
            ch.certify(tmp_path / name, X, y, beta=0.1)
        assert "\n" not in str(caught.value)


def test_a_layer_with_several_labels():
    X, y = data(7, 3)
    Y = np.stack([y == "cat", X[:, 0] > 0], 1).astype(float)
    rng = np.random.default_rng(0)
    layer = torch.nn.Linear(X.shape[1], 2).double()
    W, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    omega = rng.random(len(y))
    certificate = ch.certify(layer, X, Y, omega, beta=0.02, loss="binary-cross-entropy")
    ones = [np.where(Y[:, k] == 1, "this", "rest") for k in range(2)]
    pair = np.array(["rest", "this"])
    objective = sum(own_objective(W[k], b[k], X, ones[k], 0.02, pair, omega) for k in range(2))
    check(certificate, objective, sum(optimum(X, one, 0.02, omega, fit_intercept=True) for one in ones))


def test_two_statements_are_told_apart():
    X, y = data(6, 3)
    clf = LogisticRegression(C=100, max_iter=6).fit(X, y)
    found = audit(clf, X, y)
    least, most = found.distance
    assert least <= most < found.proven.relative_gap
    assert found.proven == ch.certify(clf, X, y)
    assert found.certificate.dual > found.proven.dual
    alone = audit(clf, X, y, find_optimum=False)
    assert alone.distance is None
    assert alone.certificate == alone.proven == found.proven
    ours = ch.ConvexHeadClassifier("linear", beta=found.beta, fit_intercept=True, tol=1e-6).fit(X, y)
    given = audit(clf, X, y, reference=ours.certificate_)
    assert given.certificate.dual >= found.certificate.dual
    assert audit(ours, X, y).reference is None  # it is certified already
