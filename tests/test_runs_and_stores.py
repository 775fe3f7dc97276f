"""A run meets another store: its own reduction on the raw tokens, classes by name, and refusals that name what differs.

Expected accuracies are computed from the image files and the saved weights alone, in numpy.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import accuracy_score

import convexhead as ch
from convexhead.interpret import token_contributions

pytest.importorskip("PIL")
from PIL import Image

from command import call

COLORS = {"ant": (1, 1, 0), "blue": (0, 0, 1), "green": (0, 1, 0), "red": (1, 0, 0)}
TOLD = "not made as those that this head was fitted on"


def draw(folder: Path, names: tuple[str, ...], count: int, *, seed: int, faded: float = 0.0) -> None:
    """Noisy images of 8 x 8 pixels, tinted in their class's colour; ``faded`` makes them paler and brighter."""
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 160, (8, 8, 3)) + 14 * np.array(COLORS[name])
            pixels = (1 - faded) * pixels + faded * 255 * np.array([0.9, 0.5, 0.7])
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:03}.png")


def printed(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert call(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert call(*arguments) == 1
    return capsys.readouterr().err.strip()


def extract(photos: Path, out: Path, *options: object) -> Path:
    assert call("extract", photos, "--backbone", "patches:4", "--dtype", "float32", "--out", out, *options) == 0
    return out


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two sets of photos that share classes, not their order or their colours' spread, a store of each, and runs."""
    folder = tmp_path_factory.mktemp("work")
    draw(folder / "photos/train", ("blue", "green", "red"), 40, seed=0)
    draw(folder / "photos/test", ("blue", "green", "red"), 20, seed=1)
    draw(folder / "others/train", ("ant", "green", "red"), 12, seed=2, faded=0.5)
    draw(folder / "others/test", ("green", "red"), 30, seed=3, faded=0.05)
    extract(folder / "photos", folder / "tokens")
    extract(folder / "others", folder / "faded")
    for head in ("linear", "self-attention"):
        fit = ("--head", head, "--beta-ratio", 0.05, "--fit-intercept", "--tol", "0.01")
        assert call("fit", folder / "tokens", "--out", folder / head, *fit) == 0
    return folder


# -- the same in numpy -------------------------------------------------------------------------------------------------
def patches(file: Path) -> np.ndarray:
    """Tokens ``(4, 48)`` of an image: its 4 x 4 patches as (row, column, colour)."""
    pixels = np.asarray(Image.open(file), dtype=np.float64) / 255
    return np.stack([pixels[i : i + 4, j : j + 4].reshape(-1) for i in (0, 4) for j in (0, 4)])


def own_accuracy(run: Path, train: Path, test: Path, names: list[str]) -> float:
    """Accuracy on the images in ``test`` of the saved linear head behind standardisation fitted on ``train``."""
    seen = np.concatenate([patches(file) for file in train.glob("*/*.png")])
    weights = load_file(run / "weights.safetensors")
    right = []
    for file in test.glob("*/*.png"):
        tokens = (patches(file) - seen.mean(0)) / seen.std(0)
        logits = tokens.mean(0) @ weights["coef"] + weights["intercept"]
        right.append(names[int(logits.argmax())] == file.parent.name)
    return float(np.mean(right))


@pytest.mark.parametrize(("store", "photos"), [("tokens", "photos"), ("faded", "others")])
def test_evaluation_is_that_of_the_run_s_own_reduction_and_names(work, capsys, store, photos):
    names = ["blue", "green", "red"]
    expected = own_accuracy(work / "linear", work / "photos/train", work / photos / "test", names)
    assert 0.5 < expected < 1
    assert printed(capsys, "evaluate", work / "linear", work / store)["top1"] == pytest.approx(expected)
    clf, view = ch.load(work / "linear"), ch.TokenStore.open(work / store)["test"]
    assert clf.class_names_ == names
    assert clf.score(view) == pytest.approx(expected)
    assert clf.score(view, view.labels) == pytest.approx(expected)
    files = [name.split("/")[1] for name in view.files]
    assert np.mean([names[k] == file for k, file in zip(clf.predict(view), files, strict=True)]) == expected
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from convexhead.report.runs import read_run

    run, _, evidence = read_run(work / "linear", ch.TokenStore.open(work / store))
    assert run["scores"]["top1"] == pytest.approx(expected)
    assert evidence.about["classes"] == names


def test_predictions_are_compared_with_labels_numbered_as_in_training(work, tmp_path):
    for seed, split in enumerate(("train", "test")):
        draw(tmp_path / "photos" / split, ("green", "red"), 12, seed=seed)
    extract(tmp_path / "photos", tmp_path / "tokens")
    clf, other = ch.load(work / "linear"), ch.TokenStore.open(tmp_path / "tokens")["test"]
    assert set(other.labels) == {0, 1}
    assert set(clf.labels_of(other)) == {1, 2}
    assert accuracy_score(clf.labels_of(other), clf.predict(other)) == clf.score(other) > 0.5


def test_a_module_keeps_names_origin_and_reduction(work):
    clf = ch.load(work / "linear")
    for module in (clf.to_module(), clf.to_module(raw_tokens=True)):
        assert module.classes == [0, 1, 2]
        assert module.class_names == ["blue", "green", "red"]
        assert module.origin.to_dict() == clf.origin_.to_dict()
        assert module.fitted_behind.identity == clf.reduction_.identity


def test_the_store_s_own_reduction_would_have_given_something_else(work):
    """The test above can fail: the two reductions do not agree on these images."""
    clf, view = ch.load(work / "linear"), ch.TokenStore.open(work / "faded")["test"]
    theirs = clf.decision_function(view.read())
    assert (theirs.argmax(1) != clf.decision_function(view).argmax(1)).mean() > 0.2


def test_interpretation_reads_another_store_as_the_head_does(work):
    clf, view = ch.load(work / "self-attention"), ch.TokenStore.open(work / "faded")["test"]
    mine = clf.reduction_.apply(view.raw(0, len(view)))
    np.testing.assert_allclose(token_contributions(clf, view), token_contributions(clf, mine), atol=1e-9)


def test_images_extracted_again_are_the_same_images(work, capsys, tmp_path):
    again = extract(work / "photos", tmp_path / "again", "--shard-size", 7)
    other = extract(work / "photos", tmp_path / "other", "--channels", 5, "--reduce", "pca", "--constant")
    for command in ("evaluate", "audit"):
        first = printed(capsys, command, work / "self-attention", work / "tokens")
        for store in (again, other):
            second = printed(capsys, command, work / "self-attention", store)
            if command == "audit":
                assert second["certificate"]["primal"] == pytest.approx(first["certificate"]["primal"], rel=1e-9)
                assert second["certificate"]["converged"]
            else:
                assert second["top1"] == first["top1"]


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_tokens_made_otherwise_are_refused(work, capsys, tmp_path):
    stores = {
        "backbone is 'patches:2', the head's was 'patches:4'": ("--backbone", "patches:2"),
        "preprocessing image_size is 16, the head's was None": ("--image-size", 16),
        "channel pooling is 24, the head's was None": ("--channels", 24),
        "token pooling is [1, 1], the head's was None": ("--token-pool", 1),
    }
    for i, (told, options) in enumerate(stores.items()):
        store = extract(work / "photos", tmp_path / str(i), *options)
        for command in (("evaluate",), ("audit",), ("report", "--out", tmp_path / "page.html", "--tokens")):
            message = refusal(
                capsys, *command, *((work / "linear", store) if len(command) == 1 else (store, work / "linear"))
            )
            assert told in message
            assert TOLD in message
            assert len(message.splitlines()) == 1
        with pytest.raises(ch.InputError, match=TOLD):
            ch.load(work / "linear").predict(ch.TokenStore.open(store)["test"])
        with pytest.raises(ch.InputError, match=TOLD):
            ch.certify(ch.load(work / "linear"), ch.TokenStore.open(store), beta=1.0)
    assert not (tmp_path / "page.html").exists()


def test_other_weights_are_refused(work, capsys, tmp_path):
    """As of a backbone of the same name that was trained again."""
    from convexhead.tokens.store.manifest import Manifest

    shutil.copytree(work / "tokens", tmp_path / "tokens")
    manifest = Manifest.load(tmp_path / "tokens")
    manifest.config["weights"] = "f00d" * 16
    manifest.save(tmp_path / "tokens")
    message = refusal(capsys, "evaluate", work / "linear", tmp_path / "tokens")
    assert "the backbone's weights are f00df00df00d…, the head's were none" in message


def test_a_class_that_the_run_does_not_know_is_refused_by_name(work, capsys):
    message = refusal(capsys, "evaluate", work / "linear", work / "faded", "--split", "train")
    assert "classes that this head was not trained on: 'ant'" in message
    with pytest.raises(ch.InputError, match="'ant'"):
        ch.load(work / "linear").score(ch.TokenStore.open(work / "faded")["train"])


def test_an_audit_is_about_the_training_images(work, capsys):
    message = refusal(capsys, "audit", work / "linear", work / "faded")
    assert "does not hold what this head was trained on" in message
    store = ch.TokenStore.open(work / "tokens")
    with pytest.raises(ch.InputError, match="the split is 'test', it was 'train'"):
        ch.certify(ch.load(work / "linear"), store["test"], beta=1.0)
    with pytest.raises(ch.InputError, match="others than this head was trained on"):
        ch.certify(ch.load(work / "linear"), store["train"].subset(np.arange(10, 90)), beta=1.0)


def test_heads_of_arrays_say_that_stores_are_taken_on_trust(work, capsys, tmp_path):
    train, test = (ch.TokenStore.open(work / "tokens")[split] for split in ("train", "test"))
    clf = ch.ConvexHeadClassifier("linear", beta_ratio=0.05, tol=0.01).fit(train.read(), train.labels)
    assert clf.class_names_ is None
    with pytest.warns(UserWarning, match="taken on trust"):
        score = clf.score(test)
    assert score == clf.score(test.read(), test.labels)
    clf.save(tmp_path / "plain")
    assert printed(capsys, "evaluate", tmp_path / "plain", work / "tokens")["top1"] == score


def test_runs_of_earlier_versions(work, capsys, tmp_path):
    """They keep a reduction, but not where tokens came from: read with a note where the reduction is theirs."""
    shutil.copytree(work / "linear", tmp_path / "old")
    config = json.loads((tmp_path / "old/config.json").read_text())
    del config["tokens"]
    config["version"] = 1
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert call("evaluate", tmp_path / "old", work / "tokens") == 0
    assert "classes are matched by number" in " ".join(capsys.readouterr().err.split())
    assert "fit it again" in refusal(capsys, "evaluate", tmp_path / "old", work / "faded")


def test_labels_of_the_user_s_own_are_not_matched_by_name(work):
    train, test = (ch.TokenStore.open(work / "tokens")[split] for split in ("train", "test"))
    clf = ch.ConvexHeadClassifier("linear", beta_ratio=0.05, tol=0.01).fit(train, train.labels % 2)
    assert clf.class_names_ is None
    with pytest.raises(ch.InputError, match="pass such labels as y"):
        clf.score(test)
    assert clf.score(test, test.labels % 2) > 0.5


def test_garbled_origins_are_refused(work, tmp_path):
    shutil.copytree(work / "linear", tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["tokens"]["shape"] = 3
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(ch.FileFormatError):
        ch.load(tmp_path / "run")


def test_a_subset_is_those_images(work):
    view = ch.TokenStore.open(work / "tokens")["train"]
    rows = np.array([5, 3, 100, 41])
    part = view.subset(rows)
    np.testing.assert_array_equal(part.read(), view.read()[rows])
    np.testing.assert_array_equal(part.labels, view.labels[rows])
    assert part.files == [view.files[i] for i in rows]
    assert part.identity != view.identity
    np.testing.assert_array_equal(part.subset(np.array([2, 0])).read(), view.read()[[100, 5]])
    np.testing.assert_array_equal(part[1:3], view[np.array([3, 100])])
