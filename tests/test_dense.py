"""Heads with an output for every token, from images with masks to scores of pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score

import convexhead as ch
from command import call
from convexhead import runs
from convexhead.dense import PixelScores, likeliest, mean_iou, pixel_accuracy, pixel_scores, predict_masks, upsample
from convexhead.errors import InputError
from convexhead.tokens import extract
from convexhead.tokens.geometry import Window

SIZE = (24, 16)


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> Path:
    """Images whose colours follow their masks."""
    root, rng = tmp_path_factory.mktemp("dense") / "scenes", np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for part in ("images", "labels"):
            (root / split / part).mkdir(parents=True)
        for i in range(count):
            mask = np.kron(rng.integers(0, 4, (4, 6)), np.ones((4, 4), int)).astype(np.uint8)
            image = np.clip(60 * mask[..., None] + rng.integers(0, 60, (*mask.shape, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / split / "images" / f"img{i}.png")
            mask[mask == 3] = 255
            Image.fromarray(mask).save(root / split / "labels" / f"img{i}.png")
    return root


@pytest.fixture(scope="module")
def store(masks):
    return extract(masks, "patches:2", masks.parent / "store", void=255, class_names=["a", "b", "c"], constant=True)


@pytest.fixture(scope="module")
def clf(store):
    return ch.ConvexHeadClassifier("linear", pool=None, beta_ratio=1e-3).fit(store["train"])


def test_a_store_of_masks_is_its_tokens_targets_and_weights(store, clf):
    train = store["train"]
    same = ch.ConvexHeadClassifier("linear", pool=None, beta=clf.beta_)
    same.fit(np.asarray(train), train.targets, train.weights)
    assert clf.certificate_.converged
    assert same.certificate_.primal == pytest.approx(clf.certificate_.primal, rel=1e-3)
    assert clf.class_names_ == ["a", "b", "c"]
    right = clf.predict(train) == train.targets.argmax(2)
    assert clf.score(train) == pytest.approx(np.average(right, weights=train.weights))
    # a weight of 0 is absence
    some = ch.ConvexHeadClassifier("linear", pool=None, beta=clf.beta_, tol=1e-6)
    weighted = some.fit(train, sample_weight=np.arange(12) < 7).certificate_.primal
    assert some.fit(train.subset(np.arange(7))).certificate_.primal == pytest.approx(weighted, rel=1e-5)
    assert ch.certify(clf, train).relative_gap < 1e-2


def test_pooled_heads_of_masks_are_refused(store):
    with pytest.raises(InputError, match="pool=None"):
        ch.ConvexHeadClassifier("linear").fit(store["train"])


def test_scores_are_those_of_scikit_learn(store, masks, clf):
    scores = pixel_scores(clf, store["test"], masks)
    each = list(predict_masks(clf, store["test"], masks))
    truth, predicted = (np.concatenate([getattr(e, k).ravel() for e in each]) for k in ("truth", "labels"))
    truth, predicted = truth[truth >= 0], predicted[truth >= 0]
    assert np.array_equal(scores.confusions.sum(0), confusion_matrix(truth, predicted, labels=range(3)))
    assert scores.mean_iou == pytest.approx(jaccard_score(truth, predicted, average="macro"))
    assert scores.accuracy == pytest.approx((truth == predicted).mean())
    assert scores.unseen == 0
    assert scores.accuracy > 0.8
    worse = PixelScores(scores.confusions + np.random.default_rng(0).integers(0, 30, (5, 3, 3)), list("abc"), 0.0)
    low, high = worse.interval(mean_iou)
    assert low < worse.mean_iou < high


def test_a_class_that_occurs_nowhere_does_not_count():
    confusion = np.array([[[3, 1, 0], [0, 4, 0], [0, 0, 0]]])
    scores = PixelScores(confusion, ["a", "b", "c"], 0.0)
    assert np.isnan(scores.iou[2])
    assert scores.interval(mean_iou) is None  # of a single image
    assert scores.mean_iou == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert pixel_accuracy(confusion[0]) == 7 / 8


def test_upsampling_is_linear_between_the_centres_of_tokens():
    y, x = np.mgrid[:3, :4]
    tokens = (2.0 * x + 5.0 * y).reshape(12, 1)
    values, rows, columns = upsample(tokens, (3, 4), Window(8, 4, 40, 28), (48, 32))
    assert (rows, columns) == (slice(4, 28), slice(8, 40))
    across = np.clip((np.arange(8, 40) + 0.5 - 8) / 8 - 0.5, 0, 3)
    down = np.clip((np.arange(4, 28) + 0.5 - 4) / 8 - 0.5, 0, 2)
    assert np.allclose(values[..., 0], 2 * across + 5 * down[:, None])


def test_pixels_that_the_backbone_does_not_see_have_no_class():
    p = np.eye(3)[[0, 1, 2, 1]]
    labels = likeliest(p, (2, 2), Window(8, 4, 40, 28), (48, 32))
    assert labels.shape == (32, 48)
    assert (
        (labels >= 0) == np.outer(*(np.isin(np.arange(n), range(a, b)) for n, a, b in ((32, 4, 28), (48, 8, 40))))
    ).all()
    assert [labels[4, 8], labels[4, 39], labels[27, 8], labels[27, 39]] == [0, 1, 2, 1]


def test_other_masks_are_refused(store, masks, clf, tmp_path):
    import shutil

    other = shutil.copytree(masks, tmp_path / "other")
    Image.new("L", SIZE, 1).save(other / "test/labels/img3.png")
    with pytest.raises(InputError, match=r"img3.png.*is not what its tokens"):
        pixel_scores(clf, store["test"], other)


@pytest.fixture(scope="module")
def run(store, masks):
    out = masks.parent / "run"
    assert call("fit", store.path, "--out", out, "--head", "mlp", "--pool", "none", "--whiten", "0.5") == 0
    return out


def test_masks_of_images_are_what_the_head_says_of_their_store(store, masks, run, tmp_path, capsys):
    images, out = masks / "test/images", tmp_path / "masks"
    capsys.readouterr()
    assert call("predict", run, images, "--out", out, "--batch-size", 2, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["images"], told["classes"], told["unseen"], told["broken"]) == (5, ["a", "b", "c"], 255, [])
    assert (out / "classes.txt").read_text() == "a\nb\nc\n"
    for each in predict_masks(ch.load(run), store["test"], masks):
        with Image.open(out / "labels" / Path(each.name).name) as mask:
            assert mask.mode == "P"
            np.testing.assert_array_equal(np.asarray(mask), each.labels)
            colors = np.asarray(mask.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(colors, axis=0)) == len(np.unique(each.labels))
    # masks beside images are images with masks, whose scores as truth are perfect
    (tmp_path / "again").mkdir()
    (tmp_path / "again/train").symlink_to(masks / "train")
    (out / "images").symlink_to(images)
    (out / "classes.txt").rename(tmp_path / "again/classes.txt")
    (tmp_path / "again/test").symlink_to(out)
    again = extract(tmp_path / "again", None, tmp_path / "store", like=store.path, void=255)
    assert pixel_scores(ch.load(run), again["test"], tmp_path / "again").accuracy == 1


def test_what_masks_are_not_made_of(store, masks, run, tmp_path, capsys):
    def refusal(*arguments):
        capsys.readouterr()
        assert call("predict", run, *arguments) == 1
        return " ".join(capsys.readouterr().err.split())

    images = masks / "test/images"
    assert "--out" in refusal(images)
    assert "--top" in refusal(images, "--top", 2, "--out", tmp_path / "a")
    assert "give the images" in refusal(store.path, "--out", tmp_path / "a")
    assert "give a folder 'images' in it" in refusal(masks, "--out", tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    assert "not an empty folder" in refusal(images, "--out", tmp_path / "full")
    (tmp_path / "twice").mkdir()
    for ending in ("png", "bmp"):
        Image.open(images / "img0.png").save(tmp_path / f"twice/x.{ending}")
    assert "share the mask 'x.png'" in refusal(tmp_path / "twice", "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_the_page_shows_pixels(store, masks, run, tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from convexhead.report.run_page import render_runs

    scores = pixel_scores(ch.load(run), store["test"], masks)
    page = render_runs([run])
    assert f"mean IoU is <strong>{100 * scores.mean_iou:.1f}%</strong>" in page
    assert page.count("data:image/jpeg") == 5
    assert "--whiten 0.5" in page
    assert "--void 255 --class-names a,b,c" in page
    assert render_runs([run]) == page
    moved = masks.rename(masks.with_name("elsewhere"))
    try:
        assert "Pixels are not shown" in render_runs([run], store=store)
        assert page.count("mean IoU is") == render_runs([run], store=store, images=str(moved)).count("mean IoU is")
    finally:
        moved.rename(masks)


def test_from_images_to_scores_on_the_command_line(store, masks, tmp_path, capsys):
    assert call("fit", store.path, "--out", tmp_path / "run", "--head", "linear", "--pool", "none") == 0
    capsys.readouterr()
    assert call("evaluate", tmp_path / "run", store.path, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    again = pixel_scores(ch.load(tmp_path / "run"), store["test"], masks)
    assert told["mean_iou"] == again.mean_iou
    assert set(told["iou"]) == {"a", "b", "c"}
    assert runs.audit(tmp_path / "run", store.path).certificate.relative_gap < 1e-2
