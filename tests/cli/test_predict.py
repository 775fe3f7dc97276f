"""``convexhead predict``: rows for real image files, equal to what the head says of the same images in a store."""

from __future__ import annotations

import csv
import io
import json
import shutil

import numpy as np
import pytest
import torch

import convexhead as ch
from convexhead.predict import predict
from convexhead.tokens import extract
from convexhead.tokens.backbones.base import Backbone, TokenBatch

pytest.importorskip("PIL")
from PIL import Image

from command import call

CLASSES = ("blue", "green, light", "red")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Photos in train/ and test/, their tokens, and a run on reduced tokens."""
    folder = tmp_path_factory.mktemp("work")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 12)):
        for c, name in enumerate(CLASSES):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (8, 8, 3))
                pixels[:, :, c] += 50
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "photos" / split / name / f"{i}.png")
    options = ("--backbone", "patches:2", "--token-pool", 2, "--channels", 5, "--reduce", "pca", "--constant")
    assert call("extract", folder / "photos", *options, "--out", folder / "tokens") == 0
    assert call("fit", folder / "tokens", "--head", "mlp", "--beta-ratio", 0.1, "--out", folder / "run") == 0
    return folder


def table(text):
    return list(csv.DictReader(io.StringIO(text)))


def rows_of(capsys, *arguments):
    capsys.readouterr()
    assert call("predict", *arguments) == 0
    return table(capsys.readouterr().out)


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert call("predict", *arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_images_and_their_store_have_the_same_rows(work, capsys):
    clf, test = ch.load(work / "run"), ch.TokenStore.open(work / "tokens")["test"]
    expected = clf.predict_proba(test)
    of_images = rows_of(capsys, work / "run", work / "photos" / "test", "--batch-size", 5)
    of_store = rows_of(capsys, work / "run", work / "tokens", "--split", "test")
    assert [f"test/{row['image']}" for row in of_images] == [row["image"] for row in of_store] == test.files
    for rows in (of_images, of_store):
        assert list(rows[0]) == ["image", "predicted", *(f"p:{name}" for name in CLASSES)]
        p = np.array([[float(row[f"p:{name}"]) for name in CLASSES] for row in rows])
        np.testing.assert_allclose(p, expected, rtol=1e-5)
        assert [row["predicted"] for row in rows] == [CLASSES[k] for k in clf.predict(test)]
    everything = rows_of(capsys, work / "run", work / "tokens")
    assert [row["split"] for row in everything] == ["train"] * 60 + ["test"] * 36
    assert len(rows_of(capsys, work / "run", work / "photos")) == 96  # whatever its folders mean


def test_loose_images_broken_ones_and_a_single_one(work, tmp_path, capsys):
    photos = tmp_path / "loose"
    shutil.copytree(work / "photos" / "test" / "red", photos / "deep" / "train" / "er")
    shutil.copy(work / "photos" / "test" / "blue" / "3.png", photos / "b.png")
    (photos / "a.png").write_text("no image")
    (photos / "odd[bold].txt").write_text("")
    assert "a.png" in refusal(capsys, work / "run", photos)
    capsys.readouterr()
    assert call("predict", work / "run", photos, "--skip-broken", "--batch-size", 1) == 0
    told = capsys.readouterr()
    names = [row["image"] for row in table(told.out)]
    assert names == ["b.png", *(f"deep/train/er/{i}.png" for i in range(12))]
    assert "1 broken images left out: 'a.png'" in told.err
    assert "1 not read, not an image (.txt): 'odd[bold].txt'" in told.err
    (row,) = rows_of(capsys, work / "run", photos / "b.png")
    whole = {row["image"]: row for row in rows_of(capsys, work / "run", work / "photos" / "test" / "blue")}
    assert {**row, "image": "3.png"} == whole["3.png"]


def test_the_top_classes_as_parquet_and_json(work, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    source, run = work / "photos" / "test", work / "run"
    assert call("predict", run, source, "--top", 2, "--out", tmp_path / "two.parquet") == 0
    assert "36 images, written to" in capsys.readouterr().out
    stored = parquet.read_table(tmp_path / "two.parquet")
    assert stored.column_names == ["image", "predicted", "p", "predicted_2", "p_2"]
    assert call("predict", run, source, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["broken"]) == (36, [])
    for row, (image, predicted, *p) in zip(stored.to_pylist(), found["rows"], strict=True):
        order = np.argsort(p)[::-1]
        assert (row["image"], row["predicted"], row["p"]) == (image, predicted, p[order[0]])
        assert (row["predicted_2"], row["p_2"]) == (CLASSES[order[1]], p[order[1]])
    assert call("predict", run, source, "--out", tmp_path / "all.csv", "--json") == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(tmp_path / "all.csv")
    assert len(table((tmp_path / "all.csv").read_text())) == 36
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.csv", "two.parquet"]


def test_outputs_of_a_regression(work, capsys):
    train = ch.TokenStore.open(work / "tokens")["train"]
    y = train.read().mean((1, 2)).astype(np.float64)
    ch.ConvexHeadRegressor("linear", beta=1e-3, fit_intercept=True).fit(train, y).save(work / "one")
    ch.ConvexHeadRegressor("linear", beta=1e-3).fit(train, np.stack([y, -y], 1)).save(work / "two")
    ch.ConvexHeadRegressor("linear", beta=1e-3, pool=None).fit(train, np.zeros((60, 4, 2)) + y[:, None, None]).save(
        work / "dense"
    )
    one = rows_of(capsys, work / "one", work / "photos" / "train")
    expected = ch.load(work / "one").predict(train)
    np.testing.assert_allclose([float(row["output"]) for row in one], expected, rtol=1e-4, atol=1e-6)
    assert list(rows_of(capsys, work / "two", work / "tokens", "--split", "test")[0]) == [
        "image", "output_1", "output_2",
    ]  # fmt: skip
    assert "an output for every token" in refusal(capsys, work / "dense", work / "tokens")
    assert "whose outputs are all told" in refusal(capsys, work / "one", work / "tokens", "--top", 2)


def test_several_labels(work, capsys):
    train = ch.TokenStore.open(work / "tokens")["train"]
    Y = np.stack([train.labels == 0, train.labels != 1], 1).astype(int)
    clf = ch.ConvexHeadClassifier("linear", loss="binary-cross-entropy", beta=1e-3, fit_intercept=True).fit(train, Y)
    clf.save(work / "several")
    rows = rows_of(capsys, work / "several", work / "photos" / "train")
    assert {row["predicted"] for row in rows} == {"", "1", "0|1"}
    for row in rows:
        p = {name: float(row[f"p:{name}"]) for name in "01"}
        assert row["predicted"] == "|".join(name for name in p if p[name] >= 0.5)
    np.testing.assert_allclose([float(row["p:1"]) for row in rows], clf.predict_proba(train)[:, 1], rtol=1e-5)


def test_what_cannot_be_predicted_is_refused_in_words(work, tmp_path, capsys):
    run, photos = work / "run", work / "photos"
    assert "--top" in refusal(capsys, run, photos, "--top", 4)
    assert ".csv or .parquet" in refusal(capsys, run, photos, "--out", tmp_path / "out.txt")
    assert "no such folder" in refusal(capsys, run, photos, "--out", tmp_path / "none" / "out.csv")
    assert "--split" in refusal(capsys, run, photos, "--split", "test")
    assert "has no split 'val'" in refusal(capsys, run, work / "tokens", "--split", "val")
    assert "there is no folder" in refusal(capsys, run, tmp_path / "nowhere")
    assert "holds no images" in refusal(capsys, run, tmp_path)
    assert "--batch-size" in refusal(capsys, run, photos, "--batch-size", -1)
    assert "leave backbone out" in refusal(capsys, run, photos, "--backbone", "patches:4")
    tokens = ch.TokenStore.open(work / "tokens")["train"]
    ch.ConvexHeadClassifier("mlp", beta_ratio=0.3).fit(tokens.read(), tokens.labels).save(tmp_path / "arrays")
    assert "does not say how tokens are made" in refusal(capsys, tmp_path / "arrays", photos)


def test_nothing_is_half_written(work, tmp_path, capsys):
    assert call("extract", work / "photos", "--backbone", "patches:4", "--out", tmp_path / "tokens") == 0
    assert call("fit", tmp_path / "tokens", "--head", "linear", "--out", tmp_path / "run") == 0
    photos, out = tmp_path / "photos", tmp_path / "out.csv"
    shutil.copytree(work / "photos" / "test" / "red", photos)
    Image.new("RGB", (16, 8)).save(photos / "last.png")
    before = sorted(tmp_path.iterdir())
    assert "bring them to the size" in refusal(capsys, tmp_path / "run", photos, "--batch-size", 1, "--out", out)
    assert sorted(tmp_path.iterdir()) == before
    (photos / "last.png").unlink()
    assert call("predict", tmp_path / "run", photos, "--out", out) == 0
    assert sorted(tmp_path.iterdir()) == sorted([*before, out])


class InFront(Backbone):
    """Patches, and a class token that tells the colour."""

    spec, layer, weights_hash, preprocessing = "in-front", None, "", {}

    def prepare(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def forward(self, images):
        x = images.float() / 255
        return TokenBatch(x[:, :, :2, :2].flatten(2).transpose(1, 2), x.mean((2, 3))[:, None], (2, 2))


def test_a_head_of_the_class_token_reads_it(work, tmp_path):
    store = extract(work / "photos", InFront(), tmp_path / "tokens")
    clf = ch.ConvexHeadClassifier("linear", pool="cls", beta_ratio=0.01, fit_intercept=True).fit(store["train"])
    rows = list(predict(clf, work / "photos" / "test", backbone=InFront()))
    assert np.mean([image.startswith(predicted) for image, predicted, *_ in rows]) > 0.9
    np.testing.assert_allclose([p for *_, a, b, c in rows for p in (a, b, c)], clf.predict_proba(store["test"]).ravel())


class Counting:
    """A source that counts the images that were asked for."""

    spec, splits, class_names, loaded = "counting", ("train",), ["a"], 0

    def labels(self, split):
        return np.zeros(10_000, np.int64)

    def files(self, split):
        return [f"{i}.png" for i in range(10_000)]

    def load(self, split, index):
        self.loaded += 1
        return Image.new("RGB", (8, 8))

    def fingerprint(self):
        return ""


def test_rows_come_before_all_images_are_read(work):
    source = Counting()
    rows = iter(predict(work / "run", source, batch_size=2))
    assert next(rows)[0] == "0.png"
    assert source.loaded < 1000
