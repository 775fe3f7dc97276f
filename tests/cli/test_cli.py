"""The command line on a real folder of images: each step one command, exit codes, JSON, one-line errors."""

from __future__ import annotations

import inspect
import io
import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import convexhead as ch

pytest.importorskip("PIL")
from PIL import Image
from rich.console import Console

from command import call
from convexhead import runs
from convexhead.cli import adam, compare, fit, probe, progress
from convexhead.cli.entry import name_options, options_of
from convexhead.spec import OF_QUERIES

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes of 8 x 8 images that differ in where their colour sits."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 30), ("test", 8)):
        for c, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (8, 8, 3))
                corner = (slice(0, 4), slice(4, 8))[i % 2]
                pixels[corner, corner, c] += 110
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def work(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    call(
        "extract",
        photos,
        "--backbone",
        "patches:4",
        "--out",
        folder / "tokens",
        "--channels",
        11,
        "--reduce",
        "pca",
        "--constant",
    )
    return folder


def call_json(capsys, *arguments):
    capsys.readouterr()
    assert call(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_extract_says_what_it_found(photos, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "train" / "red" / "odd[bold].txt").write_text("")
    (folder / "train" / "red" / "bad.png").write_text("")
    arguments = ("extract", folder, "--backbone", "patches:4", "--out", tmp_path / "out")
    assert call(*arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "bad.png': it is empty" in error
    assert call(*arguments, "--skip-broken") == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[-3:] == [
        "train: 91 images of 3 classes, 30 to 31 a class (median 30)",
        "test: 24 images of 3 classes, 8 to 8 a class (median 8)",
        "not read, not an image (.txt): 1 ('train/red/odd[bold].txt')",
    ]
    assert "left out: 'train/red/bad.png'" in output.err
    found = call_json(capsys, "store", "info", tmp_path / "out")["found"]
    assert found["splits"]["train"] == {"images": 91, "per_class": [30, 30, 31]}


def test_from_images_to_an_audit(work, capsys):
    store = work / "tokens"
    info = call_json(capsys, "store", "info", store)
    assert info["images"] == {"train": 90, "test": 24}
    assert (info["tokens"], info["channels"]) == (4, 12)

    fitted = call_json(capsys, "fit", store, "--out", work / "run", "--beta-ratio", 0.05)
    assert fitted["certificate"]["converged"]
    assert fitted["certificate"]["relative_gap"] <= 1e-3

    score = call_json(capsys, "evaluate", work / "run", store)
    assert score["images"] == 24
    low, high = score["top1_interval"]
    assert score["top1"] > 0.6
    assert low < score["top1"] < high or score["top1"] == high == 1

    trained = call_json(
        capsys, "adam", store, "--out", work / "adam", "--beta-ratio", 0.05, "--epochs", 20, "--heads", 6
    )
    assert trained["beta"] == pytest.approx(fitted["beta"])
    loose = call_json(capsys, "audit", work / "adam", store)["certificate"]
    tight = call_json(capsys, "audit", work / "adam", store, "--reference", work / "run")["certificate"]
    assert tight["dual"] >= fitted["certificate"]["dual"] - 1e-9  # less what rounding may do to the objective
    assert tight["dual"] <= fitted["certificate"]["primal"]
    assert 0 <= tight["gap"] <= loose["gap"]

    path = call_json(capsys, "path", store, "--beta-ratios", "0.3,0.1", "--out", work / "best")
    assert [row["beta_ratio"] for row in path["rows"]] == [0.3, 0.1]
    assert call_json(capsys, "evaluate", work / "best", store, "--split", "train")["images"] == 90

    assert call_json(capsys, "store", "verify", store)["intact"]
    assert call("store", "export", store, "--out", work / "arrays") == 0
    assert np.load(work / "arrays" / "train-tokens.npy", allow_pickle=False).shape == (90, 4, 12)


def test_an_exported_module_takes_raw_tokens(work):
    if not (work / "run").exists():
        call("fit", work / "tokens", "--out", work / "run")
    view = ch.TokenStore.open(work / "tokens")["test"]
    clf = ch.load(work / "run")
    module = clf.to_module(raw_tokens=True)
    logits = module(torch.from_numpy(view.raw(0, 24).astype(np.float32))).detach().numpy()
    np.testing.assert_allclose(logits, clf.decision_function(view), atol=1e-4)


@pytest.mark.slow
def test_compare_writes_a_page(work, capsys):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    out = work / "comparison"
    result = call_json(
        capsys, "compare", work / "tokens", "--out", out, "--heads", "mlp,linear", "--beta-ratios", "0.1", "--seeds", 1
    )
    assert [(row["head"], row["activation"]) for row in result["rows"]] == [
        ("mlp", "linear"),
        ("linear", "linear"),
        ("mlp", "gated-relu"),
    ]
    for row in result["rows"]:
        assert row["certificate"]["converged"]
        assert row["twin"]["runs"][0]["objective"] >= row["certificate"]["dual"]
    assert "</html>" in (out / "index.html").read_text()
    # Its models know the store that they come from, as those of `fit` do.
    saved = out / "models" / "mlp-linear"
    assert call_json(capsys, "evaluate", saved, work / "tokens")["top1"] == result["rows"][0]["test_accuracy"]
    assert call_json(capsys, "audit", saved, work / "tokens")["certificate"]["converged"]
    assert {"results.json", "table.md", "table.csv", "models", "figures"} <= {p.name for p in out.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(("n_queries", "norm"), [(5, "each"), (20, "each"), (20, "all")])  # 16 are trained at most
def test_compare_takes_the_queries_of_an_attentive_head(work, tmp_path, capsys, n_queries, norm):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    out, queries = tmp_path / "comparison", ("--n-queries", n_queries, "--query-norm", norm, "--key-dim", 2)
    options = ("--heads", "attentive", "--beta-ratios", 0.3, "--seeds", 1, *queries)
    result = call_json(capsys, "compare", work / "tokens", "--out", out, *options)
    (row,) = result["rows"]
    assert row["certificate"]["scope"] == "sampled-queries"
    (trained,) = (method for method in result["methods"] if method["method"].endswith("queries trained"))
    assert 0 < trained["test_top1"] <= 1

    assert row["twin"]["runs"][0]["objective"] >= row["certificate"]["dual"]
    saved = ch.load(out / "models" / "attentive-linear")
    assert "the same fixed queries, which were sampled once" in (out / "index.html").read_text()
    assert len(saved.queries_) == n_queries
    assert saved.query_norm == norm
    assert (
        call_json(capsys, "evaluate", out / "models" / "attentive-linear", work / "tokens")["top1"]
        == (row["test_accuracy"])
    )
    assert call("compare", work / "tokens", "--out", work / "x", "--heads", "mlp", "--n-queries", 5) == 1
    assert "n_queries is a setting of the attentive head" in capsys.readouterr().err


def test_tables_for_people(work, capsys):
    assert call("path", work / "tokens", "--beta-ratios", "0.3", "--head", "mlp") == 0
    assert call("store", "info", work / "tokens") == 0
    out = capsys.readouterr().out
    assert "validation" in out
    assert "patches:4" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("fit", "nowhere", "--out", "x"), 1, "nowhere"),
        (("fit", "STORE", "--out", "x", "--head", "self-atention"), 1, "did you mean 'self-attention'"),
        (("fit", "STORE", "--out", "x", "--beta-ratio", "-1"), 1, "beta_ratio must be a positive number"),
        (("fit", "STORE", "--out", "x", "--beta-ratio", "-1"), 1, "(option --beta-ratio)"),
        (("path", "STORE", "--out", "x", "--validation", "1"), 1, "(option --validation)"),
        (("compare", "STORE", "--out", "x", "--seeds", "-1"), 2, "--seeds"),
        (("fit", "STORE", "--out", "PHOTOS"), 1, "exists and is not a model folder"),
        (("fit", "STORE"), 2, "--out"),
        (("fit", "STORE", "--out", "x", "--tol", "small"), 2, "--tol"),
        (("nonsense",), 2, "nonsense"),
        (("path", "STORE", "--beta-ratios", "a,b"), 1, "numbers separated by commas"),
        (("evaluate", "nowhere", "STORE"), 1, "not a model folder"),
        (("evaluate", "RUN", "STORE", "--split", "val"), 1, "no split 'val', only train, test"),
        (("audit", "RUN", "STORE", "--reference", "nowhere"), 1, "not a model folder"),
        (("compare", "STORE", "--out", "x", "--heads", "mpl"), 1, "did you mean 'mlp'"),
        (("extract", "nowhere", "--out", "x"), 1, "nowhere"),
        (("extract", "PHOTOS", "--out", "x", "--backbone", "patch:4"), 1, "patches"),
        (("extract", "PHOTOS", "--out", "x", "--reduce", "ica"), 2, "ica"),
        (("store", "verify", "PHOTOS"), 1, "token store"),
    ],
)
def test_errors_are_one_line(work, photos, capsys, tmp_path, monkeypatch, arguments, code, message):
    if not (work / "run").exists():
        call("fit", work / "tokens", "--out", work / "run")
    monkeypatch.chdir(tmp_path)
    places = {"STORE": work / "tokens", "RUN": work / "run", "PHOTOS": photos}
    capsys.readouterr()
    assert call(*(places.get(a, a) for a in arguments)) == code
    printed = capsys.readouterr().err.strip()
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "a failed command left something behind"


@pytest.mark.slow
def test_version_and_help_import_nothing_heavy():
    """Nor does the package itself, until a name of it is used."""
    program = """
import sys
import convexhead
assert set(convexhead.__all__) <= set(dir(convexhead))
from convexhead.__main__ import main
for sys.argv in (["convexhead"], ["convexhead", "--version"], ["convexhead", "--help"]):
    try:
        main()
    except SystemExit:
        pass
print(*{"torch", "numpy", "scipy", "sklearn"} & set(sys.modules), file=sys.stderr)
convexhead.Certificate
assert "torch" in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert run.stderr == "\n"
    assert "certified global optimum" in run.stdout
    assert "twin" not in run.stdout


def test_options_of_fit_are_those_of_the_estimator():
    parameters = inspect.signature(ch.ConvexHeadClassifier).parameters
    # the store's, arrays, torchrun's, the progress line, and the loss, which fits the store's labels by default
    elsewhere = {"grid", "gates", "queries", "distributed", "verbose", "loss", "ignore_index"}
    options = dict(inspect.signature(fit.fit).parameters)
    assert options.pop("seed").default == 0
    for own in ("store", "out", "checkpoint", "cv", "groups", "whiten", "overwrite", "log", "loss", "as_json"):
        del options[own]
    assert {*options, "random_state"} == {*parameters} - elsewhere
    assert {name: o.default for name, o in options.items()} == {name: parameters[name].default for name in options}


@pytest.mark.parametrize("other", [compare.compare, probe.probe])
def test_runs_of_several_heads_take_the_queries_of_fit(other):
    theirs, options = inspect.signature(other).parameters, inspect.signature(fit.fit).parameters
    for name in OF_QUERIES:
        if name != "queries":  # arrays have no option
            assert (theirs[name].annotation, theirs[name].default) == (options[name].annotation, options[name].default)


@pytest.mark.parametrize("other", [fit.path, adam.adam])
def test_commands_share_their_options(other):
    theirs, options = inspect.signature(other).parameters, inspect.signature(fit.fit).parameters
    shared = {*theirs} & {*options} - {"out"}
    assert {"head", "activation", "pool", "n_gates", "n_blocks", "outputs", "fit_intercept", "seed"} <= shared
    for name in shared:
        assert (theirs[name].annotation, theirs[name].default) == (options[name].annotation, options[name].default)


def test_refusals_name_options():
    options = options_of(fit.fit)
    assert options["n_gates"] == "--n-gates"
    assert "store" not in options
    assert options_of(adam.adam)["n_heads"] == "--heads"
    assert name_options("unknown head 'x': choose one", options) == "unknown head 'x': choose one (option --head)"
    assert name_options("--tol must be positive: tol=0", options) == "--tol must be positive: tol=0"
    plain = "the head has no output, so its seed and the pool are out"
    assert name_options(plain, options) == plain


def test_the_old_name_of_adam_warns(work, capsys):
    assert call("twin", work / "tokens", "--out", work / "old-name", "--epochs", 1, "--heads", 2, "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["run"] == str(work / "old-name")
    assert "note: `convexhead twin` is now called `convexhead adam`" in printed.err


def test_python_does_what_commands_do(work, capsys):
    told = call_json(capsys, "fit", work / "tokens", "--out", work / "by-command", "--head", "mlp")
    clf = runs.fit(work / "tokens", work / "by-call", head="mlp", random_state=0)
    assert clf.certificate_.primal == pytest.approx(told["certificate"]["primal"], rel=1e-12)
    for run in ("by-command", "by-call"):
        score = runs.evaluate(work / run, work / "tokens")
        assert score == call_json(capsys, "evaluate", work / run, work / "tokens")
        assert score["top1"] == clf.score(ch.TokenStore.open(work / "tokens")["test"])


def test_a_log_has_a_line_now_and_then():
    now, lines = 0.0, []
    log = progress.Log(lines.append, lambda: now)
    log("training", 0, 100, "gap 1")
    assert lines == []  # a quick command says nothing
    when = []
    for step in range(1, 4001):
        now = float(step)
        log("training", step // 40, 100, "gap 0.1")
        when += [step] * (len(lines) - len(when))
    assert when[0] == 5
    assert lines[0] == "training, 0/100, gap 0.1, 5 s so far"
    assert all(after - before >= max(10, 0.05 * before) for before, after in itertools.pairwise(when))
    assert all(after - before <= max(11, 0.06 * before) for before, after in itertools.pairwise(when))
    assert lines[-1].startswith(f"training, {when[-1] // 40}/100, gap 0.1, {when[-1] / 60:.0f} min so far, about ")


def test_a_log_goes_on_while_a_job_has_no_news():
    now, lines = 0.0, []
    log = progress.Log(lines.append, lambda: now)
    log("preparing")
    for now in (4.0, 6.0, 7.0, 17.0):  # noqa: B007
        log.tick()
    assert lines == ["preparing, 6 s so far", "preparing, 17 s so far"]


def test_the_time_left_is_that_of_the_steps_so_far():
    now = 0.0
    pace = progress.Pace(lambda: now)
    left = []
    for now, done in ((0.0, 2), (10.0, 2), (20.0, 4), (25.0, 4), (65.0, 4), (80.0, 6), (90.0, 8)):  # noqa: B007
        left.append(pace.left(done, 8))
    # 2 steps in 20 s: 4 more take 40 s, and later than that nothing is said. 4 steps in 80 s: 2 take 40 s.
    assert left == [None, None, 40.0, 35.0, None, 40.0, None]
    now = 61.0
    assert pace.left(0, 3) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("fit", "STORE", "--out", "OUT"), "training, objective 0"),
        (("path", "STORE", "--beta-ratios", "0.3,0.1"), "β/β_max 0.1, 1/2, objective 0"),
        (("adam", "STORE", "--out", "OUT", "--epochs", "20"), "Adam's epochs, "),
        (("compare", "STORE", "--out", "OUT", "--heads", "mlp", "--activations", "linear", "--beta-ratios", "0.1",
          "--seeds", "1"), "mlp-linear/path, 1/"),
        (("extract", "PHOTOS", "--backbone", "patches:4", "--out", "OUT"), "tokens of train images, "),
        (("evaluate", "RUN", "STORE"), "scoring, "),
        (("audit", "RUN", "STORE"), "certifying, "),
        (("store", "verify", "STORE"), "reading the store, "),
    ],
)  # fmt: skip
def test_progress_without_a_terminal(work, photos, tmp_path, capsys, monkeypatch, arguments, line):
    """Lines on standard error, and nothing but the result on standard output; with --json nothing but JSON."""
    if not (work / "run").exists():
        call("fit", work / "tokens", "--out", work / "run")
    places = {"STORE": work / "tokens", "PHOTOS": photos, "RUN": work / "run"}
    monkeypatch.setattr(progress, "monotonic", itertools.count(0.0, 100.0).__next__)
    capsys.readouterr()
    assert call(*(places.get(a, tmp_path / "loud" if a == "OUT" else a) for a in arguments)) == 0
    printed = capsys.readouterr()
    assert any(told.startswith(line) for told in printed.err.splitlines()), printed.err
    assert "so far" not in printed.out
    assert call(*(places.get(a, tmp_path / "quiet" if a == "OUT" else a) for a in arguments), "--json") == 0
    printed = capsys.readouterr()
    assert "so far" not in printed.err
    assert isinstance(json.loads(printed.out), dict)


def test_progress_on_a_terminal(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "errors", Console(file=screen, force_terminal=True, width=120))
    with progress.shown_progress(False) as notify:
        notify("β/β_max [0.1]", 1, 4, "gap 0.1")
    for part in ("β/β_max [0.1]", "1/4", "gap 0.1"):
        assert part in screen.getvalue()
    screen.truncate(0)
    with progress.shown_progress(True) as notify:
        notify("training", 1, 4)
    assert screen.getvalue() == ""


def test_a_real_process():
    run = subprocess.run(
        [sys.executable, "-m", "convexhead", "--version"], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == ch.__version__


def test_relu_head_by_every_command(work, capsys):
    """Fit, Adam and audit of a true ReLU head; what is estimated is called so."""
    options = ("--head", "mlp", "--activation", "relu", "--beta-ratio", "0.3")
    assert call("fit", work / "tokens", "--out", work / "relu", *options, "--max-time", "2", "--json") == 0
    fitted = json.loads(capsys.readouterr().out)["certificate"]
    assert fitted["scope"] in ("global", "estimated")
    assert fitted["ascents"] > 0
    assert call("adam", work / "tokens", "--out", work / "relu-adam", *options, "--epochs", "2", "--json") == 0
    capsys.readouterr()
    assert call("audit", work / "relu-adam", work / "tokens", "--json") == 0
    audited = json.loads(capsys.readouterr().out)["certificate"]
    assert audited["primal"] >= fitted["dual"]
    assert audited["scope"] != "estimated" or not audited["converged"]
