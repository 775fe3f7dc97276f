"""The published experiment on a small folder of images: nothing is chosen on test images, and a killed run goes on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
from PIL import Image

import convexhead as ch
from convexhead.baselines.attentive_probe import AttentiveProbe
from convexhead.baselines.passes import objectives
from convexhead.errors import ConvexHeadError, FileFormatError, InputError
from convexhead.experiments import cifar100, comparison, rows
from convexhead.experiments.cells import (
    AdamSettings,
    Cell,
    PathSettings,
    fit_path,
    preferred,
    problem_of,
    restore_network,
    train_with_adam,
)
from convexhead.experiments.splits import Subset, TokenChoice, choose_images, chosen_splits, hold_out
from convexhead.experiments.tuning import tune
from convexhead.report.methods import COLUMNS
from convexhead.runtime.run_folder import Piece, RunFolder
from convexhead.tokens import TokenStore, extract, open_source

pytestmark = pytest.mark.slow
CLASSES = 6
SMALL = {"scale": "2k", "channels": 9, "epochs": 2, "n_gates": 2, "heads": ("self-attention", "linear"), "jobs": 1}
TIMES = ("seconds", "seconds_total", "convex_seconds_ratio")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six classes of 8 x 8 images that differ in colour and in where it sits."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 15), ("test", 4)):
        for c in range(CLASSES):
            (folder / split / f"class{c}").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (8, 8, 3))
                corner = (slice(0, 4), slice(4, 8))[(i + c // 3) % 2]
                pixels[corner, corner, c % 3] += 110
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / f"class{c}" / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def store(photos, tmp_path_factory):
    return extract(photos, "patches:4", tmp_path_factory.mktemp("tokens") / "store")


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """A run from images to page."""
    out = tmp_path_factory.mktemp("runs") / "run"
    log = out.with_name("rows.csv")
    return out, cifar100.run_cifar100(out, images=str(photos), backbone="patches:4", sizes=True, log=log, **SMALL)


def without_times(methods):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in methods]


# -- the table --------------------------------------------------------------------------------------------------------
def test_every_method_is_reported(finished):
    _, results = finished
    rows = results["methods"]
    assert [(row["head"], row["activation"]) for row in rows if row["method"] == "convex"] == [
        ("self-attention", "linear"),
        ("linear", "linear"),
        ("self-attention", "gated-relu"),
    ]
    assert sum(row["method"].startswith("Adam,") for row in rows) == 3
    assert sum(row["method"] == "probe" for row in rows) == 3  # patches have no class token
    for row in rows:
        assert 0 <= row["test_top1"] <= row["test_top5"] <= 1
        assert row["fits"] >= 1
        assert row["parameters"] > 0
        assert row["seconds_total"] >= row["seconds"] * 0.999
        if row["method"] == "convex":
            assert row["relative_gap"] <= 1e-3
            assert row["converged"]
        elif row["head"].startswith("Linear probe"):
            assert row["relative_gap"] <= 1e-3
            assert row["scope"] == "global"
        elif row["method"] != "probe":
            assert row["seeds"] == 3
            assert row["excess_worst"] >= row["excess_median"] >= -1e-3


def test_a_reported_objective_is_that_of_the_kept_weights(finished, photos):
    out, results = finished
    splits = chosen_splits(TokenStore.open(out / "tokens"), choice_of(results))
    for row in results["rows"]:
        name = f"{row['head']}-{row['activation']}"
        model = ch.load(out / "models" / name)
        problem = problem_of(model, splits.train)
        primal, _ = objectives(problem, model.model_.atoms, model.beta_)
        assert primal == pytest.approx(row["certificate"]["primal"], rel=1e-5)
        for run in row["twin"]["runs"]:
            atoms = 1 if row["head"] == "linear" else 20
            kept = f"{name}/l2-{atoms}-lr{row['twin']['learning_rate']:g}-seed{run['seed']}"
            piece = RunFolder(out).once(kept, pytest.fail)
            module = restore_network(model, piece.tensors)
            assert objectives(problem, module.to_atoms(), model.beta_)[0] == pytest.approx(run["objective"], rel=1e-5)
            logits = module(torch.from_numpy(splits.load_test().tokens[:])).detach().numpy()
            right = (logits.argmax(1) == splits.load_test().labels).mean()
            assert right == pytest.approx(run["test_accuracy"], abs=1e-9)


def test_a_tracker_has_a_row_for_every_training(finished):
    """Of cells in other processes and of the runs on fewer images, too."""
    out, results = finished
    with open(out.with_name("rows.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    runs = {"CIFAR-100, every head": out, **{f"{folder.name} a class": folder for folder in (out / "sizes").iterdir()}}
    assert len(runs) > 1
    for title, folder in runs.items():
        told = [row["piece"] for row in rows if row["run"] == title]
        assert sorted(told) == sorted(set(RunFolder(folder).names()) - {"test"})
    proofs = {f"{row['head']}-{row['activation']}/path": row["certificate"] for row in results["rows"]}
    found = {row["piece"]: row for row in rows if row["run"] == "CIFAR-100, every head"}
    assert proofs.keys() <= found.keys()
    for name, proof in proofs.items():
        assert float(found[name]["objective"]) == proof["primal"]
        assert float(found[name]["relative_gap"]) == proof["relative_gap"]


def choice_of(results):
    return TokenChoice(**results["settings"]["tokens"])


def test_files_of_a_run(finished):
    out, results = finished
    assert "</html>" in (out / "index.html").read_text()
    with (out / "methods.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results["methods"])
    assert [float(row["test_top1"]) for row in rows] == [row["test_top1"] for row in results["methods"]]
    assert all(row["cpu"] and row["torch"] for row in rows)
    kept = json.loads((out / "results.json").read_text())
    assert without_times(kept["methods"]) == without_times(results["methods"])
    assert (out / "methods.md").read_text().count("\n") == len(rows) + 2
    table = (out / "index.html").read_text().split('id="methods"')[1].split("</table>")[0]
    for line in table.split("<tr")[2:]:
        assert line.count("<td") + line.count("<th") == len(COLUMNS)


def test_sizes_are_parts_of_one_another(finished, store):
    _, results = finished
    assert [point["images_per_class"] for point in results["sizes"]] == [2, 8, 15]
    view = store["train"]
    few, more = (choose_images(view.files, view.labels, classes=None, per_class=k, seed=0) for k in (3, 9))
    assert set(few) < set(more)
    assert np.bincount(view.labels[few]).tolist() == [3] * CLASSES


# -- test images ------------------------------------------------------------------------------------------------------
def test_test_images_are_read_once_after_selection(store, tmp_path):
    """Also by a run that is interrupted and goes on."""
    settings = comparison.Settings(
        (Cell("mlp", "linear"), Cell("linear", "linear")),
        ("mean-token", "k-nn", "attentive-probe"),
        PathSettings(beta_ratios=(0.3, 0.1)),
        AdamSettings(heads=(3,), epochs=1, learning_rates=(0.01, 0.03), seeds=(0, 1)),
    )
    splits = chosen_splits(store, TokenChoice(channels=5))
    load_test, read_at = splits.load_test, []

    def counted():
        read_at.append(RunFolder(tmp_path / "run").count())
        return load_test()

    class Stop(Exception):
        pass

    def stop(what, done, total):
        if done >= 4:
            raise Stop

    splits = replace(splits, load_test=counted)
    with pytest.raises(Stop):
        comparison.run(splits, settings, tmp_path / "run", title="", notify=stop)
    assert read_at == []
    first = comparison.run(splits, settings, tmp_path / "run", title="")
    assert read_at == [settings.pieces() - 1]
    again = comparison.run(splits, settings, tmp_path / "run", title="")
    assert len(read_at) == 1
    assert again["methods"] == first["methods"]


def test_choices_do_not_depend_on_test_images(store, tmp_path):
    """Other test labels change the test columns only."""
    settings = comparison.Settings(
        (Cell("mlp", "linear"),), ("mean-token",), PathSettings((0.3, 0.1)), AdamSettings(heads=(3,), epochs=1)
    )
    splits = chosen_splits(store, TokenChoice(channels=5))
    test = splits.load_test()
    turned = replace(splits, load_test=lambda: replace(test, labels=np.roll(test.labels, 7)))
    results = [comparison.run(s, settings, tmp_path / str(i), title="") for i, s in enumerate((splits, turned))]
    a, b = (
        [{k: v for k, v in row.items() if not k.startswith("test_")} for row in without_times(r["methods"])]
        for r in results
    )
    assert a == b


# -- going on ---------------------------------------------------------------------------------------------------------
def command(photos, out, *more):
    flags = ["--scale", "2k", "--backbone", "patches:4", "--channels", "9", "--epochs", "2", "--n-gates", "2"]
    heads = ["--heads", "mlp,linear", "--activations", "linear", "--json", *more]
    return [sys.executable, "-m", "convexhead", "cifar100", "--images", str(photos), "--out", str(out), *flags, *heads]


@pytest.mark.table
def test_a_run_killed_three_times_gives_the_same_table(photos, tmp_path):
    """SIGKILL, at different stages, once with worker processes; undisturbed, all is trained in worker processes."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    out = tmp_path / "killed"
    folder = RunFolder(out)
    for jobs, pieces in ((1, 1), (2, 5), (1, 14)):
        process = subprocess.Popen(command(photos, out, "--jobs", str(jobs)), env=env, stdout=subprocess.DEVNULL)
        while folder.count() < pieces and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (out / "results.json").exists()
    tables = []
    for place, jobs in ((out, 1), (tmp_path / "undisturbed", 2)):
        done = subprocess.run(command(photos, place, "--jobs", str(jobs)), env=env, check=True, capture_output=True)
        tables.append(without_times(json.loads(done.stdout)["methods"]))
    assert tables[0] == tables[1]


# -- refusals ---------------------------------------------------------------------------------------------------------
def test_other_settings_are_refused(finished, photos):
    out, _ = finished
    with pytest.raises(FileFormatError, match=r"epochs was 2, now 3"):
        cifar100.run_cifar100(out, images=str(photos), backbone="patches:4", **{**SMALL, "epochs": 3})


def test_a_foreign_folder_is_refused_before_anything_is_written(photos, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileFormatError, match=r"thesis\.tex"):
        cifar100.run_cifar100(tmp_path, images=str(photos), backbone="patches:4", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_piece_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.once("a/b", lambda: Piece({"x": 1}, {"w": torch.ones(3)}))
    assert folder.once("a/b", pytest.fail).tensors["w"].tolist() == [1, 1, 1]
    (tmp_path / "pieces" / "a" / "b.json").write_text('{"x"')
    with pytest.raises(FileFormatError, match=r"b\.json.*delete it"):
        folder.once("a/b", pytest.fail)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --images"),
        ({"images": "somewhere", "tokens": "else"}, "either --images or --tokens"),
        ({"tokens": "nowhere"}, "does not exist"),
        ({"images": "PHOTOS", "scale": "3k"}, "unknown scale"),
        ({"images": "PHOTOS", "heads": ("atention",)}, "did you mean 'self-attention'"),
        ({"images": "PHOTOS", "heads": ("linear",), "activations": ("relu",)}, "no head is left"),
        ({"images": "PHOTOS/train"}, "no test images"),
    ],
)
def test_bad_input_says_what_to_do(photos, tmp_path, options, message):
    options = {k: v.replace("PHOTOS", str(photos)) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises((InputError, FileFormatError), match=message):
        cifar100.run_cifar100(tmp_path / "out", **{"backbone": "patches:4", "scale": "2k", **options})
    assert not (tmp_path / "out").exists()


def test_a_run_below_the_bound_is_an_error(finished):
    out, _ = finished
    piece = RunFolder(out).once("linear-linear/path", pytest.fail)
    certificate = piece.record["certificate"]
    below = Piece({"objective": 9.0, "convex_objective": certificate["dual"] - 1e-6})
    with pytest.raises(ConvexHeadError, match="below the certified bound"):
        rows.excess_of(below, certificate)


# -- parts ------------------------------------------------------------------------------------------------------------
def test_choice_of_images_does_not_depend_on_their_order():
    files, labels = [f"{c}/{i}.png" for c in "ab" for i in range(20)], np.repeat([0, 1], 20)
    order = np.random.default_rng(0).permutation(40)
    one = choose_images(files, labels, classes=None, per_class=5, seed=3)
    two = choose_images([files[i] for i in order], labels[order], classes=None, per_class=5, seed=3)
    assert {files[i] for i in one} == {files[order[i]] for i in two}
    other = choose_images(files, labels, classes=None, per_class=5, seed=4)
    assert {files[i] for i in one} != {files[i] for i in other}
    assert set(labels[choose_images(files, labels, classes=1, per_class=5, seed=3)]) == {0}


def test_a_subset_reads_only_its_images(photos):
    source = open_source(photos)
    part = Subset(source, classes=2, per_class={"train": 3, "test": 1}, seed=0)
    assert part.class_names == ["class0", "class1"]
    assert np.bincount(part.labels("train")).tolist() == [3, 3]
    assert len(part.files("test")) == 2
    whole = source.files("train").index(part.files("train")[4])
    assert part.load("train", 4).tobytes() == source.load("train", whole).tobytes()
    assert part.fingerprint() != Subset(source, classes=2, per_class={"train": 4, "test": 1}, seed=0).fingerprint()


def test_images_and_stores_give_the_same_tokens(store, photos, tmp_path):
    choice = TokenChoice(classes=4, train=10, test=2, channels=7)
    part = Subset(open_source(photos), classes=4, per_class={"train": 10, "test": 2}, seed=0)
    from_images = chosen_splits(extract(part, "patches:4", tmp_path / "store"), choice)
    from_store = chosen_splits(store, choice)
    for a, b in ((from_images.train, from_store.train), (from_images.load_test(), from_store.load_test())):
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_allclose(a.tokens[:], b.tokens[:], atol=1e-5)


def test_reductions_are_fitted_on_the_train_part_alone(store):
    splits = chosen_splits(store, TokenChoice(channels=9))
    flat = splits.train.tokens[:].reshape(-1, 9)
    np.testing.assert_allclose(flat[:, :-1].mean(0), 0, atol=1e-5)
    off_diagonal = flat[:, :-1].T @ flat[:, :-1] / len(flat)
    np.testing.assert_allclose(off_diagonal - np.diag(np.diag(off_diagonal)), 0, atol=1e-4)
    assert (flat[:, -1] == 1).all()
    assert abs(splits.validation.tokens[:][..., 0].mean()) > 1e-4
    counts = np.bincount(splits.validation.labels)
    assert counts.tolist() == [3] * CLASSES


def test_held_out_images_are_not_trained_on(store):
    kept, held = hold_out(store["train"], 0.2, seed=1)
    assert sorted([*kept.files, *held.files]) == sorted(store["train"].files)
    seen = {row.tobytes() for row in kept[:]}
    assert not any(row.tobytes() in seen for row in held[:])


def test_tuning_takes_the_best_mean_over_its_seeds(tmp_path):
    ran = []
    accuracies = {(1, 0): 0.5, (1, 1): 0.5, (2, 0): 0.9, (2, 1): 0.3, (3, 0): 0.7, (3, 1): 0.7, (3, 2): 0.0}

    def run(option, seed):
        ran.append((option, seed))
        objective = None if (option, seed) == (4, 1) else 1.0
        return Piece({"validation_accuracy": accuracies.get((option, seed), 1.0), "objective": objective, "seconds": 2})

    arguments = {"tuning_seeds": 2, "name": str, "run": run}
    tuned = tune(RunFolder(tmp_path), (1, 2, 3, 4), (0, 1, 2), **arguments)
    assert [piece.name for piece in tuned.runs] == ["3-seed0", "3-seed1", "3-seed2"]
    assert tuned.seconds == 2 * len(ran) == 18


def test_attentive_probe_finds_the_token_that_matters():
    """One token, marked by a channel, holds the class; the mean of all hides it among noise."""
    from convexhead.baselines.attentive_probe import train_attentive_probe
    from convexhead.experiments.splits import Part, Splits

    rng = np.random.default_rng(0)
    n, s, d = 300, 9, 5
    X, y = rng.normal(size=(n, s, d)).astype(np.float32) * 1.5, rng.integers(0, 2, n)
    X[..., 0] = 0
    where = rng.integers(0, s, n)
    X[np.arange(n), where, 0] = 6
    X[np.arange(n), where, 1] = 2 * (2 * y - 1)
    parts = Part(X[:200], y[:200]), Part(X[200:], y[200:])
    splits = Splits(*parts, pytest.fail, ["a", "b"], (3, 3), "", "", {})
    piece = train_attentive_probe(splits, lr=0.01, weight_decay=0.01, epochs=30, batch_size=50, seed=0)
    assert piece.record["validation_accuracy"] > 0.9
    probe = AttentiveProbe.restored(piece.tensors)
    scores = probe(torch.from_numpy(parts[1].tokens)).detach().numpy()
    assert (scores.argmax(1) == parts[1].labels).mean() == piece.record["validation_accuracy"]


def test_published_scale_and_every_cell():
    settings = cifar100._settings(cifar100.SCALES["2k"], True, (), (), {}, {})
    names = [cell.name for cell in settings.cells]
    assert len(names) == len(set(names)) == 19  # six linear, five gated, five ReLU, three grouped
    assert settings.adam.heads == (5, 20, 50)
    assert len(settings.adam.learning_rates) >= 4
    assert len(settings.adam.seeds) == settings.adam.tuning_seeds == 3
    assert cifar100.SCALES["full"].path.n_gates == 50
    # 18 cells with Adam's runs of three sizes and AdamW, the linear head with two, each of 5 x 3 runs; the test images.
    some = replace(settings, probes=())
    assert some.pieces() == 19 + 15 * (18 * 4 + 2) + 1
    part = cifar100._settings(cifar100.SCALES["2k"], True, ("block-fno",), ("relu",), {}, {})
    assert [cell.outputs for cell in part.cells] == ["shared", "grouped"]
    short = cifar100._settings(cifar100.SCALES["2k"], True, (), (), {}, {"tuning_seeds": 1})
    assert replace(short, probes=()).pieces() == 19 + 7 * (18 * 4 + 2) + 1
    asked = cifar100._settings(cifar100.SCALES["2k"], False, ("attentive", "mlp"), ("linear",), {}, {})
    assert [cell.name for cell in asked.cells] == ["mlp-linear", "attentive-linear"]
    assert replace(asked, probes=()).pieces() == 2 + 7 * 3 + 1  # the attentive head's queries are trained, too
    with pytest.raises(InputError, match="1 to 3"):
        cifar100._settings(cifar100.SCALES["2k"], True, (), (), {}, {"tuning_seeds": 4})


def test_adamw_takes_the_number_of_heads_that_validation_prefers(tmp_path, store):
    splits, cell, folder = chosen_splits(store, TokenChoice(channels=9)), Cell("mlp", "linear"), RunFolder(tmp_path)
    fit_path(splits, PathSettings((0.1,)), cell, folder)
    settings = AdamSettings(heads=(1, 4), seeds=(0,), learning_rates=(0.03,), epochs=30, batch_size=16, adamw=True)
    few, many, other = train_with_adam(splits, settings, cell, folder)
    assert (few.n_heads, many.n_heads) == (1, 4)
    assert other.optimizer == "decoupled"
    assert preferred([few, many]).n_heads == other.n_heads == 4  # one head cannot tell the classes apart
