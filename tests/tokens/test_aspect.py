"""Images at their own aspect ratio: tokens on a grid for each image, and what heads and masks make of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

import convexhead as ch
from command import call
from convexhead.dense import pixel_scores, predict_masks
from convexhead.errors import InputError
from convexhead.predict import predict
from convexhead.tokens import TokenStore, extract, open_backbone
from convexhead.tokens.backbones.timm_import import import_timm

K, LONGEST = 8, 48
SHAPES = [(96, 64), (64, 96), (96, 24), (80, 80), (60, 31)]
GRIDS = [(4, 6), (6, 4), (2, 6), (6, 6), (3, 6)]


def crops(count: int, seed: int) -> list[tuple[int, Image.Image]]:
    """Parts of two photographs, of shapes in turn, and which photograph."""
    rng, photos = np.random.default_rng(seed), load_sample_images().images
    out = []
    for i in range(count):
        width, height = SHAPES[i % len(SHAPES)]
        photo = photos[i % 2]
        y, x = rng.integers(0, photo.shape[0] - height), rng.integers(0, photo.shape[1] - width)
        out.append((i % 2, Image.fromarray(photo[y : y + height, x : x + width])))
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("aspect") / "photos"
    for split, count, seed in (("train", 40, 0), ("test", 10, 1)):
        for name in ("china", "flower"):
            (root / split / name).mkdir(parents=True)
        for i, (label, image) in enumerate(crops(count, seed)):
            image.save(root / split / ("china", "flower")[label] / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def store(photos) -> TokenStore:
    return extract(
        photos, f"patches:{K}", photos.parent / "store", image_size=LONGEST, keep_aspect=True, channels=12,
        reduce="pca", constant=True, dtype="float32",
    )  # fmt: skip


def by_hand(file: Path) -> np.ndarray:
    """Patches of the image, scaled by what the docstring says."""
    with Image.open(file) as image:
        width, height = image.size
        across, down = (max(1, round(side * LONGEST / max(width, height) / K)) for side in (width, height))
        pixels = np.asarray(image.convert("RGB").resize((across * K, down * K), Image.Resampling.BICUBIC)) / 255
    return pixels.reshape(down, K, across, K, 3).transpose(0, 2, 1, 3, 4).reshape(down * across, -1)


def test_each_image_has_the_patches_of_its_own_shape(store, photos):
    view = store["test"]
    names = [Path(name).stem for name in view.files]
    np.testing.assert_array_equal(view.grids, [GRIDS[int(name) % len(GRIDS)] for name in names])
    np.testing.assert_array_equal(view.lengths, view.grids.prod(1))
    assert view.shape[1] == (LONGEST // K) ** 2
    raw = view.unreduced()
    for i, name in enumerate(view.files):
        np.testing.assert_allclose(raw[i][: view.lengths[i]], by_hand(photos / name), atol=1e-6)
        assert not view[i][view.lengths[i] :].any()
    some = view.subset(np.array([3, 1]))
    np.testing.assert_array_equal(some.grids, view.grids[[3, 1]])
    joined = np.concatenate([by_hand(photos / name) for name in store["train"].files])
    np.testing.assert_allclose(store.reduction.mean, joined.mean(0), atol=1e-4)


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("linear", {}),
        ("mlp", {}),
        ("self-attention", {"tol": 1e-3}),
        ("attentive", {"n_queries": 6, "query_position": False}),
    ],
)
def test_heads_take_the_store_as_a_list_of_samples(store, photos, tmp_path, head, options):
    options = {"beta_ratio": 0.05, "random_state": 0, **options}
    train, test = store["train"], store["test"]
    lists = [[view[i][:s] for i, s in enumerate(view.lengths)] for view in (train, test)]
    clf = ch.ConvexHeadClassifier(head, **options).fit(train)
    listed = ch.ConvexHeadClassifier(head, **options).fit(lists[0], train.labels)
    assert clf.certificate_.converged
    assert clf.certificate_.primal == pytest.approx(listed.certificate_.primal, rel=1e-6)
    expected = clf.predict_proba(test)
    np.testing.assert_allclose(listed.predict_proba(lists[1]), expected, atol=1e-5)
    assert clf.score(test) > 0.6
    clf.save(tmp_path / "run")
    rows = list(predict(tmp_path / "run", photos / "test", batch_size=3))
    told = {Path(row[0]).stem: row[2:] for row in rows}
    np.testing.assert_allclose([told[Path(name).stem] for name in test.files], expected, atol=1e-5)


@pytest.mark.parametrize("head", ["mlp-mixer", "fno"])
def test_heads_that_mix_by_position_say_why_not(store, head):
    with pytest.raises(InputError, match="mixes tokens by their position"):
        ch.ConvexHeadClassifier(head).fit(store["train"])


def test_other_images_are_read_like_the_store(store, photos, tmp_path):
    again = extract(photos, None, tmp_path / "again", like=store.path)
    np.testing.assert_array_equal(again["test"].read(), store["test"].read())
    with pytest.raises(InputError, match="keep_aspect is True"):
        extract(photos, None, tmp_path / "other", like=store.path, keep_aspect=False)


def test_no_grid_for_all_is_pooled(store, photos, tmp_path):
    with pytest.raises(InputError, match="no common grid"):
        store["train"].pooled((2, 2))
    with pytest.raises(InputError, match="leave one out"):
        extract(photos, f"patches:{K}", tmp_path / "s", image_size=LONGEST, keep_aspect=True, token_pool=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "keep_aspect needs image_size"),
        ({"image_size": (48, 32)}, "one number"),
        ({"image_size": 50}, "use 48 or 56"),
        ({"image_size": 5}, "use 8"),
    ],
)
def test_sides_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        open_backbone(f"patches:{K}", keep_aspect=True, **options)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Photographs of several shapes, whose masks say where they are bright; the void is dark."""
    root = tmp_path_factory.mktemp("scenes")
    for split, count, seed in (("train", 20, 2), ("test", 5, 3)):
        for part in ("images", "labels"):
            (root / split / part).mkdir(parents=True)
        for i, (_, image) in enumerate(crops(count, seed)):
            image.save(root / split / "images" / f"{i:02d}.png")
            grey = np.asarray(image.convert("L"))
            mask = np.digitize(grey, [90, 160]).astype(np.uint8)
            mask[grey < 5] = 255
            Image.fromarray(mask).save(root / split / "labels" / f"{i:02d}.png")
    return root


@pytest.mark.slow
def test_masks_follow_images_of_any_shape(scenes, tmp_path, capsys):
    out, run = tmp_path / "store", tmp_path / "run"
    sizes = ("--image-size", 48, "--keep-aspect")
    names = ("--void", 255, "--class-names", "dark,grey,bright")
    assert call("extract", scenes, "--backbone", "patches:4", *sizes, *names, "--out", out, "--constant") == 0
    store = TokenStore.open(out)
    view = store["test"]
    assert len({tuple(grid) for grid in view.grids}) == len(SHAPES)
    for name, (h, w), targets, weights in zip(view.files, view.grids, view.targets, view.weights, strict=True):
        with Image.open(scenes / name.replace("images", "labels")) as mask:
            shares = [np.mean(np.asarray(mask) == k) for k in range(3)]
        np.testing.assert_allclose(weights[: h * w] @ targets[: h * w] / (h * w), shares, atol=1e-5)
        assert not weights[h * w :].any()
    assert call("fit", out, "--head", "self-attention", "--pool", "none", "--out", run, "--tol", 0.02) == 0
    clf = ch.load(run)
    scores = pixel_scores(clf, view, scenes)
    assert scores.accuracy > 0.75
    assert scores.unseen == 0
    assert call("predict", run, scenes / "test/images", "--out", tmp_path / "masks", "--batch-size", 2) == 0
    for each in predict_masks(clf, view, scenes):
        with Image.open(tmp_path / "masks/labels" / Path(each.name).name) as mask:
            np.testing.assert_array_equal(np.asarray(mask), each.labels)
    capsys.readouterr()
    assert call("evaluate", run, out, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["mean_iou"] == pytest.approx(scores.mean_iou)
    assert call("report", run, "--out", tmp_path / "page.html") == 0
    assert f"{100 * scores.mean_iou:.1f}" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_a_vit_of_timm_reads_images_of_any_shape(photos, tmp_path):
    torch.manual_seed(0)
    timm = import_timm()
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    spec = f"timm:vit_tiny_patch16_224@{tmp_path / 'weights.safetensors'}"
    store = extract(photos, spec, tmp_path / "store", image_size=64, keep_aspect=True, dtype="float32")
    view = store["test"].unreduced()
    mean, std = (torch.tensor(model.default_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    for i, name in enumerate(view.files):
        (h, w), s = view.grids[i], view.lengths[i]
        with Image.open(photos / name) as image:
            pixels = np.array(image.convert("RGB").resize((16 * int(w), 16 * int(h)), Image.Resampling.BICUBIC))
        x = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            tokens = model.forward_features(x[None])[0].numpy()
        np.testing.assert_allclose(view[i][:s], tokens[1:], atol=1e-3)
        np.testing.assert_allclose(view.class_tokens(i), tokens[0], atol=1e-3)
    token = ch.ConvexHeadClassifier("linear", pool="cls", beta_ratio=0.1).fit(store["train"].with_class_token())
    np.testing.assert_array_equal(token.predict(store["test"]), token.predict(store["test"].with_class_token()))
    save_file(timm.create_model("gmlp_ti16_224").state_dict(), tmp_path / "gmlp.safetensors")
    spec = f"timm:gmlp_ti16_224@{tmp_path / 'gmlp.safetensors'}"
    with pytest.raises(InputError, match="one size only"):
        open_backbone(spec, image_size=224, keep_aspect=True)


@pytest.mark.slow
def test_a_convolutional_network_does_too(photos):
    backbone = open_backbone("packaged:efficientnet-lite0", layer=[4, None], image_size=128, keep_aspect=True)
    assert backbone.most_tokens == 16
    for _, image in crops(3, 5):
        batch = backbone(backbone.prepare(image)[None])
        longest = max(image.size)
        assert batch.grid == tuple(max(1, round(side * 4 / longest)) for side in reversed(image.size))
        assert batch.tokens.shape[1] == batch.grid[0] * batch.grid[1]
    with pytest.raises(InputError, match="leave crop_pct out"):
        open_backbone("packaged:efficientnet-lite0", image_size=128, keep_aspect=True, crop_pct=0.9)
