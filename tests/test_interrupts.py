"""Real processes and real signals: exit code 130, one sentence, no traceback, and what is left can be read."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import convexhead as ch
from convexhead.tokens import extract

pytest.importorskip("PIL")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals of Unix")]

SCRIPT = """
import contextlib, sys
from convexhead.interrupts import interrupts
with interrupts.watch():
    # As the command itself, but it says where it is on a line each: that is when the test sends its signal.
    from convexhead.cli import fit, main

    @contextlib.contextmanager
    def announced(quiet):
        last = None
        def notify(what, done=0, total=0, detail=""):
            nonlocal last
            if last != (what, done):
                last = what, done
                print(f"at: {what} {done}", file=sys.stderr, flush=True)
        yield notify

    fit.shown_progress = announced
    main()
"""
LONG = ("--tol", "1e-12", "--n-gates", "20", "--activation", "gated-relu")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return extract("sklearn:digits", "patches:2", tmp_path_factory.mktemp("signals") / "tokens").path


@pytest.fixture(scope="module")
def run(store):
    clf = ch.ConvexHeadClassifier("linear", beta_ratio=0.1, tol=0.01).fit(ch.TokenStore.open(store)["train"])
    clf.save(store.parent / "run")
    return store.parent / "run"


def hears_interrupts() -> None:
    """A shell lets what it starts in the background ignore them, and so its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def begin(*arguments: object, script: str | None = None) -> subprocess.Popen[str]:
    program = ["-m", "convexhead"] if script is None else ["-c", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=hears_interrupts,
    )  # fmt: skip


def end(process: subprocess.Popen[str], code: int = 130) -> tuple[str, str]:
    """What a process printed that must end of itself, as a signal's victim in good order."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, err
    for sign in ("Traceback", "Exception", "Error"):
        assert sign not in err
    return out, err


def wait_for(process: subprocess.Popen[str], sign: str) -> None:
    """Read what a process says on standard error up to a line with ``sign``."""
    assert process.stderr is not None
    while sign not in (line := process.stderr.readline()):
        assert line, f"it ended without {sign!r}"


def test_fit_keeps_its_best_head_with_an_honest_certificate(store, tmp_path):
    process = begin("fit", store, "--out", tmp_path / "run", *LONG, "--json", script=SCRIPT)
    wait_for(process, "at: training")
    time.sleep(random.uniform(0, 2))
    process.send_signal(signal.SIGINT)
    out, err = end(process)
    assert "stopping" in err
    assert f"the best head so far is saved in {tmp_path / 'run'}" in err
    told = json.loads(out)["certificate"]
    clf = ch.load(tmp_path / "run")
    assert clf.certificate_.to_dict() == told
    assert not told["converged"]
    again = ch.certify(clf, ch.TokenStore.open(store)["train"], beta=clf.beta_)
    assert again.primal == pytest.approx(told["primal"], rel=1e-9)
    assert told["dual"] <= again.primal


def test_fit_goes_on_from_its_checkpoint(store, tmp_path):
    arguments = ("fit", store, "--out", tmp_path / "run", *LONG, "--checkpoint", "1000")
    process = begin(*arguments, script=SCRIPT)
    wait_for(process, "at: training")
    time.sleep(random.uniform(0.5, 2))
    process.send_signal(signal.SIGINT)
    _, err = end(process)
    assert "goes on from its checkpoint" in err
    if (tmp_path / "run.checkpoint").exists():  # not where the first step was not over yet
        second = begin(*arguments, "--max-time", "0.1", script=SCRIPT)
        out, err = end(second, 0)
        assert "saved in" in out


def test_path_keeps_what_is_finished(store, tmp_path):
    ratios = ",".join(f"{0.5 * 0.8**k:.4f}" for k in range(20))
    process = begin("path", store, "--out", tmp_path / "best", "--beta-ratios", ratios, "--tol", "1e-4", "--json",
                    script=SCRIPT)  # fmt: skip
    wait_for(process, " 2\n")
    process.send_signal(signal.SIGINT)
    out, err = end(process)
    result = json.loads(out)
    assert 2 <= len(result["rows"]) < 20
    assert f"{len(result['rows'])} of 20 β are done, the best head so far is saved" in err
    assert all(row["converged"] for row in result["rows"])
    clf = ch.load(tmp_path / "best")
    assert clf.certificate_.converged
    assert clf.beta_ == next(row["beta"] for row in result["rows"] if row["beta_ratio"] == result["best"])
    out, _ = end(begin("evaluate", tmp_path / "best", store, "--json"), 0)
    assert json.loads(out)["images"] == 540


def test_a_second_signal_ends_at_once(store, tmp_path):
    process = begin("fit", store, "--out", tmp_path / "run", *LONG, script=SCRIPT)
    wait_for(process, "at: training")
    process.send_signal(signal.SIGINT)
    wait_for(process, "again ends at once")
    process.send_signal(signal.SIGINT)
    end(process)
    if (tmp_path / "run").exists():  # the first one may have been quicker
        ch.load(tmp_path / "run")


def test_sigterm_asks_for_the_same(store, tmp_path):
    process = begin("fit", store, "--out", tmp_path / "run", *LONG, script=SCRIPT)
    wait_for(process, "at: training")
    process.send_signal(signal.SIGTERM)
    end(process, 143)
    assert not ch.load(tmp_path / "run").certificate_.converged


COMMANDS = {
    "fit": ("STORE", "--out", "OUT", *LONG),
    "path": ("STORE", "--out", "OUT", "--tol", "1e-9"),
    "extract": ("sklearn:digits", "--backbone", "patches:4", "--shard-size", "20", "--out", "OUT"),
    "compare": ("STORE", "--out", "OUT", "--heads", "linear,mlp", "--seeds", "2"),
    "probe": ("STORE", "--out", "OUT", "--heads", "linear,mlp", "--baselines", "k-nn"),
    "evaluate": ("RUN", "STORE"),
    "audit": ("RUN", "STORE"),
    "report": ("RUN", "--tokens", "STORE", "--out", "OUT"),
    "adam": ("STORE", "--out", "OUT", "--epochs", "2000"),
    "demo": ("--out", "OUT"),
}


@pytest.mark.table
@pytest.mark.parametrize("command", COMMANDS)
def test_any_command_at_any_moment(store, run, tmp_path, command):
    """Signals at random moments, from the first import on; the same command then works on what is left."""
    places = {"STORE": store, "RUN": run, "OUT": tmp_path / "out"}
    arguments = [command, *(places.get(a, a) for a in COMMANDS[command])]
    for _ in range(4):
        process = begin(*arguments)
        time.sleep(random.uniform(0.5, 20))
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
        assert process.returncode in (0, 130), err
        assert "Traceback" not in err
        if process.returncode == 130:
            assert "interrupted: " in err
    readable(tmp_path / "out", command)


def readable(out: Path, command: str) -> None:
    """Whatever a stopped command left is whole, or what the next run of it takes."""
    if command in ("fit", "path", "adam") and out.exists():
        ch.load(out)
    if command == "extract":
        assert "images" in end(begin(*["extract", *COMMANDS["extract"][:-1], out]), 0)[0]
    if command == "report" and out.exists():
        assert out.read_text().rstrip().endswith("</html>")


@pytest.mark.parametrize("command", ["evaluate", "extract"])
def test_commands_that_keep_nothing_say_so(store, run, tmp_path, command):
    """While they are still being imported, too."""
    places = {"STORE": store, "RUN": run, "OUT": tmp_path / "out"}
    process = begin(command, *(places.get(a, a) for a in COMMANDS[command]))
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = end(process)
    assert err.startswith("interrupted: ")
    assert len(err.splitlines()) == 1


def test_a_reader_that_has_enough(store):
    """As ``| head``: the reader is gone before anything is printed."""
    process = begin("store", "info", store)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=120)
    assert err == ""
    assert process.returncode == 1
