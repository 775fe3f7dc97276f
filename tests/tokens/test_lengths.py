"""Stores of samples of different length: imported, streamed, fitted, audited, predicted as lists in memory are."""

from __future__ import annotations

import numpy as np
import pytest

import convexhead as ch
from convexhead import runs
from convexhead.errors import InputError
from convexhead.interpret import token_embedding
from convexhead.predict import predict
from convexhead.tokens import TokenStore, export_store, import_arrays, merge_stores

S, D = 6, 4


def samples(n: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    return [(rng.normal(size=(rng.integers(1, S + 1), D)) + label).astype(np.float32) for label in y], y


def padded(arrays: list[np.ndarray], rest: float = 7.0) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(array) for array in arrays])
    out = np.full((len(arrays), lengths.max(), D), rest, np.float32)
    out[np.arange(out.shape[1]) < lengths[:, None]] = np.concatenate(arrays)
    return out, lengths


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengths")
    arrays = {}
    for split, n, seed in (("train", 60, 0), ("test", 30, 1)):
        X, y = samples(n, seed)
        arrays[f"X_{split}"], arrays[f"lengths_{split}"] = padded(X)
        arrays[f"y_{split}"] = y
    np.savez(folder / "arrays.npz", **arrays)
    import_arrays(folder / "arrays.npz", folder / "store", backbone="b", constant=True)
    return folder / "store"


def reduced(store, X: list[np.ndarray]) -> list[np.ndarray]:
    return [TokenStore.open(store).reduction.apply(x[None])[0] for x in X]


def test_padding_does_not_count(store):
    X, _ = samples(60, 0)
    view = TokenStore.open(store, "train")
    joined = np.concatenate(X)
    np.testing.assert_allclose(view.reduction.mean, joined.mean(0), rtol=1e-5)
    np.testing.assert_allclose(1 / view.reduction.scale, joined.std(0), rtol=1e-5)
    np.testing.assert_array_equal(view.lengths, [len(x) for x in X])
    for row, x in zip(view, reduced(store, X), strict=True):
        np.testing.assert_array_equal(row[: len(x)], x)
        assert not row[len(x) :].any()  # not the channel of ones either
    np.testing.assert_array_equal(view.subset(np.array([5, 2])).mask, view.mask[[5, 2]])
    assert TokenStore.open(store).info()["lengths"]


@pytest.mark.parametrize(
    ("head", "activation"), [("linear", "linear"), ("mlp", "gated-relu"), ("self-attention", "linear")]
)
def test_a_store_is_a_list_in_memory(store, head, activation, tmp_path):
    options = {"head": head, "activation": activation, "n_gates": 5, "random_state": 0, "tol": 1e-6}
    (X, y), (X_test, y_test) = samples(60, 0), samples(30, 1)
    listed = ch.ConvexHeadClassifier(**options).fit(reduced(store, X), y)
    clf = runs.fit(store, tmp_path / "run", **options)
    assert clf.certificate_.identity == listed.certificate_.identity
    view = TokenStore.open(store, "test")
    np.testing.assert_allclose(clf.predict_proba(view), listed.predict_proba(reduced(store, X_test)), atol=1e-4)
    assert clf.score(view) == np.mean(clf.predict(view) == y_test) == runs.evaluate(tmp_path / "run", store)["top1"]
    audited = runs.audit(tmp_path / "run", store).certificate
    assert audited.identity == clf.certificate_.identity
    assert audited.converged
    rows = list(predict(tmp_path / "run", store, split="test"))
    np.testing.assert_allclose([row[2:] for row in rows], clf.predict_proba(view), atol=1e-7)


def test_tokens_stay_on_disk(store, monkeypatch):
    view = TokenStore.open(store, "train")
    whole = ch.ConvexHeadClassifier("mlp", random_state=0).fit(view)
    streamed = ch.ConvexHeadClassifier("mlp", random_state=0, max_memory=1.0).fit(view)
    assert streamed.certificate_.primal == pytest.approx(whole.certificate_.primal, rel=1e-4)
    assert streamed.certificate_.identity == whole.certificate_.identity


def test_paths_and_folds(store):
    rows = ch.regularization_path(
        TokenStore.open(store, "train"), head="mlp", beta_ratios=[0.5, 0.1], X_val=TokenStore.open(store, "test")
    )
    assert rows[-1]["model"].score(TokenStore.open(store, "test")) == rows[-1]["val_score"]
    clf = ch.ConvexHeadClassifierCV("linear", cv=2, beta_ratios=[0.5, 0.1]).fit(TokenStore.open(store, "train"))
    assert clf.model_.any_length
    assert clf.class_names_ == ["0", "1", "2"]


def test_weights_leave_samples_out(store):
    view, w = TokenStore.open(store, "train"), np.arange(60) % 4 > 0
    some = ch.ConvexHeadClassifier("mlp", random_state=0).fit(view, view.labels, w)
    fewer = ch.ConvexHeadClassifier("mlp", random_state=0).fit(view.subset(np.flatnonzero(w)))
    assert some.certificate_.primal == pytest.approx(fewer.certificate_.primal, rel=1e-9)


def test_another_store_may_have_longer_samples(store, tmp_path):
    clf = runs.fit(store, tmp_path / "run", head="mlp")
    X, y = samples(30, 5)
    longer = [np.concatenate([x, x]) for x in X]
    data = dict(zip(("X_train", "lengths_train"), padded(longer), strict=True), y_train=y)
    np.savez(tmp_path / "more.npz", **data)
    import_arrays(tmp_path / "more.npz", tmp_path / "more", like=store)
    view = TokenStore.open(tmp_path / "more", "train")
    np.testing.assert_allclose(clf.predict_proba(view), clf.predict_proba(reduced(store, longer)), atol=1e-6)


def test_exported_and_joined(store, tmp_path):
    export_store(store, tmp_path / "plain", raw=True)
    back = import_arrays(tmp_path / "plain", tmp_path / "back", backbone="b", constant=True)
    np.testing.assert_array_equal(back["test"].lengths, TokenStore.open(store, "test").lengths)
    np.testing.assert_array_equal(back["test"][:], TokenStore.open(store, "test")[:])
    with pytest.raises(InputError, match="same images"):
        merge_stores([store, store], tmp_path / "both")


def test_a_file_a_sample(tmp_path):
    X, y = samples(12, 3)
    for i, (x, label) in enumerate(zip(X, y, strict=True)):
        (tmp_path / "in" / f"c{label}").mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "in" / f"c{label}" / f"{i:02}.npy", x)
    view = import_arrays(tmp_path / "in", tmp_path / "out", standardize=False, any_length=True)["train"]
    with pytest.raises(InputError, match="any_length=True"):
        import_arrays(tmp_path / "in", tmp_path / "never", grid=(1, 5))
    order = np.argsort(y, kind="stable")
    np.testing.assert_array_equal(view.lengths, [len(X[i]) for i in order])
    np.testing.assert_array_equal(view[3][: view.lengths[3]], X[order[3]])


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([1, 2, 0], {}, "row 2"),
        ([1, 2, 7], {}, "1 to 6"),
        ([1, 2], {}, "3 samples"),
        ([1.0, 2.0, 3.0], {}, "whole numbers"),
        ([1, 2, 3], {"grid": (2, 3)}, "no grid"),
        ([1, 2, 3], {"class_token": True}, "in front"),
        ([1, 2, 3], {"token_pool": 2}, "token_pool"),
    ],
)
def test_lengths_are_refused(tmp_path, lengths, options, message):
    X = np.random.default_rng(0).normal(size=(3, S, D))
    np.savez(tmp_path / "arrays.npz", X=X, y=np.arange(3), lengths=np.array(lengths))
    with pytest.raises(InputError, match=message):
        import_arrays(tmp_path / "arrays.npz", tmp_path / "never", **options)


@pytest.mark.parametrize("head", ["mlp-mixer", "fno"])
def test_heads_that_mix_by_position_say_why(store, tmp_path, head):
    with pytest.raises(InputError, match="by their position"):
        runs.fit(store, tmp_path / "never", head=head)


def test_interpretation_says_what_it_reads(store):
    clf = ch.ConvexHeadClassifier("self-attention", random_state=0).fit(TokenStore.open(store, "train"))
    for X in (TokenStore.open(store, "test"), reduced(store, samples(30, 1)[0])):
        with pytest.raises(InputError, match="same length"):
            token_embedding(clf, X)
