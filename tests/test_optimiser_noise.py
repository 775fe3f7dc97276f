"""`benchmarks/optimiser_noise.py` on digits: no probe is below a proven bound, and a stopped run goes on."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits

import common
import optimiser_noise
from convexhead.tokens import extract
from linear_head import objective
from optimiser_noise import GRID, Features, by_sklearn, certified_path, chosen, run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")]
OPTIONS = {"seeds": 1, "epochs": [1]}


def save(path, X, y):
    path.parent.mkdir(exist_ok=True)
    parts = {"train": slice(0, 200), "val": slice(200, 300), "test": slice(300, 500)}
    arrays = {f"X_{name}": X[rows] for name, rows in parts.items()} | {f"y_{k}": y[r] for k, r in parts.items()}
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two kinds of features, the folder of the run, and its rows."""
    folder = tmp_path_factory.mktemp("noise")
    X, y = load_digits(return_X_y=True)
    pixels = save(folder / "digits" / "pixels.npz", X, y)
    sums = save(folder / "digits" / "sums.npz", X.reshape(-1, 8, 8).sum(2), np.array([f"class {k}" for k in y]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "RESULTS", folder / "results")
        run([pixels, sums], "noise", folder / "work", **OPTIONS)
        yield folder, [pixels, sums], common.read_csv("noise"), common.read_csv("noise_order")


def test_nothing_is_below_a_proven_bound(finished):
    _, _, rows, _ = finished
    assert len({row["method"] for row in rows}) == 7
    for row in rows:
        assert float(row["objective"]) >= float(row["bound"]) * (1 - 1e-7)
        if row["method"] in ("certified", "scikit-learn tight"):
            assert float(row["excess"]) <= 1.1e-5
        if row["method"] == "certified path":
            assert float(row["excess"]) <= 1e-3
    one_pass = [float(row["excess"]) for row in rows if row["method"] == "SGD, 1 epochs"]
    assert min(one_pass) > 0.1


def test_differences_are_from_the_certified_head_that_val_chooses(finished):
    _, _, rows, _ = finished
    for row in rows:
        certified = [each for each in rows if (each["features"], each["method"]) == (row["features"], "certified")]
        assert len(certified) == len(GRID)
        if row["method"] != "certified":
            difference = float(row["test_accuracy"]) - float(chosen(certified)["test_accuracy"])
            assert float(row["difference"]) == pytest.approx(difference, abs=1e-9)
            assert float(row["low"]) <= difference + 1e-9
            assert float(row["high"]) >= difference - 1e-9


def test_order_is_that_of_the_accuracies(finished):
    _, _, rows, orders = finished

    def ahead(method):
        accuracy = {}
        for name in ("pixels", "sums"):
            mine = [row for row in rows if (row["features"], row["method"]) == (name, method)]
            accuracy[name] = float(chosen(mine)["test_accuracy"])
        return np.sign(accuracy["pixels"] - accuracy["sums"])

    assert {row["pairs"] for row in orders} == {"1"}
    for row in orders:
        if row["where"] == "chosen on val":
            assert float(row["flips"]) == (ahead(row["method"]) * ahead("certified") < 0)
        assert float(row["flips_low"]) <= float(row["flips_high"])


def test_a_finished_run_fits_nothing_again(finished, monkeypatch):
    folder, paths, rows, _ = finished

    def fit(*_args, **_options):
        pytest.fail("made again")

    for name in ("certified_path", "by_sklearn", "by_steps"):
        monkeypatch.setattr(optimiser_noise, name, fit)
    run(paths, "noise", folder / "work", **OPTIONS)
    assert common.read_csv("noise") == rows
    next((folder / "work").glob("*AdamW*")).unlink()  # what was right is gone: this fit is made again
    with pytest.raises(pytest.fail.Exception, match="made again"):
        run(paths, "noise", folder / "work", **OPTIONS)


def test_other_test_labels_are_refused(finished):
    folder, paths, _, _ = finished
    f = Features.read(paths[0])
    other = Features(f.dataset, "other", f.X, {**f.y, "test": np.roll(f.y["test"], 1)}, f.groups)
    with pytest.raises(SystemExit, match="other test labels"):
        optimiser_noise.orders(common.Table("noise", ("features",), {}), [f, other], folder / "work")


def test_a_token_store_is_read_by_its_mean_tokens(tmp_path):
    store = extract("sklearn:digits", "patches:4", tmp_path / "data" / "store")
    f = Features.read(store.path)
    assert (f.dataset, f.name, f.classes) == ("data", "store", 10)
    assert f.X["train"].shape[1] == store["test"].shape[2]
    assert np.allclose(f.X["train"].mean(0), 0, atol=1e-9)
    assert np.array_equal(f.y["test"], store["test"].labels)


def test_two_classes_are_compared_at_scikit_learns_C(tmp_path):
    f = Features.read(save(tmp_path / "cancer" / "cells.npz", *load_breast_cancer(return_X_y=True)))
    (row,) = certified_path(f, [0.1], 1e-6)
    assert row["C"] == pytest.approx(0.1)
    W, b, _ = by_sklearn(f, 0.1, np.float64, tol=1e-10, max_iter=10_000)
    reached = objective(W, b, f.X["train"], f.y["train"], f.beta(0.1))
    assert row["dual"] * (1 - 1e-9) <= reached <= row["objective"] * (1 + 1e-9)
