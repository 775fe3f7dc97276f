"""Checkpoints: a run that was stopped, killed or cut short goes on exactly as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from typer.testing import CliRunner

import convexhead as ch
from convexhead.cli import app
from convexhead.errors import FileFormatError, InputError
from convexhead.program.losses import Huber, Squared
from convexhead.runtime import checkpoint as checkpoints
from convexhead.solvers.column_generation import ColumnGeneration
from convexhead.solvers.linear_curvature import BlockCurvature
from convexhead.tokens import extract

rng = np.random.default_rng(0)
X = rng.normal(size=(90, 9, 5))
Y = ((X[:, :, 0] * X[:, :, 1]).mean(1) > 0).astype(int) + (X[:, 0, 2] > 0)

MANY = np.arange(len(X)) % 18

RUNS = {
    "fista": ("self-attention", {"tol": 1e-9}),
    "fista, many classes": ("self-attention", {"tol": 1e-7}),
    "column generation": ("self-attention", {"tol": 1e-8, "max_heads": 40}),
    "single then double precision": (
        "mlp",
        {"activation": "gated-relu", "n_gates": 3, "tol": 2e-4, "fit_intercept": True},
    ),
    "products in bfloat16": ("mlp-mixer", {"activation": "gated-relu", "n_gates": 3, "tol": 1e-3}),
    "kernel": ("attentive", {"solver": "kernel", "tol": 1e-7, "n_queries": 40, "fit_intercept": True}),
    "weighed": ("mlp", {"tol": 1e-7, "fit_intercept": True, "class_weight": "balanced"}),
    "ridge": ("linear", {"tol": 1e-12, "beta_ratio": 1e-6}),
    "ridge, blocks of the Hessian": ("linear", {"tol": 1e-9, "beta_ratio": 1e-6, "fit_intercept": True}),
    "relu, exact": ("mlp", {"activation": "relu", "solver": "relu-exact", "tol": 1e-5, "beta_ratio": 0.1}),
    "relu, searched": ("mlp", {"activation": "relu", "solver": "relu-search", "tol": 1e-4, "beta_ratio": 0.1}),
}


class Killed(BaseException):
    """What no solver catches."""


@pytest.fixture(params=RUNS)
def run(request, monkeypatch):
    """A function that fits, and is stopped at the given row of the history."""
    head, parameters = RUNS[request.param]
    few = request.param.startswith("relu")  # whose dual norm is bounded tightly
    if parameters["tol"] >= 1e-4:
        monkeypatch.setattr("convexhead.fitting.SMALL_TOKENS", 0)
        parameters = {"solver": "column-generation", **parameters}
    if request.param == "single then double precision":
        patience = {**ColumnGeneration.patience, torch.float32: -1}
        monkeypatch.setattr(ColumnGeneration, "patience", patience)
    if request.param == "ridge, blocks of the Hessian":
        monkeypatch.setattr(BlockCurvature, "pays", staticmethod(lambda passes, products: products > 1))
    if request.param == "products in bfloat16":
        monkeypatch.setattr("convexhead.program.operator.has_fast_bfloat16", lambda device: True)

    def fit(folder=None, *, stop_at=None, error=Killed, **others):
        rows = []

        def count(row):
            rows.append(row)
            if len(rows) == stop_at:
                raise error

        clf = ch.ConvexHeadClassifier(head, **{"beta_ratio": 0.05, "random_state": 3, **parameters, **others})
        tokens, of = (X[:12, :1, :2], labels[:12]) if few else (X, labels)
        clf.fit(tokens, of, weights, callback=count, checkpoint=folder, checkpoint_minutes=0.0)
        return clf, len(rows)

    weights = rng.random(len(X)) * (np.arange(len(X)) % 5 > 0) if request.param == "weighed" else None
    labels = MANY if request.param.endswith("many classes") else Y
    fit.kind = request.param
    return fit


def same(one, other):
    """Whether two fits made the same iterates, to the last bit."""
    rows = [[{**row, "seconds": 0} for row in clf.history_] for clf in (one, other)]
    return (
        rows[0] == rows[1]
        and one.certificate_ == other.certificate_
        and all(
            np.array_equal(getattr(one, name), getattr(other, name))
            for name in ("coef_", "intercept_")
            if hasattr(one, name)
        )
        and (
            hasattr(one, "coef_")
            or all(
                np.array_equal(a, b)
                for a, b in zip(one.mixing_ + one.values_, other.mixing_ + other.values_, strict=True)
            )
        )
    )


@pytest.mark.slow
def test_a_resumed_run_makes_the_same_iterates(run, tmp_path):
    calm, total = run()
    assert total >= 3
    stages, kept = [], []
    for stop_at in sorted({2, total // 2, 3 * total // 4, total - 1, total} - {0, 1}):
        folder = tmp_path / str(stop_at)
        with pytest.raises(Killed):
            run(folder, stop_at=stop_at)
        about = json.loads((folder / "checkpoint.json").read_text())["about"]
        stages.append(about["stage"])
        kept.append(len(about["history"]))
        resumed, rest = run(folder)
        assert rest == total - kept[-1]
        assert same(resumed, calm)
    assert kept[-1] > 0, "nothing was resumed"
    assert run.kind != "single then double precision" or any(stage["double"] for stage in stages)
    again, rest = run(folder)  # of a finished run the last moments are repeated
    assert same(again, calm)


@pytest.mark.table
def test_a_run_stopped_again_and_again(run, tmp_path):
    calm, total = run()
    stops = 0
    while stops <= total:
        try:
            resumed, _ = run(tmp_path / "folder", stop_at=min(max(7, 1 + total // 4), total - 1))
            break
        except Killed:
            stops += 1
    assert stops >= 1
    assert same(resumed, calm)


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["clock", "keyboard"])
def test_what_the_clock_or_a_person_stopped_goes_on(stop, tmp_path, monkeypatch):
    monkeypatch.setattr("convexhead.runtime.checkpoint.COPY_SECONDS", 0.0)
    parameters = {"solver": "column-generation", "tol": 1e-8, "beta_ratio": 0.05, "random_state": 0}
    calm = ch.ConvexHeadClassifier(**parameters).fit(X, Y)
    rows = []

    def count(row):
        rows.append(row)
        if len(rows) == 9:
            if stop == "keyboard":
                raise KeyboardInterrupt
            monkeypatch.setattr("convexhead.solvers.monitor.Monitor.out_of_time", lambda self: True)

    with pytest.warns(ConvergenceWarning):
        partial = ch.ConvexHeadClassifier(**parameters, max_time=60).fit(
            X, Y, callback=count, checkpoint=tmp_path / "c"
        )
    assert partial.certificate_.gap > 0
    monkeypatch.undo()
    assert same(ch.ConvexHeadClassifier(**parameters).fit(X, Y, checkpoint=tmp_path / "c"), calm)


@pytest.mark.parametrize("random_state", [None, np.random.RandomState(0)], ids=["none", "generator"])
def test_unseeded_runs_go_on_with_their_own_gates(random_state, tmp_path):
    def fit(rows=10**9):
        seen = []

        def count(row):
            seen.append(row)
            if len(seen) == rows:
                raise Killed

        parameters = {"n_gates": 3, "beta_ratio": 0.05, "tol": 1e-6, "random_state": random_state}
        clf = ch.ConvexHeadClassifier("mlp", activation="gated-relu", **parameters)
        return clf.fit(X, Y, callback=count, checkpoint=tmp_path / "c", checkpoint_minutes=0.0)

    with pytest.raises(Killed):
        fit(rows=3)
    notes = json.loads((tmp_path / "c" / "checkpoint.json").read_text())["notes"]
    first, second = fit(), fit()
    np.testing.assert_array_equal(first.gates_, second.gates_)
    assert first.beta_max_ == second.beta_max_ == notes["beta_max"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun") / "c"
    ch.ConvexHeadClassifier(random_state=0, tol=1e-6).fit(X, Y, checkpoint=folder, checkpoint_minutes=0.0)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_ratio": 0.2}, "its beta_ratio is 0.05 and not 0.2"),
        ({"tol": 1e-4}, "its tol is"),
        ({"head": "fno"}, "its head is 'self-attention' and not 'fno'"),
        ({"random_state": 1}, "its random_state"),
        ({"X": X + 1e-9}, "its data"),
        ({"Y": np.roll(Y, 1)}, "its data"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(change, message, begun):
    parameters = {"head": "self-attention", "random_state": 0, "tol": 1e-6, "X": X, "Y": Y, **change}
    data = parameters.pop("X"), parameters.pop("Y")
    with pytest.raises(InputError, match=f"of another run, {message}.*delete that one to begin anew"):
        ch.ConvexHeadClassifier(**parameters).fit(*data, checkpoint=begun)


GATES = rng.normal(size=(2, 5))


class Weighted(Squared):
    """``w/2 ‖f − y‖²``, a loss of a user's with a setting in its class."""

    weight = 1.0

    def value(self, f, y):
        return self.weight * super().value(f, y)

    def residual(self, f, y):
        return self.weight * (f - y)

    def conjugate(self, g, y):
        return (g.square() / 2 / self.weight + g * y).sum((-2, -1))

    def hessian_times(self, f, y, z):
        return self.weight * z

    def hessian_root(self, f, y, z):
        return self.weight**0.5 * z


class Careful(Weighted):
    """Another that differs in one constant of its code."""

    def scaled_domain(self, f, y):
        return 1.0


FINGERPRINTS = {
    "gates in an array": ({"gates": GATES}, {"gates": GATES + 1e-15}, "gates is another"),
    "gates in lists": ({"gates": GATES.tolist()}, {"gates": (GATES + 1e-15).tolist()}, "gates is another"),
    "a loss's class": ({"loss": Weighted()}, {"loss": Careful()}, "loss is another"),
    "a loss's parameter": ({"loss": Huber(1.0)}, {"loss": Huber(1.5)}, "loss is another"),
    "a loss's name": ({"loss": "squared"}, {"loss": "huber"}, "loss is 'squared' and not 'huber'"),
    "tokens": ({"X": X}, {"X": X.astype(np.float32)}, "type of the tokens is 'float64' and not 'float32'"),
    "samples": ({}, {"X": X[:-1], "Y": Y[:-1]}, "shape of the tokens is "),
    "target": ({}, {"Y": Y + 1e-12}, r"data \(targets\) is another"),
}


def begin(folder, X=X, Y=Y, **options):
    options = {"activation": "gated-relu", "gates": GATES, "random_state": 0, "tol": 0.3, "beta_ratio": 0.5, **options}
    return ch.ConvexHeadRegressor("mlp", **options).fit(
        X[:, :1], Y.astype(float), checkpoint=folder, checkpoint_minutes=0.0
    )


@pytest.mark.parametrize("kind", FINGERPRINTS)
def test_a_fingerprint_sees_everything(kind, tmp_path):
    before, after, message = FINGERPRINTS[kind]
    begin(tmp_path / "c", **before)
    begin(tmp_path / "c", **before)
    with pytest.raises(InputError, match=f"is of another run, its {message}"):
        begin(tmp_path / "c", **after)


def test_a_fingerprint_sees_code_attributes_and_versions(tmp_path, monkeypatch):
    begin(tmp_path / "c", loss=Careful())
    with monkeypatch.context() as patch:
        patch.setattr(Weighted, "weight", 2.0)
        with pytest.raises(InputError, match="its loss is another"):
            begin(tmp_path / "c", loss=Careful())
    with monkeypatch.context() as patch:
        patch.setattr(Careful, "scaled_domain", lambda self, f, y: 2.0)
        with pytest.raises(InputError, match="its loss is another"):
            begin(tmp_path / "c", loss=Careful())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "__version__", "0.0")
        with pytest.raises(InputError, match=r"its version of convexhead is .* and not '0.0'"):
            begin(tmp_path / "c", loss=Careful())
    document = json.loads((tmp_path / "c" / "checkpoint.json").read_text())
    (tmp_path / "c" / "checkpoint.json").write_text(json.dumps({**document, "version": 1}))
    with pytest.raises(FileFormatError, match="finish the run with the version that began it, or delete the folder"):
        begin(tmp_path / "c", loss=Careful())


@pytest.mark.parametrize("kind", ["state", "rows"])
def test_a_file_of_another_checkpoint_is_refused(kind, tmp_path):
    for name, targets in (("one", Y), ("two", Y[::-1])):
        begin(tmp_path / name, Y=targets)
    (mine,), (other,) = ((tmp_path / name).glob(f"{kind}-*") for name in ("one", "two"))
    other.rename(mine.with_name(other.name))
    if mine.name != other.name:
        mine.with_name(other.name).replace(mine)
    with pytest.raises(FileFormatError, match=r"its checksum differs.*delete the folder to begin anew"):
        begin(tmp_path / "one")


@pytest.mark.parametrize("kind", ["checkpoint", "state", "rows"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_checkpoint_is_refused(kind, damage, begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "c")
    (path,) = folder.glob(f"{kind}*")
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[-3] ^= 1
        path.write_bytes(content if damage == "changed" else content[: len(content) // 2])
    clf = ch.ConvexHeadClassifier(random_state=0, tol=1e-6)
    if (kind, damage) == ("checkpoint", "missing"):  # a first checkpoint that was never finished
        clf.fit(X, Y, checkpoint=folder)
        return
    with pytest.raises(FileFormatError, match=r"missing or damaged.*delete the folder to begin anew"):
        clf.fit(X, Y, checkpoint=folder)


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="holds no checkpoint"):
        ch.ConvexHeadClassifier().fit(X, Y, checkpoint=tmp_path)
    with pytest.raises(InputError, match="minutes"):
        ch.ConvexHeadClassifier().fit(X, Y, checkpoint=tmp_path / "new", checkpoint_minutes=-1.0)
    checkpoints.remove(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


# -- paths ------------------------------------------------------------------------------------------------------------
def along(folder=None, stop_at=None, random_state=0):
    """The rows of a path, and how many rows of progress it took."""
    rows = []

    def count(row):
        rows.append(row)
        if len(rows) == stop_at:
            raise Killed

    found = ch.regularization_path(
        X, Y, beta_ratios=[0.5, 0.3, 0.2], X_val=X[:20], y_val=Y[:20], progress=count, checkpoint=folder,
        checkpoint_minutes=0.0, tol=1e-4, random_state=random_state, solver="column-generation",
    )  # fmt: skip
    return found, len(rows)


@pytest.mark.slow
def test_a_path_goes_on(tmp_path):
    calm, total = along()
    folder = tmp_path / "c"
    for _ in range(2):
        with pytest.raises(Killed):
            along(folder, total // 3)
    found, left = along(folder)
    assert left <= total - total // 3, "nothing was resumed"
    assert [row["val_score"] for row in found] == [row["val_score"] for row in calm]
    assert all(same(one["model"], other["model"]) for one, other in zip(found, calm, strict=True))
    with pytest.raises(InputError, match="pass random_state, a whole number"):
        along(folder, random_state=None)
    checkpoints.remove(folder)
    assert not folder.exists()


def test_a_search_along_a_path_has_no_checkpoints(tmp_path):
    with pytest.raises(InputError, match="too fast for checkpoints: leave one of them out"):
        ch.regularization_path(X, Y, X_val=X, y_val=Y, search_tol=0.1, random_state=0, checkpoint=tmp_path / "c")


# A process that has imported everything forks one child an attempt.
KILLS = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np
import convexhead as ch

rng = np.random.default_rng(0)
X = rng.normal(size=(400, 9, 8))
Y = ((X[:, :, 0] * X[:, :, 1]).mean(1) > 0).astype(int) + (X[:, 0, 2] > 0)
out = Path(sys.argv[1])

def attempt(name, seconds):
    child = os.fork()
    if child == 0:
        clf = ch.ConvexHeadClassifier(beta_ratio=0.02, tol=1e-6, random_state=0)
        clf.fit(X, Y, checkpoint=out / f"{name}.checkpoint", checkpoint_minutes=0.0)
        history = [{**row, "seconds": 0} for row in clf.history_]
        replace(clf.model_, history=history).save(out / name)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

start = time.monotonic()
assert attempt("calm", None) == 0
whole = time.monotonic() - start
chance, kills = random.Random(0), 0
while kills < 12:
    status = attempt("killed", chance.uniform(0, whole / 8))
    assert status in (0, signal.SIGKILL), status
    kills += status == signal.SIGKILL
assert attempt("killed", None) == 0
for name in ("weights.safetensors", "config.json"):
    assert (out / "calm" / name).read_bytes() == (out / "killed" / name).read_bytes(), name
print(kills, len(list((out / "killed.checkpoint").iterdir())))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_at_any_moment_change_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["12", "3"]


@pytest.mark.slow
def test_command_line(tmp_path):
    store = extract("sklearn:digits", "patches:2", tmp_path / "store", channels=2)
    command = ["fit", str(store.path), "--out", str(tmp_path / "run"), "--checkpoint", "0", "--json"]
    runner = CliRunner()
    first = runner.invoke(app, [*command, "--max-time", "1e-9"])
    assert first.exit_code == 0
    assert not json.loads(first.stdout)["certificate"]["converged"]
    assert (tmp_path / "run.checkpoint" / "checkpoint.json").exists()
    second = runner.invoke(app, [*command, "--max-memory", "0.0001"])
    assert json.loads(second.stdout)["certificate"]["converged"], second.output
    assert not (tmp_path / "run.checkpoint").exists()
