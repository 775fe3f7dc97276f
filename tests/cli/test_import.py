"""``convexhead store import``: from arrays to a store, a head and its accuracy, each by one command."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import convexhead as ch
from command import call

RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(3, 1, 6))


def draw(n):
    y = np.arange(n) % 3
    return (CENTRES[y] + RNG.normal(size=(n, 10, 6))).astype(np.float32), y


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, n in (("train", 45), ("test", 21)):
        X, y = draw(n)
        np.savez(f"{split}.npz", X=X, y=y)
        np.save(f"X_{split}.npy", X)
        np.save(f"y_{split}.npy", y)
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")


WAYS = {
    "--split train=FILE test=FILE": ["--split", "train=train.npz", "test=test.npz"],
    "train=FILE test=FILE": ["train=train.npz", "test=test.npz"],
    "--split twice": ["--split", "train=train.npz", "--split", "test=test.npz"],
    "tokens, labels": ["train=X_train.npy,y_train.npy", "test=X_test.npy,y_test.npy"],
}


@pytest.mark.parametrize("way", WAYS)
def test_from_arrays_to_accuracy(files, capsys, way):
    options = ("--class-token", "--class-names", "names.txt", "--backbone", "mine", "--grid", "3x3", "--out", "store")
    assert call("store", "import", *WAYS[way], *options, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == {"train": 45, "test": 21}
    assert (told["grid"], told["prefix_tokens"], told["backbone"]) == ([3, 3], 1, "imported:mine")
    store = ch.TokenStore.open("store")
    X = np.load("X_train.npy")
    np.testing.assert_array_equal(store["train"].raw(0, 45), X[:, 1:])
    assert store.class_names == ["ant", "bee", "cat"]
    assert call("fit", "store", "--head", "linear", "--pool", "cls", "--out", "run") == 0
    capsys.readouterr()
    assert call("evaluate", "run", "store", "--json") == 0
    run, patches = ch.load("run"), X[:, 1:].reshape(-1, 6)
    logits = (np.load("X_test.npy")[:, 0] - patches.mean(0)) / patches.std(0) @ run.coef_
    expected = np.mean(logits.argmax(1) == np.load("y_test.npy"))
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "there are no arrays"),
        (["train.npz"], "a grid of 3x3.*--grid, --class-token"),
        (["train.npz", "test.npz"], "should be SPLIT=FILE"),
        (["train=train.npz", "train=test.npz"], "given twice"),
        (["train=none.npz"], "no file 'none.npz'"),
        (["train.npz", "--class-token", "--grid", "9"], "--grid must be rows x columns"),
        (["train.npz", "--class-token", "--tokens", "Z"], r"no tokens of train.*\(X\).*--tokens"),
        (["train.npz", "--class-token", "--class-names", "none.txt"], "no text file"),
        (["X_train.npy", "--class-token"], "no labels of train.*--labels"),
        (["train.npz", "--class-token", "--registers", "-1"], "registers=-1"),
        (["train.npz", "--class-token", "--reduce", "pca", "--channels", "9"], "at most the tokens' 6"),
    ],
)
def test_mistakes_are_one_line(files, capsys, words, told):
    assert call("store", "import", *words, "--out", "store") == 1
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("error: ")
    assert re.search(told, error), error
