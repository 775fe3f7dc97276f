"""Cross-validation of β against fits in a loop by hand, and scikit-learn's conventions."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss
from sklearn.model_selection import GroupKFold, KFold, PredefinedSplit, StratifiedKFold

import convexhead as ch
from convexhead import cross_validation
from convexhead.cross_validation import Choice, grid_of
from convexhead.errors import ConvexHeadError
from convexhead.fitting import Task
from convexhead.runtime.run_folder import RunFolder

RNG = np.random.default_rng(0)
N = 90
Y = np.arange(N) % 3
X = RNG.normal(size=(N, 4, 3))
X[:, :, 0] += 0.4 * (Y[:, None] - 1)
Z = X[:, :, 0].mean(1) + 0.3 * RNG.normal(size=N)
NAMES = np.array(["ant", "bee", "cat"])[Y]
RATIOS = [0.6, 0.3, 0.1, 0.02]
TIGHT = 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "activation"), [("mlp", "linear"), ("self-attention", "linear"), ("mlp", "gated-relu")]
)
def test_scores_and_choice_are_those_of_fits_by_hand(head, activation):
    settings = {"activation": activation, "n_gates": 6, "tol": TIGHT, "random_state": 0, "fit_intercept": True}
    cv = StratifiedKFold(3, shuffle=True, random_state=1)
    clf = ch.ConvexHeadClassifierCV(head, beta_ratios=RATIOS, cv=cv, scoring="neg_log_loss", **settings).fit(X, NAMES)
    by_hand = [
        [
            -log_loss(NAMES[test], fit_by_hand(head, r, settings, clf.gates_, train).predict_proba(X[test]))
            for r in clf.beta_ratios_
        ]
        for train, test in cv.split(X, Y)
    ]
    np.testing.assert_allclose(clf.scores_, by_hand, atol=1e-3)
    assert clf.beta_ratio_ == clf.beta_ratios_[np.mean(by_hand, axis=0).argmax()]
    assert 0.02 < clf.beta_ratio_ < 0.6  # chosen inside the grid, not at its edge
    plain = ch.ConvexHeadClassifier(head, beta_ratio=clf.beta_ratio_, **settings).fit(X, NAMES)
    assert clf.certificate_.converged
    assert clf.certificate_.identity == plain.certificate_.identity
    assert clf.beta_ == plain.beta_ == clf.beta_ratio_ * clf.beta_max_
    np.testing.assert_array_equal(clf.predict_proba(X), plain.predict_proba(X))
    assert clf.score(X, NAMES) == pytest.approx(-log_loss(NAMES, plain.predict_proba(X)))


def fit_by_hand(head, ratio, settings, gates, train):
    return ch.ConvexHeadClassifier(head, beta_ratio=ratio, gates=gates, **settings).fit(X[train], NAMES[train])


def test_a_regressor_against_fits_by_hand():
    reg = ch.ConvexHeadRegressorCV("mlp", beta_ratios=[0.5, 0.1, 0.01], cv=4, tol=TIGHT).fit(X, Z)
    by_hand = [
        [
            ch.ConvexHeadRegressor("mlp", beta_ratio=r, tol=TIGHT).fit(X[train], Z[train]).score(X[test], Z[test])
            for r in reg.beta_ratios_
        ]
        for train, test in KFold(4).split(X)
    ]
    np.testing.assert_allclose(reg.scores_, by_hand, atol=1e-3)
    assert reg.beta_ratio_ == reg.beta_ratios_[np.mean(by_hand, axis=0).argmax()]
    assert reg.certificate_.converged


# -- the grid ----------------------------------------------------------------------------------------------------------
def test_the_default_grid():
    grid = grid_of(None)
    assert len(grid) == 12
    assert grid[0] == pytest.approx(0.5)
    assert grid[-1] == pytest.approx(0.002)
    np.testing.assert_allclose(np.diff(np.log(grid)), np.log(0.002 / 0.5) / 11)
    assert len(grid_of(5)) == 5
    assert grid_of((0.1, 0.5, 0.1)) == [0.5, 0.1]


def fake_scores(monkeypatch, score):
    """Folds whose scores are a function of the ratio, without fits."""
    monkeypatch.setattr(cross_validation._Fold, "scores", lambda self, ratios: [score(ratio) for ratio in ratios])


@pytest.mark.parametrize(
    ("peak", "expected", "chosen"),
    [
        (0.2, [0.4, 0.2, 0.1], 0.2),
        (0.05, [0.4, 0.2, 0.1, 0.05, 0.025], 0.05),
        (0.01, [0.4, 0.2, 0.1, 0.05, 0.025, 0.0125, 0.00625], 0.0125),
        (0.7, [1.0, 0.8, 0.4, 0.2, 0.1], 0.8),
        (5.0, [1.0, 0.8, 0.4, 0.2, 0.1], 1.0),
    ],
)
def test_the_grid_goes_on_where_the_best_is_at_its_edge(monkeypatch, peak, expected, chosen):
    fake_scores(monkeypatch, lambda ratio: -abs(np.log(ratio / peak)))
    clf = ch.ConvexHeadClassifierCV("mlp", beta_ratios=[0.1, 0.2, 0.4], cv=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if chosen < 1:
            clf.fit(X, Y)
    if chosen == 1:
        with pytest.warns(UserWarning, match="no head beats a constant"):
            clf.fit(X, Y)
    np.testing.assert_allclose(clf.beta_ratios_, expected)
    assert clf.beta_ratio_ == pytest.approx(chosen)
    assert clf.scores_.shape == (3, len(expected))
    np.testing.assert_allclose(clf.scores_[0], -np.abs(np.log(clf.beta_ratios_ / peak)))


def test_a_plateau_is_no_reason_to_go_on(monkeypatch):
    fake_scores(monkeypatch, lambda ratio: 0.9 if ratio > 0.1 else 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clf = ch.ConvexHeadClassifierCV("linear", beta_ratios=[0.4, 0.2, 0.05], cv=3).fit(X, Y)
    assert clf.beta_ratios_.tolist() == [0.4, 0.2, 0.05]
    assert clf.beta_ratio_ == 0.4


def test_a_linear_head_is_never_zero(monkeypatch):
    fake_scores(monkeypatch, lambda ratio: -abs(np.log(ratio / 5)))
    clf = ch.ConvexHeadClassifierCV("linear", beta_ratios=[0.5, 1.0], cv=3).fit(X, Y)
    np.testing.assert_allclose(clf.beta_ratios_, [16, 8, 4, 2, 1, 0.5])
    assert clf.beta_ratio_ == 4
    assert np.abs(clf.coef_).max() > 0


def test_it_says_when_it_gave_up(monkeypatch):
    fake_scores(monkeypatch, lambda ratio: -ratio)
    clf = ch.ConvexHeadClassifierCV("linear", beta_ratios=[0.8, 0.4], cv=2, refit=False)
    with pytest.warns(UserWarning, match=r"0\.00625, is the smallest of the grid.*went on 3 times.*reach further"):
        clf.fit(X, Y)
    assert len(clf.beta_ratios_) == 2 + 3 * 2


def test_one_value_is_fixed():
    clf = ch.ConvexHeadClassifierCV("linear", beta_ratios=[0.05], cv=2).fit(X, Y)
    assert clf.beta_ratios_.tolist() == [0.05]
    assert clf.beta_ratio_ == 0.05


def test_a_grid_that_goes_on_has_the_scores_of_one_that_began_there():
    cv, settings = 3, {"tol": TIGHT, "scoring": "neg_log_loss"}
    short = ch.ConvexHeadClassifierCV("mlp", beta_ratios=[0.8, 0.6], cv=cv, **settings).fit(X, Y)
    assert len(short.beta_ratios_) > 2
    long = ch.ConvexHeadClassifierCV("mlp", beta_ratios=short.beta_ratios_, cv=cv, **settings).fit(X, Y)
    np.testing.assert_allclose(short.scores_, long.scores_, atol=1e-4)
    assert short.beta_ratio_ == long.beta_ratio_


def test_ties_go_to_the_larger_weight():
    assert Choice([0.5, 0.2, 0.1], np.array([[0.1, 0.7, 0.8], [0.4, 0.9, 0.8]]), 3).chosen == 0.2
    # 0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in their last bit
    assert Choice([0.5, 0.2], np.array([[0.3, 0.1], [0.2, 0.2], [0.1, 0.3]]), 3).chosen == 0.5
    assert Choice([0.5, 0.2], np.array([[0.3, 0.1], [0.2, 0.2], [0.1, 0.3]])[::-1], 3).chosen == 0.5


# -- folds -------------------------------------------------------------------------------------------------------------
def test_splits_as_scikit_learn_has_them():
    test = np.arange(N) % 4 == 0
    one = ch.ConvexHeadClassifierCV("linear", beta_ratios=[0.1, 0.05], cv=PredefinedSplit(np.where(test, 0, -1)))
    pairs = clone(one).set_params(cv=[(np.flatnonzero(~test), np.flatnonzero(test))])
    masks = clone(one).set_params(cv=[(~test, test)])
    one.fit(X, Y)
    for other in (pairs.fit(X, Y), masks.fit(X, Y)):
        np.testing.assert_array_equal(one.scores_, other.scores_)
        assert len(other.scores_) == 1
    groups = np.arange(N) // 18
    grouped = clone(one).set_params(cv=GroupKFold(5)).fit(X, Y, groups=groups)
    by_hand = clone(one).set_params(cv=list(GroupKFold(5).split(X, Y, groups))).fit(X, Y)
    np.testing.assert_array_equal(grouped.scores_, by_hand.scores_)
    assert grouped.scores_.shape[0] == 5


def test_only_held_out_samples_are_scored():
    seen = []

    def scoring(estimator, X, y):
        seen.append((X, y))
        return estimator.score(X, y)

    cv = [(np.arange(0, 45), np.arange(50, 70)), (np.arange(45, N), np.arange(20))]
    ch.ConvexHeadClassifierCV("linear", beta_ratios=[0.1], cv=cv, scoring=scoring, refit=False).fit(X, NAMES)
    for (_, test), (tokens, labels) in zip(cv, seen, strict=True):
        np.testing.assert_array_equal(tokens, X[test])
        np.testing.assert_array_equal(labels, NAMES[test])


def test_a_class_that_a_fold_does_not_train_on():
    cv = [(np.flatnonzero(Y < 2), np.flatnonzero(Y == 2)), (np.flatnonzero(Y > 0)[::2], np.flatnonzero(Y == 0))]
    settings = {"beta_ratios": [0.1], "cv": cv, "fit_intercept": True, "refit": False}
    clf = ch.ConvexHeadClassifierCV("linear", scoring="neg_log_loss", **settings).fit(X, NAMES)
    assert np.isfinite(clf.scores_).all()
    assert (clf.scores_ < -np.log(3)).all()  # worse than knowing nothing
    assert (ch.ConvexHeadClassifierCV("linear", **settings).fit(X, NAMES).scores_ == 0).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the best β")
@pytest.mark.parametrize("make", [ch.ConvexHeadClassifierCV, ch.ConvexHeadRegressorCV])
def test_weights_are_repetitions_in_fits_and_scores(make):
    w = RNG.integers(0, 3, N)
    y = Y if make is ch.ConvexHeadClassifierCV else Z
    scoring = "neg_log_loss" if make is ch.ConvexHeadClassifierCV else "neg_mean_squared_error"
    fold, repeated = np.arange(N) // 3 % 3, np.repeat(np.arange(N), w)
    settings = {"beta_ratios": [0.3, 0.1, 0.02], "scoring": scoring, "tol": 1e-8}
    weighted = make("mlp", cv=PredefinedSplit(fold), **settings).fit(X, y, w)
    plain = make("mlp", cv=PredefinedSplit(fold[repeated]), **settings).fit(X[repeated], y[repeated])
    np.testing.assert_allclose(weighted.scores_, plain.scores_, atol=1e-4)
    assert weighted.beta_ == pytest.approx(plain.beta_, rel=1e-6)
    np.testing.assert_allclose(weighted.predict(X[:5]), plain.predict(X[:5]), atol=1e-3)
    unweighted = make("mlp", cv=PredefinedSplit(fold), **settings).fit(X, y)
    assert np.abs(unweighted.scores_[:, -3:] - weighted.scores_[:, -3:]).max() > 1e-3


# -- what it takes -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["memmap", "tensor", "table", "frame", "list"])
def test_whatever_fit_takes(kind, tmp_path):
    flat = X[:, 0]
    if kind == "memmap":
        given = np.memmap(tmp_path / "X", np.float64, "w+", shape=X.shape)
        given[:] = X
    elif kind == "tensor":
        given = pytest.importorskip("torch").from_numpy(X)
    else:
        given = flat.tolist() if kind == "list" else flat
    if kind == "frame":
        given = pytest.importorskip("pandas").DataFrame(flat, columns=list("abc"))
    reference = X if kind in ("memmap", "tensor") else flat
    expected = ch.ConvexHeadClassifierCV("mlp", beta_ratios=[0.3, 0.1], cv=2).fit(reference, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clf = ch.ConvexHeadClassifierCV("mlp", beta_ratios=[0.3, 0.1], cv=2).fit(given, Y.tolist())
    np.testing.assert_allclose(clf.scores_, expected.scores_)
    np.testing.assert_allclose(clf.predict_proba(given), expected.predict_proba(reference), atol=1e-6)
    assert hasattr(clf, "feature_names_in_") == (kind == "frame")
    assert clf.n_features_in_ == 3


@pytest.mark.slow
def test_a_store_is_read_in_parts(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    from convexhead.tokens import SplitView, extract

    store = extract("sklearn:digits", "patches:4", tmp_path / "tokens", dtype="float32")
    tokens, labels = store["train"].read()[:300], store["train"].labels[:300]
    part = store["train"].subset(np.arange(300))
    settings = {"beta_ratios": [0.2, 0.05], "cv": 3, "tol": 1e-4}
    expected = ch.ConvexHeadClassifierCV("linear", **settings).fit(tokens, labels)

    def refuse(self):
        raise AssertionError("the whole split was read at once")

    monkeypatch.setattr(SplitView, "read", refuse)
    clf = ch.ConvexHeadClassifierCV("linear", **settings).fit(part)
    np.testing.assert_allclose(clf.scores_, expected.scores_, atol=1e-9)
    assert clf.beta_ratio_ == expected.beta_ratio_
    assert clf.class_names_ == store.class_names
    np.testing.assert_array_equal(clf.origin_.rows, np.arange(300))
    scored = ch.ConvexHeadClassifierCV("linear", scoring="neg_log_loss", **settings).fit(part)
    assert scored.score(part) == pytest.approx(-log_loss(labels, scored.predict_proba(part)))
    clf.save(tmp_path / "run")
    np.testing.assert_array_equal(ch.load(tmp_path / "run").predict(store["test"]), clf.predict(store["test"]))


def test_labels_of_several_kinds():
    several = np.stack([Y == 0, Y > 0], 1).astype(int)
    clf = ch.ConvexHeadClassifierCV("linear", loss="binary-cross-entropy", beta_ratios=[0.1, 0.03], cv=3)
    clf.fit(X, several)
    plain = ch.ConvexHeadClassifier("linear", loss="binary-cross-entropy", beta_ratio=clf.beta_ratio_).fit(X, several)
    np.testing.assert_array_equal(clf.predict(X), plain.predict(X))
    soft = np.eye(3)[Y] * 0.7 + 0.1
    assert ch.ConvexHeadClassifierCV("linear", beta_ratios=[0.1], cv=3).fit(X, soft).scores_.shape == (3, 1)
    of_tokens = np.repeat(Y[:, None], 4, 1)
    clf = ch.ConvexHeadClassifierCV("linear", pool=None, beta_ratios=[0.1], cv=3).fit(X, of_tokens)
    assert clf.predict(X).shape == (N, 4)


@pytest.mark.parametrize("pool", ["mean", None])
def test_samples_of_different_length(pool):
    lengths = RNG.integers(2, 5, N)
    ragged = [each[:length] for each, length in zip(X, lengths, strict=True)]
    mask = np.arange(4) < lengths[:, None]
    labels = Y if pool else [np.full(length, label) for label, length in zip(Y, lengths, strict=True)]
    padded = Y if pool else np.where(mask, Y[:, None], -1)
    settings = {"pool": pool, "beta_ratios": [0.1, 0.05], "cv": KFold(3)}
    clf = ch.ConvexHeadClassifierCV("mlp", **settings).fit(ragged, labels)
    masked = ch.ConvexHeadClassifierCV("mlp", **settings).fit(X, padded, mask=mask)
    np.testing.assert_array_equal(clf.scores_, masked.scores_)
    assert clf.score(ragged, labels) == masked.score(X, padded, mask=mask)
    train, test = [ids.tolist() for ids in next(KFold(3).split(X))]
    plain = ch.ConvexHeadClassifier("mlp", pool=pool, beta_ratio=clf.beta_ratios_[0])
    plain.fit([ragged[i] for i in train], [labels[i] for i in train])
    expected = plain.score([ragged[i] for i in test], [labels[i] for i in test])
    assert clf.scores_[0, 0] == pytest.approx(expected, abs=0.04)


# -- an estimator of scikit-learn --------------------------------------------------------------------------------------
def test_clones_and_pickles():
    clf = ch.ConvexHeadClassifierCV("fno", beta_ratios=3, cv=KFold(2), scoring="neg_log_loss", grid=(2, 2))
    copy = clone(clf)
    assert copy.get_params().keys() == clf.get_params().keys()
    assert (copy.beta_ratios, copy.scoring, copy.grid) == (3, "neg_log_loss", (2, 2))
    fitted = ch.ConvexHeadClassifierCV("mlp", beta_ratios=[0.3, 0.1], cv=2).fit(X, Y)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict_proba(X), fitted.predict_proba(X))
    np.testing.assert_array_equal(again.scores_, fitted.scores_)
    assert again.beta_ratio_ == fitted.beta_ratio_


def test_without_a_refit_there_is_no_head():
    clf = ch.ConvexHeadClassifierCV("mlp", beta_ratios=[0.3, 0.1], cv=2).fit(X, Y)
    chosen = clf.beta_ratio_
    clf.set_params(refit=False).fit(X, Y)
    assert clf.beta_ratio_ == chosen
    assert not hasattr(clf, "certificate_")
    with pytest.raises(NotFittedError, match="refit=False"):
        clf.predict(X)


def test_random_gates_are_the_same_in_all_fits_without_a_seed(monkeypatch):
    posed = []
    pose = cross_validation.pose

    def watched(*args, **kwargs):
        task = pose(*args, **kwargs)
        posed.append(task.problem.activation.gates.numpy())
        return task

    monkeypatch.setattr(cross_validation, "pose", watched)
    clf = ch.ConvexHeadClassifierCV("mlp", activation="gated-relu", n_gates=4, beta_ratios=[0.3], cv=3).fit(X, Y)
    assert len(posed) == 1 + 3
    for gates in posed:
        np.testing.assert_array_equal(gates, clf.gates_)


WRONG = {
    "one value": ({"beta_ratios": 1}, "at least 2 values"),
    "a negative ratio": ({"beta_ratios": [0.1, -1]}, "positive numbers"),
    "no ratio": ({"beta_ratios": []}, "positive numbers"),
    "text": ({"beta_ratios": "0.1,0.2"}, "positive numbers"),
    "names": ({"beta_ratios": ["a", "b"]}, "could not convert"),
    "a flag": ({"beta_ratios": True}, "positive numbers"),
    "one fold": ({"cv": 1}, "n_splits"),
    "too many folds": ({"cv": 31}, "n_splits=31"),
    "an unknown splitter": ({"cv": "five"}, "cross-validation object"),
    "one split that is not in a list": ({"cv": (np.arange(40), np.arange(40, N))}, r"\[\(train, test\)\]"),
    "no split": ({"cv": []}, "no split"),
    "an empty part": ({"cv": [(np.arange(40), [])]}, "test part of split 1"),
    "samples that are not there": ({"cv": [(np.arange(40), [N])]}, "below 90"),
    "floats": ({"cv": [(np.arange(40.0), [50])]}, "train part of split 1"),
    "a sample in both parts": ({"cv": [(np.arange(40), np.arange(39, N))]}, "both parts, such as 39"),
    "an unknown score": ({"scoring": "acuracy"}, "unknown scoring 'acuracy'"),
    "two scores": ({"scoring": ["accuracy", "neg_log_loss"]}, "one score"),
    "a score of regressions": ({"scoring": "neg_max_error", "cv": 2}, "fold 1 of 2"),
    "a score that is not finite": ({"scoring": lambda estimator, X, y: np.nan, "cv": 2}, "fold 1 of 2.*score.*nan"),
    "refit": ({"refit": "yes"}, "refit must be True or False"),
    "a head": ({"head": "hed"}, "unknown head 'hed'"),
    "a fold of one sample": ({"cv": [([0], [1, 2])], "scoring": "roc_auc"}, "fold 1 of 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_told_in_words(name):
    settings, words = WRONG[name]
    clf = ch.ConvexHeadClassifierCV(**{"head": "linear", "beta_ratios": [0.1, 0.05], **settings})
    labels = NAMES if name == "a score of regressions" else Y
    with pytest.raises(ch.InputError, match=words):
        clf.fit(X, labels)
    assert not hasattr(clf, "beta_ratio_")


def test_mistakes_of_regressors():
    reg = ch.ConvexHeadRegressorCV("linear", beta_ratios=[0.1], cv=N)
    with pytest.warns(UserWarning, match="R"), pytest.raises(ch.InputError, match=r"fold 1 of 90.*larger folds"):
        reg.fit(X, Z)
    with pytest.raises(ch.InputError, match="not for ConvexHeadRegressor"):
        reg.set_params(scoring="neg_log_loss", cv=2).fit(X, Z)
    with pytest.raises(ch.InputError, match="requires y"):
        reg.fit(X)


@pytest.fixture
def solved(monkeypatch):
    """The ratios of the fits on folds that are made; ``stop`` raises KeyboardInterrupt before the next one."""

    class Solved(list):
        stop = None

    made, approach = Solved(), Task.approach

    def counted(self, *args, **kwargs):
        if len(made) == made.stop:
            raise KeyboardInterrupt
        made.append(self.spec.beta_ratio)
        return approach(self, *args, **kwargs)

    monkeypatch.setattr(Task, "approach", counted)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_stopped_choice_goes_on_to_the_same_scores(solved, tmp_path, stop):
    """The grid goes on to smaller β here; the stop lies in the first fold, in the third one, and behind the grid."""
    clf = ch.ConvexHeadClassifierCV(
        "mlp", activation="gated-relu", beta_ratios=[0.9, 0.8], cv=3, n_gates=4, random_state=0
    )
    whole = clone(clf).fit(X, Y)
    every, kept = list(solved), tmp_path / "kept"
    assert len(every) > 6
    solved.clear()
    solved.stop = stop
    with pytest.raises(KeyboardInterrupt):
        clone(clf).fit(X, Y, checkpoint=kept)
    assert list((kept / "pieces").glob("fold-*.json"))
    assert RunFolder(kept).seconds() > 0
    solved.clear()
    solved.stop = None
    again = clone(clf).fit(X, Y, checkpoint=kept)
    assert list(solved) == every[stop:]
    np.testing.assert_array_equal(again.scores_, whole.scores_)
    assert (again.beta_ratio_, again.certificate_.primal) == (whole.beta_ratio_, whole.certificate_.primal)
    # Weights are kept of the last fit of each fold alone.
    assert len(list((kept / "pieces").glob("*.safetensors"))) == 3
    solved.clear()
    clone(clf).fit(X, Y, checkpoint=kept)
    assert not solved


@pytest.mark.slow
def test_kept_fits_are_of_the_same_choice_alone(solved, tmp_path):
    clf = ch.ConvexHeadClassifierCV("linear", beta_ratios=[0.4, 0.2], cv=2, random_state=0, refit=False)
    kept = tmp_path / "kept"
    first = clone(clf).fit(X, Y, checkpoint=kept)
    for other, tokens, labels, weight in (
        (clone(clf).set_params(tol=1e-4), X, Y, None),
        (clone(clf).set_params(cv=KFold(2, shuffle=True, random_state=0)), X, Y, None),
        (clone(clf).set_params(scoring="balanced_accuracy"), X, Y, None),
        (clf, 2 * X, Y, None),
        (clf, X, np.roll(Y, 1), None),
        (clf, X, Y, np.arange(1.0, N + 1)),
    ):
        solved.clear()
        anew = clone(other).fit(tokens, labels, weight, checkpoint=kept)
        assert len(solved) >= 4
        np.testing.assert_array_equal(anew.scores_, clone(other).fit(tokens, labels, weight).scores_)
    np.testing.assert_array_equal(clone(clf).fit(X, Y, checkpoint=kept).scores_, first.scores_)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConvexHeadError, match=r"holds 'notes\.txt' but no run"):
        clone(clf).fit(X, Y, checkpoint=tmp_path / "other")
