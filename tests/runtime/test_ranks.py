"""Several processes: the result of one, a clean end when a worker is lost, continuation by any number."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import convexhead as ch
from convexhead import fitting
from convexhead.audit import audit
from convexhead.baselines.attentive_probe import AttentiveProbe
from convexhead.cli import app
from convexhead.errors import ConvexHeadError, InputError
from convexhead.path import regularization_path
from convexhead.program.losses import Squared
from convexhead.runtime import ranks
from convexhead.runtime.ranks import Ranks
from convexhead.solvers import restriction
from convexhead.solvers.linear_curvature import BlockCurvature
from convexhead.tokens import extract

if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)

rng = np.random.default_rng(0)
X = rng.normal(size=(203, 9, 5))
Y = ((X[:, :, 0] * X[:, :, 1]).mean(1) > 0).astype(int) + (X[:, 0, 2] > 0)
TARGETS = np.stack([X[:, 0, 0], Y], axis=1)
ENTRY_W, TOKEN_W = rng.random((203, 2)), rng.random((203, 9)) * (rng.random((203, 9)) < 0.7)
ENTRY_W[::7] = 0
GATED = {"n_gates": 3, "activation": "gated-relu", "solver": "column-generation"}
CASES = {
    "dense": {"head": "self-attention", "tol": 1e-7, "fit_intercept": True},
    "factored": {"head": "self-attention", "beta_ratio": 0.2, "tol": 1e-7, **GATED},
    "restricted": {"head": "self-attention", "beta_ratio": 0.2, "tol": 1e-7, **GATED},
    "single precision": {"head": "fno", "tol": 1e-3, **GATED},
    "grouped": {"head": "block-fno", "tol": 1e-7, "n_blocks": 5, "beta_ratio": 0.3},
    "ridge": {"head": "linear", "tol": 1e-7, "fit_intercept": True},
    "ridge, blocks": {"head": "linear", "tol": 1e-7, "fit_intercept": True, "beta_ratio": 1e-4},
    "attentive": {"head": "attentive", "tol": 1e-7, "n_queries": 4, "beta_ratio": 0.3, "fit_intercept": True},
    "relu, exact": {"head": "mlp", "activation": "relu", "solver": "relu-exact", "tol": 1e-4, "beta_ratio": 0.1},
    "relu, searched": {"head": "mlp", "activation": "relu", "solver": "relu-search", "tol": 1e-4, "beta_ratio": 0.1},
}
FEW = slice(12), slice(1), slice(2)
"""Of the tokens, for a ReLU: its dual norm is bounded tightly there."""


def fit(case, *, callback=None, checkpoint=None, **options):
    """One of the cases, with the method that it is meant for."""
    small, values, pays = fitting.SMALL_TOKENS, restriction.MOST_VALUES, vars(BlockCurvature)["pays"]
    try:
        if case == "ridge, blocks":
            BlockCurvature.pays = staticmethod(lambda passes, products: products > 1)
        if case == "factored":
            restriction.MOST_VALUES = 0
        if case == "single precision":
            fitting.SMALL_TOKENS = 0
        clf = ch.ConvexHeadClassifier(**{"beta_ratio": 0.1, "random_state": 0, **CASES[case]}, **options)
        tokens, labels = (X[FEW], Y[FEW[0]]) if case.startswith("relu") else (X, Y)
        return clf.fit(tokens, labels, callback=callback, checkpoint=checkpoint, checkpoint_minutes=0.0)
    finally:
        fitting.SMALL_TOKENS, restriction.MOST_VALUES, BlockCurvature.pays = small, values, pays


def everything(*cases, **options):
    """What processes of a run must agree on: all of it, or some of the cases."""
    results = {}
    for case in cases or CASES:
        clf = fit(case, **options)
        results[case] = [clf.certificate_.primal, clf.certificate_.dual, clf.certificate_.converged, clf.beta_]
    if cases:
        return results
    unseeded = ch.ConvexHeadClassifier("mlp", activation="gated-relu", n_gates=2, **options).fit(X, Y)
    results["unseeded"] = unseeded.gates_.tolist()
    reg = ch.ConvexHeadRegressor("mlp", loss="huber", random_state=0, **options).fit(X, TARGETS)
    results["regressor"] = [reg.certificate_.primal, reg.certificate_.dual, reg.certificate_.converged, reg.beta_]
    one = ch.ConvexHeadRegressor("mlp", activation="gated-relu", solver="group-newton", random_state=0, **options)
    one.fit(X, TARGETS[:, 0])
    results["one output"] = [one.certificate_.primal, one.certificate_.dual, one.certificate_.converged, one.beta_]
    several = ch.ConvexHeadClassifier(loss="binary-cross-entropy", pos_weight=3.0, fit_intercept=True, **options)
    several.fit(X, (TARGETS > 0).astype(float), ENTRY_W)
    depth = ch.ConvexHeadRegressor("mlp", loss="huber", pool=None, fit_intercept=True, **options)
    depth.fit(X, X[..., :1], TOKEN_W)
    for name, model in (("several labels", several), ("masks", depth)):
        certificate = model.certificate_
        results[name] = [certificate.primal, certificate.dual, certificate.converged, model.beta_]
    rows = regularization_path(
        X, TARGETS, loss="squared", head="mlp", beta_ratios=[0.3, 0.1], random_state=0, **options
    )
    results["path"] = [[row["objective"], row["train_score"]] for row in rows]
    results["audits"] = list(audits(**options))
    return results


def audits(**options):
    """What is found of heads that stopped early, by all processes together."""
    linear = (None, np.random.default_rng(1).normal(size=(5, 3)))
    certificate = ch.certify(linear, X, Y, beta=0.1, head="linear", tol=1e-6, **options)
    yield [certificate.primal, certificate.dual]
    found = audit(AttentiveProbe(5, 3, n_queries=3, seed=0), X, Y, beta=0.01, tol=1e-6, random_state=0, **options)
    assert found.missing is not None
    yield [found.certificate.primal, found.certificate.dual, found.proven.dual, found.missing.reward]


def launch(processes, tmp_path, *tasks):
    """Let several processes do ``tasks``: how each ended, and what it printed and complained."""
    out = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
    out.mkdir()
    command = [sys.executable, __file__, str(processes), str(out), *map(str, tasks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    texts = [[(out / f"{kind}-{rank}").read_text() for rank in range(processes)] for kind in ("stdout", "stderr")]
    return json.loads(done.stdout), *texts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "cases"),
    [(2, ()), pytest.param(4, ("factored", "ridge"), marks=pytest.mark.table)],
    ids=["2", "4"],
)
def test_several_processes_give_the_result_of_one(processes, cases, tmp_path):
    codes, outputs, errors = launch(processes, tmp_path, "everything", *cases)
    assert codes == [0] * processes, errors
    assert len(set(outputs)) == 1, "every process comes to the same, to the last bit"
    together, alone = json.loads(outputs[0]), everything(*cases)
    assert together.keys() == alone.keys()
    for case in alone.keys() - {"unseeded", "path", "audits"}:
        (primal, dual, converged, beta), (one, bound, same, weight) = together[case], alone[case]
        assert converged == same is True
        tol = CASES.get(case, {"tol": 1e-3})["tol"]
        assert beta == pytest.approx(weight, rel=1e-6)
        assert primal == pytest.approx(one, rel=max(1e-6, tol))
        assert dual <= one * (1 + 1e-9)
        assert bound <= primal * (1 + 1e-9)
    if not cases:
        assert np.shape(together["unseeded"]) == np.shape(alone["unseeded"])
        np.testing.assert_allclose(together["path"], alone["path"], rtol=1e-3)
        for one, other in zip(together["audits"], alone["audits"], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("factored", 6),
        pytest.param("relu, searched", 8, marks=pytest.mark.table),
        ("path", 12),
    ],
)
def test_a_lost_worker_ends_the_run_and_any_number_goes_on(kind, row, tmp_path):
    folder = tmp_path / "checkpoint"
    codes, outputs, errors = launch(3, tmp_path, "lose", folder, kind, row)
    assert codes == [1, -9, 1], errors
    assert not any(outputs)
    for rank in (0, 2):
        assert "another process of this run has stopped: see its message, then run the same again" in errors[rank]
    manifests = [json.loads(path.read_text()) for path in folder.rglob("checkpoint.json")]
    assert all(len(manifest["parts"]) == 3 for manifest in manifests)
    assert len(manifests) == 1 if kind in CASES else len(manifests) > 1
    shutil.copytree(folder, tmp_path / "copy")
    codes, outputs, errors = launch(2, tmp_path, "resume", tmp_path / "copy", kind)
    assert codes == [0, 0], errors
    assert outputs[0] == outputs[1]
    calm, rows = resume(None, kind)
    for found, left in (json.loads(outputs[0]), resume(folder, kind)):
        assert left < rows, "nothing was resumed"
        if kind == "path":
            (found, scores), (expected, others) = (np.split(np.array(rows), [2], axis=1) for rows in (found, calm))
            assert np.abs(scores - others).max() < 1.5 / 50  # one sample, which heads within 1e-3 may decide otherwise
        else:
            expected = calm
        np.testing.assert_allclose(found, expected, rtol=1e-6 if kind == "factored" else 2e-3)


@pytest.mark.slow
def test_the_clock_and_an_interrupt_stop_all_together(tmp_path):
    codes, outputs, errors = launch(2, tmp_path, "stop")
    assert codes == [0, 0], errors
    assert outputs[0] == outputs[1]
    clock, interrupt = json.loads(outputs[0])
    assert "max_time" in clock[0]
    assert "interrupted" in interrupt[0]
    assert interrupt[1] > 0
    assert 8 <= interrupt[2] < 40


# What the second process does otherwise, and what both must then be told.
DIFFERENT = {
    "tokens": "data (tokens) in process 0 and in process 1",
    "targets": "data (targets) in process 0 and in process 1",
    "weights": "sample weights in process 0 and in process 1",
    "shape": "shape of the tokens is",
    "samples": "shape of the targets is",
    "dtype": 'type of the tokens is "float64" in process 0 and "float32" in process 1',
    "memory map": "data (tokens) in process 0 and in process 1",
    "beta": "beta is 0.1 in process 0 and 0.2 in process 1",
    "gates": "gates in process 0 and in process 1",
    "seed": "random_state is 0 in process 0 and 1 in process 1",
    "head": 'head is "mlp" in process 0 and "linear" in process 1',
    "loss": "loss in process 0 and in process 1",
    "checkpoint": "checkpoint is null in process 0",
    "version": "version of convexhead is",
    "threads": "number of threads is 1 in process 0 and 2 in process 1",
    "another run": 'run is "fit" in process 0 and "path" in process 1',
    "path": "beta_ratios is [0.3, 0.1] in process 0 and [0.3, 0.2] in process 1",
    "held-out data": "held-out data (tokens) in process 0 and in process 1",
    "nan": "process 1 of 2 failed: Input X contains NaN",
    "nothing": "process 1 of 2 failed: This estimator requires y to be passed",
}


@pytest.mark.slow
def test_processes_with_unequal_inputs_all_say_what_differs(tmp_path):
    """One fit after the other in the same processes, so that each also shows that the one before is over."""
    codes, outputs, errors = launch(2, tmp_path, "differ", tmp_path)
    assert codes == [0, 0], errors
    assert outputs[0] == outputs[1]
    told = json.loads(outputs[0])
    assert told.keys() == {*DIFFERENT, "alike", "late", "memory maps alike"}
    for kind, message in DIFFERENT.items():
        assert message in told[kind], kind
    assert told["late"] is True
    assert told["alike"] == told["memory maps alike"] == "converged"


@pytest.mark.slow
def test_a_process_that_dies_before_it_joins_the_run(tmp_path):
    codes, _, errors = launch(2, tmp_path, "die")
    assert codes == [1, 3]
    assert "another process of this run has stopped" in errors[0]


@pytest.mark.slow
def test_an_extraction_of_unequal_processes(tmp_path):
    codes, outputs, errors = launch(2, tmp_path, "tokens", tmp_path / "store")
    assert codes == [0, 0], errors
    assert outputs[0] == outputs[1]
    token_pool, missing = json.loads(outputs[0])
    assert "token_pool is null in process 0 and [2, 2] in process 1" in token_pool
    assert "process 1 of 2 failed: " in missing


@pytest.fixture
def two_hosts():
    """Two network namespaces with a link between them: what to begin a command with on each."""
    names, links = ("convexhead-a", "convexhead-b"), ("cvxhd-a", "cvxhd-b")
    commands = [f"netns add {name}" for name in names]
    commands.append(f"link add {links[0]} type veth peer name {links[1]}")
    for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
        commands += [f"link set {link} netns {name}", f"-n {name} addr add 10.77.0.{number}/24 dev {link}"]
        commands += [f"-n {name} link set lo up", f"-n {name} link set {link} up"]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")
        yield [
            [
                *["ip", "netns", "exec", name, "env", "MASTER_ADDR=10.77.0.1", "MASTER_PORT=29500", "WORLD_SIZE=2"],
                *[f"RANK={rank}", f"GLOO_SOCKET_IFNAME={links[rank]}", sys.executable, __file__],
            ]
            for rank, name in enumerate(names)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.table
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs the ip command")
def test_two_hosts_and_one_that_vanishes(two_hosts, tmp_path):
    command = ["vanish", str(tmp_path / "checkpoint")]
    hosts = [
        subprocess.Popen([*begin, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for begin in two_hosts
    ]
    outputs, errors = zip(*(host.communicate(timeout=60) for host in hosts), strict=True)
    assert [host.returncode for host in hosts] == [1, 1], errors
    assert outputs[0] == outputs[1]
    primal, dual, converged, _ = json.loads(outputs[0])["factored"]
    alone = fit("factored").certificate_
    assert converged
    assert primal == pytest.approx(alone.primal, rel=1e-6)
    assert dual <= alone.primal
    assert all("another process of this run has stopped" in error for error in errors)
    assert (tmp_path / "checkpoint" / "checkpoint.json").exists()


@pytest.mark.slow
def test_command_line(tmp_path):
    store = extract("sklearn:digits", "patches:2", tmp_path / "store", channels=3)
    options = ["--head", "mlp", "--activation", "gated-relu", "--n-gates", "3", "--json", "--tol", "1e-5"]
    command = ["fit", str(store.path), *options, "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "convexhead", *command]
    torchrun += [str(tmp_path / "two"), "--checkpoint", "0"]
    done = subprocess.run([sys.executable, *torchrun], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)["certificate"]  # of one process, or this would be no JSON
    one = json.loads(CliRunner().invoke(app, [*command, str(tmp_path / "one")]).stdout)["certificate"]
    assert two["converged"]
    assert two["primal"] == pytest.approx(one["primal"], rel=2e-5)
    heads = [ch.load(tmp_path / name).predict_proba(store["test"]) for name in ("one", "two")]
    np.testing.assert_allclose(*heads, atol=0.05)
    assert not (tmp_path / "two.checkpoint").exists()


@pytest.mark.table
def test_paths_audits_and_scores_from_the_command_line(tmp_path):
    store = extract("sklearn:digits", "patches:2", tmp_path / "store", channels=3)
    two, one = tmp_path / "two", tmp_path / "one"

    def together(*arguments):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "convexhead"]
        command = [sys.executable, *torchrun, *map(str, arguments), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def alone(*arguments):
        return json.loads(CliRunner().invoke(app, [*map(str, arguments), "--json"]).stdout)

    path = ["path", store.path, "--head", "linear", "--beta-ratios", "0.1,0.01", "--checkpoint", "0"]
    shared, single = together(*path, "--out", two), alone(*path, "--out", one)
    assert shared["best"] == single["best"]
    for key in ("objective", "val_score", "train_score"):
        values = [[row[key] for row in found["rows"]] for found in (shared, single)]
        np.testing.assert_allclose(*values, rtol=1e-4)
    assert not two.with_name("two.checkpoint").exists()
    assert together("evaluate", two, store.path)["top1"] == alone("evaluate", two, store.path)["top1"]
    proofs = [audit_of("audit", two, store.path)["certificate"] for audit_of in (together, alone)]
    assert proofs[0]["primal"] == pytest.approx(proofs[1]["primal"], rel=1e-9)
    assert proofs[0]["dual"] == pytest.approx(proofs[1]["dual"], rel=1e-4)


def test_commands_that_share_nothing_refuse_several_processes(tmp_path):
    environment = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0"}
    done = CliRunner().invoke(app, ["predict", str(tmp_path), str(tmp_path)], env=environment)
    assert isinstance(done.exception, InputError)
    assert str(done.exception) == "predict works in one process: start it without torchrun"


def test_too_many_processes():
    with pytest.raises(InputError, match="3 samples cannot be shared by 4 processes: start fewer"):
        Ranks(0, 4).share(3)
    shares = [Ranks(rank, 4).share(11) for rank in range(4)]
    assert [row for share in shares for row in range(11)[share]] == list(range(11))


def resume(folder, kind="factored", callback=None, **options):
    """What comes of the run that was lost, and how many rows of progress it took."""
    rows = []

    def count(row):
        rows.append(row)
        if callback is not None:
            callback(row)

    saved = {"checkpoint": folder, "checkpoint_minutes": 0.0}
    several = {"head": "self-attention", "tol": 1e-3, "random_state": 0, "solver": "column-generation", **options}
    if kind == "path":
        of = {"beta_ratios": [0.4, 0.2, 0.1], "X_val": X[:50], "y_val": Y[:50], "progress": count}
        found = [
            [row["objective"], row["dual"], row["val_score"]]
            for row in regularization_path(X, Y, **of, **saved, **several)
        ]
    else:
        certificate = fit(kind, callback=count, checkpoint=folder, **options).certificate_
        assert certificate.converged
        found = [certificate.primal, certificate.dual]
    return found, len(rows)


def stopped(**options):
    """A run that the clock of one process ends, and one whose second process is interrupted."""
    rank, rows = int(os.environ["RANK"]), []

    def interrupt(row):
        rows.append(row)
        if rank == 1 and len(rows) == 8:
            os.kill(os.getpid(), signal.SIGINT)

    for clf in (
        fit("factored", max_time=1e-3 if rank else 1e6, **options),
        fit("factored", callback=interrupt, **options),
    ):
        yield clf.stop_reason_, clf.certificate_.gap, len(clf.history_)


def lose(folder, kind, last, **options):
    """A run whose second process is killed at a row of its progress."""
    rows = []

    def kill(row):
        rows.append(row)
        if os.environ["RANK"] == "1" and len(rows) == int(last):
            os.kill(os.getpid(), signal.SIGKILL)

    return resume(folder, kind, kill, **options)


def vanish(folder, **options):
    """A run that two hosts finish, and one whose second host is cut off."""
    print(json.dumps(everything("factored", **options)), flush=True)
    rows = []

    def cut(row):
        rows.append(row)
        if os.environ["RANK"] == "1" and len(rows) == 6:
            subprocess.run(["ip", "link", "set", os.environ["GLOO_SOCKET_IFNAME"], "down"], check=True)

    return resume(folder, callback=cut, **options)


class Bent(Squared):
    """A loss of a user's."""

    bend = 1.0


def differ(folder, *, distributed):
    """Fits whose second process has other inputs: what each is told."""
    second = os.environ["RANK"] == "1"
    other = rng.normal(size=(3, 5))

    def fit(X=X, y=TARGETS, sample_weight=None, checkpoint=None, callback=None, **options):
        options = {"beta": 0.1, "random_state": 0, "loss": Bent(), **options}
        reg = ch.ConvexHeadRegressor(options.pop("head", "mlp"), distributed=distributed, **options)
        reg.fit(X, y, sample_weight, checkpoint=checkpoint, callback=callback)
        return "converged" if reg.certificate_.converged else "not"

    def path(ratios=(0.3, 0.1), held=X):
        options = {"head": "linear", "loss": "squared", "random_state": 0, "X_val": held, "y_val": TARGETS}
        rows = regularization_path(X, TARGETS, beta_ratios=ratios, distributed=distributed, **options)
        return "converged" if rows[-1]["converged"] else "not"

    def mapped(kind, value):
        array = np.memmap(Path(folder) / f"{kind}-{os.environ['RANK']}", np.float32, "w+", shape=X.shape)
        array[:] = X
        array[5, 0, 0] = value
        return array

    def fail(row):
        raise InputError("the callback of the second process fails")

    with_nan = X.copy()
    with_nan[-1, 0, 0] = np.nan  # in the share of the second process
    moved, exchanged = X.copy(), TARGETS.copy()
    moved[0, 0, 0] += 1e-9  # in the share of the first
    exchanged[[0, 1]] = exchanged[[1, 0]]
    gated = {"activation": "gated-relu"}
    calls = {
        "tokens": lambda: fit(moved if second else X),
        "alike": fit,
        "targets": lambda: fit(y=exchanged if second else TARGETS),
        "shape": lambda: fit(X[:, :4] if second else X),
        "samples": lambda: fit(X[:200], TARGETS[:200]) if second else fit(),
        "dtype": lambda: fit(X.astype(np.float32).astype(np.float32 if second else np.float64)),
        "memory map": lambda: fit(mapped("unequal", float(second))),
        "beta": lambda: fit(beta=0.2 if second else 0.1),
        "gates": lambda: fit(**gated, gates=(other + 1e-12 * second).tolist()),
        "seed": lambda: fit(**gated, random_state=int(second)),
        "head": lambda: fit(head="linear" if second else "mlp"),
        "loss": lambda: fit(),
        "checkpoint": lambda: fit(checkpoint=Path(folder) / "c" if second else None),
        "version": lambda: fit(),
        "threads": lambda: fit(head="linear"),
        "another run": lambda: path() if second else fit(),
        "path": lambda: path((0.3, 0.2) if second else (0.3, 0.1)),
        "held-out data": lambda: path(held=moved if second else X),
        "weights": lambda: fit(sample_weight=np.arange(1.0, 204) + second),
        "nan": lambda: fit(with_nan if second else X),
        "nothing": lambda: fit(y=None if second else TARGETS),
        "late": lambda: fit(callback=fail if second else None),
        "memory maps alike": lambda: fit(mapped("equal", 1.0)),
    }
    told = {}
    for kind, call in calls.items():
        with contextlib.ExitStack() as held:
            if kind == "loss" and second:
                held.enter_context(patch.object(Bent, "bend", 2.0))
            if kind == "version" and second:
                held.enter_context(patch.dict(fitting.SOFTWARE, {"version of convexhead": "0.0"}))
            if kind == "threads":
                held.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(1 + second)
            try:
                told[kind] = call()
            except ConvexHeadError as error:
                told[kind] = str(error) if isinstance(error, InputError) or kind == "late" else repr(error)
    mine, others = "the callback of the second process fails", "another process of this run has stopped"
    told["late"] = (mine if second else others) in told["late"]
    return told


def die(*, distributed):
    """A fit whose second process has ended before it."""
    if os.environ["RANK"] == "1":
        time.sleep(2)  # the first one has to be connected, which the library does not answer for
        os._exit(3)
    return fit("ridge", distributed=distributed)


def tokens(folder, *, distributed):
    """Extractions whose second process is asked for something else, or has no images."""
    second = os.environ["RANK"] == "1"
    for source, token_pool in [
        ("sklearn:digits", 2 if second else None),
        ("/nowhere" if second else "sklearn:digits", None),
    ]:
        with pytest.raises(InputError) as error:
            extract(source, "patches:2", folder, token_pool=token_pool)
        yield str(error.value)


def work(task, *arguments):
    """What one process does; its exit code."""
    warnings.simplefilter("ignore")
    tasks = {"everything": everything, "resume": resume, "stop": stopped, "lose": lose, "vanish": vanish}
    tasks |= {"differ": differ, "die": die, "tokens": tokens}
    try:
        result = tasks[task](*arguments, distributed=True)
        print(json.dumps(result if isinstance(result, (dict, tuple)) else list(result)), flush=True)
    except ConvexHeadError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0


def fork(size, out, *task):
    """Processes of a run on this machine, forked so that they need not import everything; how they ended."""
    children = []
    for rank in range(size):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ["RANK"] = str(rank)
            sys.stdout, sys.stderr = (open(out / f"{kind}-{rank}", "w") for kind in ("stdout", "stderr"))  # noqa: SIM115
            torch.distributed.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=size)
            os._exit(work(*task))
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    if "RANK" in os.environ:
        ranks.PATIENCE = timedelta(seconds=6)
        torch.distributed.init_process_group("gloo")
        os._exit(work(*sys.argv[1:]))
    print(json.dumps(fork(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])))
