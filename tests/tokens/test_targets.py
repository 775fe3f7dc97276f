"""Stores whose images have several classes, or numbers: from arrays to a head, its scores and predictions."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, r2_score

import convexhead as ch
from convexhead import runs
from convexhead.errors import InputError
from convexhead.predict import predict, write_csv
from convexhead.tokens import TokenStore, export_store, import_arrays, merge_stores

NAMES = ["cat", "dog", "sky", "sea"]


def arrays(task: str, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng, U = np.random.default_rng(seed), np.random.default_rng(9).normal(size=(5, 4))
    found = {}
    for split, n in {"train": 60, "val": 20, "test": 30}.items():
        X = rng.normal(size=(n, 4, 5)).astype(np.float32)
        f = X.mean(1) @ U
        found[split] = (X, (f > 0.2).astype(int) if task == "multi-label" else f[:, :2])
    return found


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    import_arrays(arrays("multi-label"), folder / "several", task="multi-label", class_names=NAMES, backbone="b")
    import_arrays(arrays("regression"), folder / "numbers", task="regression", class_names=["age", "kg"], backbone="b")
    return folder


def test_targets_are_what_was_given(stores, tmp_path):
    several, numbers = TokenStore.open(stores / "several"), TokenStore.open(stores / "numbers")
    np.testing.assert_array_equal(several["test"].targets, arrays("multi-label")["test"][1])
    np.testing.assert_array_equal(numbers["test"].targets, arrays("regression")["test"][1])
    assert (several["test"].task, numbers["test"].task) == ("multi-label", "regression")
    rows = np.array([3, 1])
    np.testing.assert_array_equal(numbers["test"].subset(rows).targets, arrays("regression")["test"][1][rows])
    assert several.info()["found"]["splits"]["train"]["per_label"] == arrays("multi-label")["train"][1].sum(0).tolist()
    export_store(stores / "numbers", tmp_path / "plain", raw=True)
    back = import_arrays(tmp_path / "plain", tmp_path / "back", task="regression")
    assert back.class_names == ["age", "kg"]
    np.testing.assert_array_equal(back["test"].targets, numbers["test"].targets)


def test_several_labels_from_store_to_predictions(stores, tmp_path):
    store, run = stores / "several", tmp_path / "run"
    clf = runs.fit(store, run, head="mlp", pos_weight=2.0)
    data = arrays("multi-label")
    view = TokenStore.open(store, "train")
    same = ch.ConvexHeadClassifier("mlp", loss="binary-cross-entropy", pos_weight=2.0).fit(view[:], data["train"][1])
    assert clf.certificate_.primal == pytest.approx(same.certificate_.primal, rel=1e-6)
    assert clf.class_names_ == NAMES
    scores = runs.evaluate(run, store)
    p, truth = clf.predict_proba(TokenStore.open(store, "test")), data["test"][1]
    assert scores["mean_ap"] == pytest.approx(average_precision_score(truth, p))
    assert scores["exact"] == clf.score(TokenStore.open(store, "test")) == np.mean(((p >= 0.5) == truth).all(1))
    assert runs.audit(run, store).certificate.identity == clf.certificate_.identity
    file = io.StringIO()
    write_csv(predict(run, store, split="test"), file)
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [row["predicted"] for row in rows] == ["|".join(np.array(NAMES)[q >= 0.5]) for q in p]


def test_numbers_from_store_to_predictions(stores, tmp_path):
    store, run = stores / "numbers", tmp_path / "run"
    reg = runs.fit(store, run, head="mlp", loss="huber")
    truth = arrays("regression")["test"][1]
    f = reg.predict(TokenStore.open(store, "test"))
    scores = runs.evaluate(run, store)
    assert scores["r2"] == pytest.approx(r2_score(truth, f)) == pytest.approx(reg.score(TokenStore.open(store, "test")))
    assert list(scores["rmse_of"]) == ["age", "kg"]
    assert predict(run, store).columns == ["split", "image", "age", "kg"]
    assert runs.audit(run, store).certificate.identity == reg.certificate_.identity
    chosen = runs.fit(store, tmp_path / "cv", head="mlp", cv=[(np.arange(40), np.arange(40, 60))], beta_ratios=[0.01])
    assert isinstance(chosen, ch.ConvexHeadRegressorCV)
    assert chosen.certificate_.converged


@pytest.mark.parametrize("name", ["several", "numbers"])
def test_the_val_split_chooses(stores, tmp_path, name):
    found = runs.path(stores / name, tmp_path / "run", head="mlp", beta_ratios=[0.5, 0.05])
    assert (found.chosen_on, found.n_train, found.n_held_out) == ("val", 60, 20)
    val = TokenStore.open(stores / name, "val")
    assert found.chosen["val_score"] == found.kept.validation_score(val)
    with pytest.raises(InputError, match=r"validation=0\.2"):
        runs.path(stores / name, refit=True)
    assert runs.path(stores / name, head="mlp", beta_ratios=[0.5], validation=0.5, refit=True).refitted


def test_columns_are_matched_by_name(stores, tmp_path):
    run, order = tmp_path / "run", [2, 0, 3, 1]
    runs.fit(stores / "several", run, head="linear")
    data = {split: (X, Y[:, order]) for split, (X, Y) in arrays("multi-label").items()}
    names = [NAMES[k] for k in order]
    import_arrays(data, tmp_path / "other", task="multi-label", class_names=names, backbone="b")
    assert runs.evaluate(run, tmp_path / "other")["ap"] == runs.evaluate(run, stores / "several")["ap"]
    import_arrays(data, tmp_path / "strange", task="multi-label", class_names=["pig", *names[1:]], backbone="b")
    with pytest.raises(InputError, match="pig"):
        runs.evaluate(run, tmp_path / "strange")


def test_stores_join(stores, tmp_path):
    import_arrays(
        arrays("regression", 1), tmp_path / "more", task="regression", class_names=["age", "kg"], backbone="b"
    )
    both = merge_stores([stores / "numbers", tmp_path / "more"], tmp_path / "both")
    expected = np.concatenate([arrays("regression", seed)["test"][1] for seed in (0, 1)])
    np.testing.assert_array_equal(both["test"].targets, expected)
    with pytest.raises(InputError, match="task"):
        merge_stores([stores / "numbers", stores / "several"], tmp_path / "never")


X = np.zeros((4, 4, 3), np.float32)


@pytest.mark.parametrize(
    ("y", "task", "message"),
    [
        (np.eye(4, dtype=int), "classes", "task='multi-label'"),
        (np.array([0.5, 1, 2, 3]), "classes", "task='regression'"),
        (np.full((4, 2), 2), "multi-label", "task='regression'"),
        (np.array([[0, 1], [1, 0], [np.nan, 1], [0, 0]]), "multi-label", "row 2"),
        (np.array([1, np.inf, 0, 0]), "regression", "row 1"),
        (np.array(list("abcd")), "regression", "numbers"),
        (np.zeros((4, 2, 2)), "regression", r"\(n, c\)"),
        (np.zeros(3), "regression", "4 samples"),
        (np.zeros((4, 0)), "multi-label", r"\(4, 0\)"),
        (np.array([0, 1, 0, 1]), "multi-label", "two classes apart: say task='classes'"),
        (np.array([[0], [1], [0], [1]]), "multi-label", "two classes apart: say task='classes'"),
        (np.eye(4, dtype=int), "classes", "labels of the 4 tokens"),
    ],
)
def test_targets_are_refused(y, task, message, tmp_path):
    with pytest.raises(InputError, match=message):
        import_arrays({"train": (X, y)}, tmp_path / "never", task=task, class_token=False)


@pytest.mark.parametrize(
    ("store", "options", "message"),
    [
        ("several", {"loss": "cross-entropy"}, "loss='binary-cross-entropy'"),
        ("several", {"loss": "squared"}, "loss='binary-cross-entropy'"),
        ("several", {"class_weight": "balanced"}, "pos_weight"),
        ("several", {"pool": None}, "pool='mean'"),
        ("numbers", {"loss": "cross-entropy"}, "loss='squared'"),
        ("numbers", {"label_smoothing": 0.1}, "label_smoothing"),
    ],
)
def test_refusals_name_what_would_do(stores, tmp_path, store, options, message):
    with pytest.raises(InputError, match=message):
        runs.fit(stores / store, tmp_path / "never", head="mlp", **options)


def test_a_run_refuses_a_store_of_another_task(stores, tmp_path):
    runs.fit(stores / "several", tmp_path / "run", head="linear")
    with pytest.raises(InputError, match="numbers"):
        runs.evaluate(tmp_path / "run", stores / "numbers")
