"""Groups stay together: in folds, in held-out parts, in smaller budgets, in Python and from the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.model_selection import GroupKFold, KFold, LeaveOneGroupOut, StratifiedGroupKFold

import convexhead as ch
from command import call
from convexhead import runs
from convexhead.errors import InputError
from convexhead.experiments.probe_baselines import Baselines
from convexhead.experiments.probe_data import Budget
from convexhead.experiments.probe_tasks import TASKS
from convexhead.folds import check_groups, grouped_folds, hold_out_groups
from convexhead.group_table import read_groups
from convexhead.tokens import import_arrays

N = 60
RNG = np.random.default_rng(0)
GROUPS = np.repeat(np.arange(12), 5)
DRIVES = np.array([f"drive {g}" for g in GROUPS])
Y = np.arange(N) % 3
X = RNG.normal(size=(N, 4, 3)).astype(np.float32)
X[:, :, 0] += Y[:, None] + RNG.normal(size=12)[GROUPS][:, None]
SETTINGS = {"beta_ratios": [0.3, 0.1], "refit": False, "random_state": 0}


def apart(splits, groups=GROUPS):
    return all(not set(groups[train]) & set(groups[test]) for train, test in splits)


# -- folds -------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_number_of_folds_keeps_groups_together_as_scikit_learn_does():
    stratified = list(StratifiedGroupKFold(4).split(X, Y, DRIVES))
    clf = ch.ConvexHeadClassifierCV("mlp", cv=4, **SETTINGS)
    by_hand = ch.ConvexHeadClassifierCV("mlp", cv=stratified, **SETTINGS).fit(X, Y)
    np.testing.assert_array_equal(clf.fit(X, Y, groups=DRIVES).scores_, by_hand.scores_)
    reg = ch.ConvexHeadRegressorCV("mlp", cv=4, **SETTINGS).fit(X, X.mean((1, 2)), groups=GROUPS)
    by_hand = ch.ConvexHeadRegressorCV("mlp", cv=list(GroupKFold(4).split(X, None, GROUPS)), **SETTINGS)
    np.testing.assert_array_equal(reg.scores_, by_hand.fit(X, X.mean((1, 2))).scores_)
    each = ch.ConvexHeadClassifierCV("linear", cv=LeaveOneGroupOut(), **SETTINGS).fit(X, Y, groups=DRIVES)
    assert len(each.scores_) == 12


def test_folds_of_any_groups_are_whole_and_none_is_empty():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        count, cv = rng.integers(2, 6), rng.integers(2, 5)
        groups = check_groups(rng.integers(0, count, N), N)
        labels = rng.integers(0, 1 + rng.integers(1, 4), N)
        if rng.random() < 0.5:
            labels = groups % 3
        if groups.max() + 1 < cv:
            with pytest.raises(InputError, match="folds of whole groups"):
                grouped_folds(cv, labels, groups)
            continue
        folds = grouped_folds(cv, labels, groups)
        assert len(folds) == cv
        assert apart(folds, groups)
        assert sorted(np.concatenate([test for _, test in folds])) == list(range(N))
        assert all(len(test) for _, test in folds)


@pytest.mark.parametrize(
    ("cv", "groups", "message"),
    [
        (KFold(4, shuffle=True, random_state=0), GROUPS, "a group in both parts"),
        ([(np.arange(0, N, 2), np.arange(1, N, 2))], GROUPS, "a group in both parts"),
        (5, np.zeros(N), "5 groups, and there are 1"),
        (13, GROUPS, "13 groups, and there are 12"),
        (3, GROUPS[:-1], r"each of the 60 samples, got \(59,\)"),
        (3, GROUPS[:, None], r"got \(60, 1\)"),
        (3, np.where(np.arange(N) == 3, np.nan, GROUPS), "lack some"),
        (3, [None, *DRIVES[1:]], "lack some"),
        (3, np.array([1, *DRIVES[1:]], object), "mix several types"),
    ],
)
@pytest.mark.filterwarnings("ignore:The groups parameter is ignored")
def test_groups_that_cannot_be_used_are_refused(cv, groups, message):
    with pytest.raises(InputError, match=message):
        ch.ConvexHeadClassifierCV("linear", cv=cv, **SETTINGS).fit(X, Y, groups=groups)


def test_a_class_that_is_in_one_group_alone():
    labels = np.where(GROUPS == 0, 2, Y % 2)  # where group 0 is held out, nothing of class 2 is trained on
    clf = ch.ConvexHeadClassifierCV("mlp", cv=3, fit_intercept=True, **SETTINGS).fit(X, labels, groups=GROUPS)
    assert np.isfinite(clf.scores_).all()
    for seed in range(20):
        kept, held = hold_out_groups(labels, GROUPS, 0.2, seed)
        assert apart([(kept, held)])
        assert set(labels[kept]) == {0, 1, 2}
        assert sorted([*kept, *held]) == list(range(N))
        assert len(set(GROUPS[held])) == 3
    with pytest.raises(InputError, match="a class should be in several groups"):
        hold_out_groups(GROUPS, GROUPS, 0.2, 0)
    with pytest.raises(InputError, match="two or more"):
        hold_out_groups(None, np.zeros(N, int), 0.2, 0)


def test_a_class_that_a_baseline_did_not_see_is_never_right():
    class Data:
        task = TASKS["classes"]

    score = Baselines(Data(), [], None, 0)._score
    p = np.array([[0.1, 0.9], [0.9, 0.1]])
    assert score(p, np.array(["a", "c"]), np.array(["b", "a"])) == 0.5


# -- smaller budgets ---------------------------------------------------------------------------------------------------
def test_smaller_budgets_take_group_after_group():
    for draw in range(5):
        before = set()
        for share in (0.1, 0.3, 0.5):
            rows = Budget(fraction=share, draw=draw).rows(None, N, 0, GROUPS)
            assert len(rows) == round(share * N)
            assert before <= set(rows)
            counts = np.bincount(GROUPS[rows], minlength=12)
            assert (counts % 5 != 0).sum() <= 1  # one group at most is not whole
            before = set(rows)
        rows = Budget(shots=2, draw=draw).rows(Y, N, 0, GROUPS)
        np.testing.assert_array_equal(np.bincount(Y[rows]), [2, 2, 2])
        assert len(set(GROUPS[rows])) <= 3  # five images in a row hold at least one of each class
    shots = [frozenset(Budget(shots=2, draw=draw).rows(Y, N, 0, GROUPS)) for draw in range(5)]
    assert len(set(shots)) > 1


# -- tables and the command line ---------------------------------------------------------------------------------------
@pytest.fixture
def store(tmp_path):
    names = [f"{i:03d}.png" for i in range(N)]
    import_arrays({"train": (X, Y, names)}, tmp_path / "store", class_token=False)
    lines = [f"{name},{drive}" for name, drive in zip(names, DRIVES, strict=True)]
    (tmp_path / "groups.csv").write_text("\n".join(["image,group", *lines[::-1]]))
    return tmp_path / "store"


def test_tables_are_read_by_name(store, tmp_path):
    view = ch.TokenStore.open(store)["train"]
    np.testing.assert_array_equal(read_groups(tmp_path / "groups.csv", view), DRIVES)
    for text, message in (
        ("image,group\n000.png,a", r"no row for the image '001\.png' .* one of 59"),
        ("image,drive\n000.png,a", "group"),
        ("image,group\n000.png,a\n000.png,b", r"'000\.png' in two groups, 'a' and 'b'"),
        ("image,group\n000.png,", "fill the cell in"),
    ):
        (tmp_path / "odd.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            read_groups(tmp_path / "odd.csv", view)


def test_fit_and_path_keep_groups_together(store, tmp_path, capsys):
    table = tmp_path / "groups.csv"
    clf = runs.fit(store, tmp_path / "run", head="mlp", cv=4, groups=table, beta_ratios=[0.3, 0.1])
    by_hand = ch.ConvexHeadClassifierCV("mlp", cv=4, **SETTINGS).fit(ch.TokenStore.open(store)["train"], groups=DRIVES)
    np.testing.assert_array_equal(clf.scores_, by_hand.scores_)
    found = runs.path(store, head="mlp", beta_ratios=[0.3], groups=table, validation=0.25)
    assert (found.n_train, found.n_held_out) == (45, 15)
    assert call("fit", store, "--head", "linear", "--groups", table, "--out", tmp_path / "no") == 1
    assert "leave groups out, or give cv" in capsys.readouterr().err


@pytest.mark.slow
def test_a_probe_keeps_groups_together(store, tmp_path, capsys):
    arguments = ("probe", store, "--heads", "linear", "--baselines", "k-nn", "--beta-ratios", "0.3,0.1", "--json")
    assert call(*arguments, "--out", tmp_path / "alone") == 0
    assert call(*arguments, "--groups", tmp_path / "groups.csv", "--out", tmp_path / "grouped") == 0
    told = json.loads((tmp_path / "grouped/table.json").read_text())
    assert told["dataset"]["test_is"].startswith("20% of the groups")
    assert told["dataset"]["groups"] == 9
    assert told["dataset"]["test_groups"] == 3
    page = (tmp_path / "grouped/index.html").read_text()
    assert "<dd>9</dd>" in page
    assert "draws of the 3 groups of test images with replacement" in page
    assert "exchanged for random groups" in page
    assert "McNemar" not in page
    alone = (tmp_path / "alone/index.html").read_text()
    assert "of top-1: Wilson" in alone
    assert "McNemar" in alone
    row = next(row for row in told["rows"] if row["method"] == "linear")
    model = ch.load(tmp_path / "grouped" / row["run"])
    train = model.origin_.rows
    assert apart([(train, np.setdiff1d(np.arange(N), train))])
    view = ch.TokenStore.open(store)["train"].subset(train)
    folds = list(StratifiedGroupKFold(3).split(train, Y[train], DRIVES[train]))
    by_hand = ch.ConvexHeadClassifierCV("linear", cv=folds, beta_ratios=[0.3, 0.1]).fit(view)
    assert row["cv_score"] == pytest.approx(by_hand.scores_.mean(0).max(), abs=0.03)  # another standardisation


@pytest.mark.slow
def test_a_group_in_train_and_test_is_refused(tmp_path, capsys):
    names = [f"{i:03d}.png" for i in range(N)]
    data = {"train": (X[:40], Y[:40], names[:40]), "test": (X[40:], Y[40:], names[40:])}
    import_arrays(data, tmp_path / "store", class_token=False)
    lines = [f"{name},{drive}" for name, drive in zip(names, DRIVES, strict=True)]
    (tmp_path / "apart.csv").write_text("\n".join(["image,group", *lines]))
    (tmp_path / "mixed.csv").write_text("\n".join(["image,group", *lines[:-1], "059.png,drive 0"]))
    options = ("--heads", "linear", "--baselines", "", "--beta-ratios", "0.3", "--out", tmp_path / "out")
    assert call("probe", tmp_path / "store", *options, "--groups", tmp_path / "mixed.csv") == 1
    assert "the group 'drive 0' has train images, and the test image '059.png'" in capsys.readouterr().err
    assert call("probe", tmp_path / "store", *options, "--groups", tmp_path / "apart.csv") == 0
    assert json.loads((tmp_path / "out/table.json").read_text())["dataset"]["test_groups"] == 4
    (tmp_path / "train.csv").write_text("\n".join(["image,group", *lines[:40]]))
    assert call("probe", tmp_path / "store", *options, "--groups", tmp_path / "train.csv") == 0
    assert json.loads((tmp_path / "out/table.json").read_text())["dataset"]["test_groups"] is None
    (tmp_path / "some.csv").write_text("\n".join(["image,group", *lines[:-1]]))
    assert call("probe", tmp_path / "store", *options, "--groups", tmp_path / "some.csv") == 1
    assert "no row for the image '059.png' of the split test" in capsys.readouterr().err
