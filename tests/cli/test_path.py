"""`convexhead path` on a store: it streams, keeps the reduction, and says what it trained on and where β lies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

import convexhead as ch
from command import call
from convexhead import cli, runs, solvers
from convexhead.path import grid_edge, regularization_path
from convexhead.report.runs import read_run
from convexhead.tokens import SplitView, extract
from convexhead.tokens.fit_reduction import fit_reduction

pytest.importorskip("PIL")


def call_json(capsys, *arguments):
    sys.argv = ["convexhead", *map(str, arguments), "--json"]
    capsys.readouterr()
    cli.main()
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = tmp_path_factory.mktemp("path") / "tokens"
    return extract("sklearn:digits", "patches:4", out, channels=8, reduce="pca", constant=True, dtype="float32")


@pytest.fixture
def saved(store, tmp_path, capsys):
    result = call_json(
        capsys, "path", store.path, "--out", tmp_path / "best", "--head", "linear", "--beta-ratios", "0.3,0.1,0.03"
    )
    return tmp_path / "best", result


def test_the_saved_head_reads_raw_tokens_of_another_store(store, saved, tmp_path):
    clf = ch.load(saved[0])
    assert clf.reduction_.identity == store.reduction.identity
    other = extract("sklearn:digits", "patches:4", tmp_path / "other", dtype="float32", standardize=False)
    mine = fit_reduction(iter([store["train"].unreduced().read()]), standardize=True, components=8, constant=True)
    tokens = mine.apply(other["test"].unreduced().read())
    expected = np.argmax(tokens.mean(1) @ clf.coef_ + clf.intercept_, axis=1)
    np.testing.assert_array_equal(clf.predict(other["test"]), expected)


def test_what_it_was_trained_on(store, saved, capsys):
    run, result = saved
    assert result["trained_on"] == {"split": "train", "images": 1005, "held_out": 252}
    clf, train = ch.load(run), store["train"]
    rows, held = train_test_split(np.arange(1257), test_size=0.2, stratify=train.labels, random_state=0)
    np.testing.assert_array_equal(clf.origin_.rows, np.sort(rows))
    row = next(row for row in result["rows"] if row["beta_ratio"] == result["best"])
    assert row["val_score"] == pytest.approx((clf.predict(train.read()[held]) == train.labels[held]).mean())
    # An audit is of the same images without being told: the objective is that of the fit.
    audited = call_json(capsys, "audit", run, store.path)["certificate"]
    assert audited["primal"] == pytest.approx(row["objective"], rel=1e-6)
    assert audited["converged"]
    direct = ch.certify(clf, train, train.labels, beta=clf.beta_, random_state=0)
    assert direct.primal == pytest.approx(row["objective"], rel=1e-6)
    evidence = json.loads((run / "evidence.json").read_text())
    assert evidence["at_edge"] == result["at_edge"]


def test_a_refit_sees_all_images(store, tmp_path, capsys):
    run, settings = tmp_path / "run", ("--head", "mlp", "--activation", "gated-relu", "--n-gates", "5")
    path = call_json(capsys, "path", store.path, *settings, "--beta-ratios", "0.5,0.3", "--refit", "--out", run)
    assert path["trained_on"] == {"split": "train", "images": 1257, "held_out": 0}
    clf, train = ch.load(run), store["train"]
    assert clf.origin_.rows is None
    assert clf.certificate_.converged
    assert path["refit"]["beta"] == clf.beta_ == path["best"] * clf.beta_max_
    assert ch.certify(clf, train, beta=clf.beta_).primal == pytest.approx(path["refit"]["certificate"]["primal"])
    by_hand = ch.ConvexHeadClassifier(
        "mlp", activation="gated-relu", gates=clf.gates_, beta_ratio=path["best"]
    ).fit(train)  # fmt: skip
    assert by_hand.certificate_.primal == pytest.approx(clf.certificate_.primal, rel=2e-3)
    evidence = json.loads((run / "evidence.json").read_text())
    assert evidence["selection"] == {"held_out": 252, "refit": True}
    assert len(evidence["path"]) == 2
    seen = read_run(run)[0]["trained_on"]
    assert seen.startswith("all 1257 images of the split 'train'; 252 of them had been held out to choose β")
    assert read_run(run, store)[0]["trained_on"] == seen


def test_the_terminal_says_what_the_kept_head_saw(store, capsys):
    assert call("path", store.path, "--head", "linear", "--beta-ratios", "0.3,0.1", "--refit") == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "252 of the 1257 training images chose β/β_max 0.1; the head that is kept was then trained on all" in words
    assert "certified: objective" in words


def test_a_refit_that_is_interrupted_leaves_the_certified_head(store, monkeypatch, tmp_path):
    fit = ch.ConvexHeadClassifier.fit

    def interrupted(self, X, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ch.ConvexHeadClassifier, "fit", interrupted)
    found = runs.path(store.path, tmp_path / "run", beta_ratios=(0.3, 0.1), refit=True, head="linear")
    monkeypatch.setattr(ch.ConvexHeadClassifier, "fit", fit)
    assert not found.refitted
    assert ch.load(tmp_path / "run").certificate_.converged
    assert read_run(tmp_path / "run")[0]["trained_on"].startswith("1005 of the 1257 images")


@pytest.mark.slow
def test_fit_by_cross_validation(store, tmp_path, capsys):
    run = tmp_path / "run"
    result = call_json(capsys, "fit", store.path, "--out", run, "--head", "linear", "--cv", "3")
    by_hand = ch.ConvexHeadClassifierCV("linear", cv=3, random_state=0).fit(store["train"])
    np.testing.assert_allclose(result["scores"], by_hand.scores_)
    assert result["beta_ratio"] == by_hand.beta_ratio_
    assert result["beta"] == ch.load(run).beta_ == by_hand.beta_
    assert result["certificate"]["converged"]
    seen = "all 1257 images of the split 'train'; β was chosen on them by cross-validation with 3 folds"
    assert read_run(run)[0]["trained_on"] == seen
    for more in (["--beta", "0.1"], ["--beta-ratio", "0.3"], ["--checkpoint", "1"]):
        assert call("fit", store.path, "--out", tmp_path / "never", "--head", "linear", "--cv", "3", *more) == 1
        assert f"leave {more[0].strip('-').split('-')[0]}" in capsys.readouterr().err.replace("-", "")


@pytest.mark.slow
def test_ctrl_c_in_the_folds_keeps_what_is_done(store, tmp_path, capsys):
    run, arguments = tmp_path / "run", ("fit", store.path, "--head", "linear", "--cv", "3", "--out", tmp_path / "run")
    script = (
        "import os, signal, time\n"
        "from convexhead.fitting import Task\n"
        "approach, made = Task.approach, []\n"
        "def stop(self, *args, **kwargs):\n"
        "    made.append(1)\n"
        "    if len(made) == 4:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(60)\n"
        "    return approach(self, *args, **kwargs)\n"
        "Task.approach = stop\n"
        "from convexhead.cli import main\n"
        "main()\n"
    )
    process = subprocess.run(
        list(map(str, [sys.executable, "-c", script, *arguments])), capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.returncode == 130, process.stderr
    assert f"finished fits of the folds are kept in {run}.folds; run the same command again" in process.stderr
    assert "Traceback" not in process.stderr
    assert len(list((tmp_path / "run.folds" / "pieces").glob("*.json"))) == 3
    result = call_json(capsys, *arguments)
    assert result["certificate"]["converged"]
    assert not (tmp_path / "run.folds").exists()
    by_hand = ch.ConvexHeadClassifierCV("linear", cv=3, random_state=0).fit(store["train"])
    np.testing.assert_array_equal(result["scores"], by_hand.scores_)


def test_a_path_never_holds_the_split_in_memory(store, monkeypatch, tmp_path, capsys):
    def refuse(self):
        raise AssertionError("the whole split was read at once")

    monkeypatch.setattr(SplitView, "read", refuse)
    call_json(capsys, "path", store.path, "--head", "linear", "--beta-ratios", "0.3")


@pytest.mark.slow
def test_the_edge_of_the_grid(store, capsys, tmp_path):
    assert grid_edge((0.3, 0.1, 0.03), 0.03) == "low"
    assert grid_edge((0.3, 0.1, 0.03), 0.3) == "high"
    assert grid_edge((0.3, 0.1, 0.03), 0.1) is None
    assert grid_edge((0.3,), 0.3) is None
    assert grid_edge((0.3, 0.3), 0.3) is None
    out = tmp_path / "run"
    sys.argv = [
        "convexhead",
        "path",
        str(store.path),
        "--head",
        "linear",
        "--beta-ratios",
        "0.5,0.05",
        "--out",
        str(out),
    ]
    cli.main()
    words = " ".join(capsys.readouterr().out.split())
    assert "β/β_max 0.05 is the smallest of the grid, and a smaller one may be better" in words
    assert "trained on 1005 of the 1257 training images; the other 252 chose β/β_max 0.05 certified: objective" in words
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from convexhead.report.run_page import render_runs

    page = render_runs([out])
    assert "The chosen β is the smallest of the grid" in page
    assert "Trained on 1005 of the 1257 images" in page


def test_an_interrupted_path_has_what_was_finished(store, monkeypatch):
    """The second fit is interrupted at its first step: the row of the first is left, with its certificate."""
    fits = 0
    original = solvers.Monitor.interruptible

    def interruptible(self):
        nonlocal fits
        fits += 1
        self.interrupted = fits == 2
        return original(self)

    monkeypatch.setattr(solvers.Monitor, "interruptible", interruptible)
    options = {"head": "self-attention", "X_val": store["test"], "beta_ratios": (0.3, 0.1, 0.03), "tol": 1e-4}
    with pytest.warns(ConvergenceWarning, match="1 of 3 β"):
        rows = regularization_path(store["train"].subset(np.arange(200)), **options)
    assert [row["beta_ratio"] for row in rows] == [0.3]
    assert rows[0]["model"].certificate_.converged
    optimum = rows[0]["objective"]
    fits = 1  # the first one is interrupted: nothing is certified to 1e-4, but there is a model with an honest gap
    with pytest.warns(ConvergenceWarning):
        rows = regularization_path(store["train"].subset(np.arange(200)), **options)
    assert len(rows) == 1
    assert not rows[0]["converged"]
    assert rows[0]["dual"] <= optimum <= rows[0]["objective"]


def test_shares_that_cannot_be(store, capsys):
    sys.argv = ["convexhead", "path", str(store.path), "--validation", "1.5"]
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    told = capsys.readouterr().err
    assert "validation must be a share between 0 and 1" in told
    assert "--validation" in told
