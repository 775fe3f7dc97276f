"""``convexhead probe``: from real image files, or a store, to rows that agree with heads trained by hand."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold

import convexhead as ch
from convexhead.experiments import probe_baselines
from convexhead.experiments.probe_data import Budget
from convexhead.metrics import Predictions, calibration_error
from convexhead.tokens import whitened

pytest.importorskip("PIL")
from PIL import Image

from command import call

CLASSES = ("blue", "green", "red")
QUICK = ("--heads", "linear,mlp", "--baselines", "k-nn", "--cv", 3, "--beta-ratios", "0.3,0.1", "--tol", 1e-2)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(probe_baselines, "EPOCHS", 3)


def write_images(folder, counts, seed=0):
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        for c, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 200, (8, 8, 3))
                pixels[:, :, c] += 12
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"), {"train": 12, "test": 8})


@pytest.fixture(scope="module")
def probed(photos, tmp_path_factory):
    """A probe with everything, and what it printed as JSON."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_baselines, "EPOCHS", 3)
        out = tmp_path_factory.mktemp("probed") / "out"
        options = ("--backbone", "patches:4", "--shots", 1, 2, "--fractions", 0.5, "--draws", 2)
        board = ("--leaderboard", out.parent / "board.jsonl", "--log", out.parent / "rows.csv")
        arguments = ("probe", photos, *options, *QUICK[:2], *QUICK[4:], *board, "--out", out)
        assert call(*arguments) == 0
    return out, arguments


def rows_of(out, **wanted):
    rows = json.loads((out / "table.json").read_text())["rows"]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert call("probe", *arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.mark.slow
def test_a_tracker_has_a_row_for_every_fit(probed):
    out, _ = probed
    with open(out.with_name("rows.csv"), newline="") as file:
        told = list(csv.DictReader(file))
    columns = ("method", "budget", "draw", "objective", "relative_gap", "heads", "cv_score", "seconds")
    rows = [["" if row[name] is None else str(row[name]) for name in columns] for row in rows_of(out)]
    assert [[row[name] for name in columns] for row in told] == rows


@pytest.mark.slow
def test_rows_are_those_of_heads_trained_by_hand(probed):
    out, _ = probed
    store = ch.TokenStore.open(out / "tokens")
    train, test = store["train"], store["test"]
    folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(train.labels, train.labels))
    for head in ("linear", "mlp"):
        clf = ch.ConvexHeadClassifierCV(head, beta_ratios=[0.3, 0.1], cv=folds, tol=1e-2, random_state=0)
        clf.fit(train.read(), train.labels)
        (row,) = rows_of(out, method=head, budget="all")
        assert row["chosen"] == clf.beta_ratio_
        assert row["beta"] == pytest.approx(clf.beta_, rel=1e-6)
        assert row["converged"]
        assert row["relative_gap"] <= 1e-2
        assert row["lower_bound"] <= row["objective"]
        predicted = clf.predict(test.read())
        assert row["top1"] == pytest.approx((predicted == test.labels).mean())
        assert row["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(test.labels, predicted))
        assert row["per_class"]["red"] == pytest.approx((predicted[test.labels == 2] == 2).mean())
        assert row["low"] <= row["top1"] <= row["high"]
        assert (row["train_images"], row["test_images"]) == (36, 24)
        saved = ch.load(out / row["run"])
        assert saved.certificate_.primal == row["objective"]
        np.testing.assert_array_equal(saved.predict(test), predicted)


@pytest.mark.slow
def test_pairs_are_counted_against_the_linear_head(probed):
    out, _ = probed
    test = ch.TokenStore.open(out / "tokens")["test"]
    right = {}
    for head in ("linear", "mlp"):
        (row,) = rows_of(out, method=head, budget="all")
        right[head] = ch.load(out / row["run"]).predict(test) == test.labels
    assert row["gained"] == (right["mlp"] & ~right["linear"]).sum()
    assert row["lost"] == (right["linear"] & ~right["mlp"]).sum()
    assert rows_of(out, method="linear", budget="all")[0]["p_value"] is None


def test_smaller_budgets_take_the_ratio_of_all_images(probed):
    out, _ = probed
    for head in ("linear", "mlp"):
        (whole,) = rows_of(out, method=head, budget="all")
        for budget, images in (("1 a class", 3), ("2 a class", 6), ("50%", 18)):
            some = rows_of(out, method=head, budget=budget)
            assert [row["draw"] for row in some] == [0, 1]
            assert {row["train_images"] for row in some} == {images}
            assert {row["chosen"] for row in some} == {whole["chosen"]}
            for row in some:
                beta_max = ch.load(out / row["run"]).beta_max_
                assert row["beta"] == pytest.approx(whole["chosen"] * beta_max)
    assert {row["chosen"] for row in rows_of(out, method="k-nn", budget="1 a class")} == {1}


@pytest.mark.slow
def test_metrics_are_chosen_with_beta(probed, tmp_path, capsys):
    store = ch.TokenStore.open(probed[0] / "tokens")
    options = ("--baselines", "", "--heads", "mlp", "--cv", 3, "--beta-ratios", "0.3,0.1", "--tol", 0.01, "--shots", 2)
    assert call("probe", store.path, *options, "--draws", 1, "--whiten", 0, 1, "--out", tmp_path / "both") == 0
    train = store["train"]
    folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(train.labels, train.labels))
    for head in ("linear", "mlp"):
        by_hand = {
            whiten: ch.ConvexHeadClassifierCV(head, beta_ratios=[0.3, 0.1], cv=folds, tol=1e-2, random_state=0).fit(
                whitened(train, whiten)
            )
            for whiten in (0.0, 1.0)
        }
        best = max(by_hand, key=lambda whiten: (by_hand[whiten].scores_.mean(0).max(), -whiten))
        (row,) = rows_of(tmp_path / "both", method=head, budget="all")
        assert (row["whiten"], row["chosen"]) == (best, by_hand[best].beta_ratio_)
        assert row["top1"] == pytest.approx(by_hand[best].score(store["test"]))
        (small,) = rows_of(tmp_path / "both", method=head, budget="2 a class")
        saved = ch.load(tmp_path / "both" / small["run"])
        assert saved.reduction_.identity == whitened(train, best).reduction.identity
    assert "whiten must be a number" in refusal(capsys, store.path, "--whiten", "0,2", "--out", tmp_path / "x")


def test_an_attentive_head_has_the_queries_that_were_asked_for(probed, tmp_path, capsys):
    store = ch.TokenStore.open(probed[0] / "tokens")
    queries = ("--n-queries", 7, "--query-scale", 1, "--no-query-position", "--key-dim", 3, "--query-norm", "each")
    common = ("probe", store.path, "--baselines", "", "--beta-ratios", 0.3, "--tol", 0.01, "--out", tmp_path / "out")
    assert call(*common, "--heads", "linear,attentive", *queries) == 0
    (row,) = rows_of(tmp_path / "out", method="attentive")
    by_hand = ch.ConvexHeadClassifier(
        "attentive", n_queries=7, query_scale=1.0, query_position=False, key_dim=3, query_norm="each",
        beta_ratio=row["chosen"], tol=1e-2, random_state=0,
    ).fit(store["train"])  # fmt: skip
    np.testing.assert_array_equal(ch.load(tmp_path / "out" / row["run"]).queries_, by_hand.queries_)
    assert row["top1"] == by_hand.score(store["test"])
    # Other queries are another fit of this head alone.
    assert call(*common, "--heads", "linear,attentive", "--n-queries", 9) == 0
    models = [path.name for path in (tmp_path / "out" / "models").iterdir()]
    assert sorted(name.split("-")[0] for name in models) == ["attentive", "attentive", "linear"]
    for options, said in (
        (("--n-queries", 7, "--heads", "mlp"), "n_queries is a setting of the attentive head"),
        (("--heads", "attentive", "--query-norm", "some"), "query_norm"),
        (("--heads", "attentive", "--query-scale", "-1"), "query_scale must be a positive number"),
    ):
        assert said in refusal(capsys, *common[1:], *options)


def test_smaller_draws_are_parts_of_larger_ones():
    labels = np.repeat([3, 5, 9], [4, 10, 20])
    for draw in range(3):
        one, four, half = (
            set(Budget(draw=draw, **which).rows(labels, 34, 0))
            for which in ({"shots": 1}, {"shots": 4}, {"fraction": 0.5})
        )
        assert one < four
        assert np.unique(labels[list(four)], return_counts=True)[1].tolist() == [4, 4, 4]
        assert np.unique(labels[list(half)], return_counts=True)[1].tolist() == [2, 5, 10]
    assert len({tuple(Budget(shots=4, draw=draw).rows(labels, 34, 0)) for draw in range(3)}) == 3


def test_files_and_page(probed):
    out, _ = probed
    with open(out / "table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows_of(out)) == 4 * (1 + 3 * 2)
    with open(out / "classes.csv", newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == list(CLASSES)
    page = (out / "index.html").read_text()
    for sign in ("attentive-probe", "McNemar", "Label efficiency", "the test split", "<svg"):
        assert sign in page
    assert "| linear |" in (out / "table.md").read_text()


def test_the_same_command_fits_nothing_again(probed, monkeypatch):
    out, arguments = probed
    before = (out / "table.json").read_text()
    board = out.parent / "board.jsonl"
    lines = [json.loads(line) for line in board.read_text().splitlines()]
    assert len(lines) == len(rows_of(out))
    assert lines[0]["command"][1] == "probe"
    assert lines[0]["dataset"]["store"] == ch.TokenStore.open(out / "tokens").manifest.config_hash
    assert lines[0]["extraction"]["preprocessing"]

    def never(*_, **__):
        raise AssertionError

    for name in ("ConvexHeadClassifierCV", "ConvexHeadClassifier"):
        monkeypatch.setattr(getattr(ch, name), "fit", never)
    assert call(*arguments) == 0
    after = (out / "table.json").read_text()
    assert json.loads(before)["rows"] == json.loads(after)["rows"]
    assert len(board.read_text().splitlines()) == len(lines)  # no row stands there twice


@pytest.mark.slow
def test_another_tolerance_is_another_fit(probed, tmp_path):
    out, arguments = probed
    again = shutil.copytree(out, tmp_path / "out")
    changed = [1e-5 if a == 1e-2 else again if a is out else a for a in arguments]
    assert call(*changed) == 0
    (row,) = rows_of(again, method="mlp", budget="all")
    assert row["relative_gap"] <= 1e-5
    assert row["run"] != rows_of(out, method="mlp", budget="all")[0]["run"]


def test_a_store_in_place_of_images(probed, tmp_path, capsys):
    out, _ = probed
    capsys.readouterr()
    assert call("probe", out / "tokens", *QUICK, "--out", tmp_path / "out", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    for method in ("linear", "mlp", "k-nn"):
        (mine,), (other,) = rows_of(tmp_path / "out", method=method), rows_of(out, method=method, budget="all")
        assert {k: v for k, v in mine.items() if k not in ("seconds",)} == {
            k: v for k, v in other.items() if k not in ("seconds",)
        }
    assert len(told["rows"]) == 3
    assert not (tmp_path / "out" / "tokens").exists()


@pytest.mark.slow
def test_without_a_test_split_a_fifth_is_held_out(tmp_path, capsys):
    photos = write_images(tmp_path / "photos", {".": 20})
    out = tmp_path / "out"
    assert call("probe", photos, "--backbone", "patches:4", *QUICK, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "held out with seed 0" in " ".join(printed.split())
    assert {(row["train_images"], row["test_images"]) for row in rows_of(out)} == {(48, 12)}
    store = ch.TokenStore.open(out / "tokens")
    # The reduction has not seen the images that are held out.
    (row,) = rows_of(out, method="linear")
    clf = ch.load(out / row["run"])
    rows = clf.origin_.rows
    assert len(rows) == 48
    raw = store["train"].unreduced().read()
    np.testing.assert_allclose(clf.reduction_.mean, raw[rows].reshape(-1, raw.shape[2]).mean(0), rtol=1e-4, atol=1e-5)
    held = np.setdiff1d(np.arange(60), rows)
    X = clf.reduction_.apply(raw[held])
    labels = store["train"].labels[held]
    assert row["top1"] == pytest.approx((np.argmax(clf.predict_proba(X), axis=1) == labels).mean())
    # Another seed holds out others; what the first one found stays.
    assert call("probe", photos, "--backbone", "patches:4", *QUICK, "--seed", 1, "--out", out) == 0
    assert "held out with seed 1" in " ".join(capsys.readouterr().out.split())


def test_val_is_tested_on_where_there_is_no_test(tmp_path):
    photos = write_images(tmp_path / "photos", {"train": 6, "val": 4})
    assert call("probe", photos, "--backbone", "patches:4", *QUICK, "--out", tmp_path / "out") == 0
    data = json.loads((tmp_path / "out" / "table.json").read_text())["dataset"]
    assert (data["train"], data["test"]) == (18, 12)
    assert "val" in data["test_is"]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_probe_goes_on(photos, tmp_path, signum):
    """The process stops in the second head: the first one is there and is not trained again."""
    out = tmp_path / "out"
    arguments = ("probe", photos, "--backbone", "patches:4", *QUICK, "--out", out)
    script = (
        "import os, signal, sys, time\n"
        "from convexhead.experiments.probe_fits import Fits\n"
        "head = Fits._head\n"
        "def stop(self, name, *rest):\n"
        "    if name == 'mlp':\n"
        f"        os.kill(os.getpid(), {int(signum)})\n"
        "        time.sleep(60)\n"
        "    return head(self, name, *rest)\n"
        "Fits._head = stop\n"
        "from convexhead.cli import main\n"
        "main()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        list(map(str, [sys.executable, "-c", script, *arguments])), capture_output=True, text=True, timeout=120,
        env=environment, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    if signum == signal.SIGINT:
        assert process.returncode == 130, process.stderr
        assert (
            f"finished heads, and finished fits of folds, are kept in {out}; run the same command again"
            in process.stderr
        )
    assert "Traceback" not in process.stderr
    assert not (out / "table.json").exists()
    (piece,) = (out / "pieces").glob("linear-*.json")
    written = piece.stat().st_mtime_ns
    assert call(*arguments) == 0
    assert piece.stat().st_mtime_ns == written
    assert [row["method"] for row in rows_of(out)] == ["linear", "mlp", "k-nn"]


def test_refusals(probed, photos, tmp_path, capsys):
    out, _ = probed
    tokens, there = out / "tokens", ("--out", tmp_path / "no")
    assert "leave backbone out" in refusal(capsys, tokens, "--backbone", "patches:4", *there)
    assert "'mlp-mixer'" in refusal(capsys, photos, "--heads", "mlp-mixr", *there)
    assert "'k-nn'" in refusal(capsys, photos, "--baselines", "knn", *there)
    assert "--shots" in refusal(capsys, photos, "--shots", "0", *there)
    assert "--shots" in refusal(capsys, photos, "--shots", "many", *there)
    assert "--fractions" in refusal(capsys, photos, "--fractions", "2", *there)
    assert "another folder" in refusal(capsys, tokens, "--out", tokens)
    (tmp_path / "board").write_text("no json\n")
    assert "choose another leaderboard" in refusal(capsys, photos, "--leaderboard", tmp_path / "board", *there)
    assert not (tmp_path / "no").exists()
    lonely = write_images(tmp_path / "lonely", {"train": 1, "test": 1})
    assert "one train image" in refusal(capsys, lonely, "--backbone", "patches:4", "--out", tmp_path / "a")
    few = write_images(tmp_path / "few", {".": 2})
    assert "every class needs three" in refusal(capsys, few, "--backbone", "patches:4", "--out", tmp_path / "b")


def test_calibration_is_that_of_the_saved_head(probed):
    out, _ = probed
    test = ch.TokenStore.open(out / "tokens")["test"]
    (row,) = rows_of(out, method="mlp", budget="all")
    p = ch.load(out / row["run"]).predict_proba(test)
    assert row["calibration_error"] == pytest.approx(calibration_error(Predictions.of(p, np.arange(3), test.labels)))
