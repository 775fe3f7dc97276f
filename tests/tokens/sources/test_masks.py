"""Folders of images with masks, and the targets of tokens that are made of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convexhead.errors import InputError
from convexhead.tokens import TokenStore, extract, open_source
from convexhead.tokens.backbones.patches import RawPatches
from convexhead.tokens.geometry import Window, measure_window, patch_targets
from convexhead.tokens.store.census import census_lines

SIZE = (24, 16)
NAMES = ["sky", "road", "tree"]


def scene(rng, size=SIZE, n_classes=3, void=9):
    """An image whose colours follow its mask: blocks of a few pixels, some of them void."""
    width, height = size
    blocks = rng.integers(0, n_classes + 1, (height // 4, width // 4))
    mask = np.kron(np.where(blocks == n_classes, void, blocks), np.ones((4, 4), int)).astype(np.uint8)
    mask[0, :n_classes] = np.arange(n_classes)
    image = 60 * mask[..., None] + rng.integers(0, 40, (height, width, 3))
    return np.clip(image, 0, 255).astype(np.uint8), mask


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    root, rng = tmp_path / "scenes", np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3), ("test", 4)):
        for part in ("images", "labels"):
            (root / split / part).mkdir(parents=True)
        for i in range(count):
            image, mask = scene(rng)
            Image.fromarray(image).save(root / split / "images" / f"img{i}.png")
            Image.fromarray(mask).save(root / split / "labels" / f"img{i}.png")
    return root


def test_a_folder_of_masks_is_found_by_its_layout(masks):
    source = open_source(masks, void=9, class_names=NAMES)
    assert source.splits == ("train", "val", "test")
    assert source.class_names == NAMES
    assert source.files("val") == [f"val/images/img{i}.png" for i in range(3)]
    mask = np.asarray(Image.open(masks / "val" / "labels" / "img1.png")).astype(int)
    assert np.array_equal(source.mask("val", 1), np.where(mask == 9, -1, mask))
    counts = sum(
        np.bincount(np.asarray(Image.open(f)).ravel(), minlength=10) for f in (masks / "val" / "labels").iterdir()
    )
    assert source.pixels("val").tolist() == counts[[0, 1, 2, 9]].tolist()
    with pytest.raises(InputError, match=r"masks, not one label an image.*pool=None"):
        source.labels("train")


def test_names_come_from_a_file_or_are_the_numbers(masks):
    assert open_source(masks, void=9).class_names == ["0", "1", "2"]
    (masks / "classes.txt").write_text("\n".join(NAMES))
    assert open_source(masks, void=9).class_names == NAMES
    (masks.parent / "others").write_text("a\nb\nc\n")
    assert open_source(masks, void=9, class_names=masks.parent / "others").class_names == ["a", "b", "c"]
    # void is no class, even where it is in the list
    inside = open_source(masks, void=1, class_names=[*NAMES, *"345678", "void"])
    assert inside.class_names == ["sky", "tree", *"345678", "void"]
    assert set(np.unique(inside.mask("train", 0))) <= {-1, 0, 1, 8}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: Image.new("L", (8, 8)).save(root / "val/labels/img0.png"), "8x8 pixels, its image .* 24x16"),
        (lambda root: Image.new("L", SIZE, 7).save(root / "test/labels/img2.png"), "img2.png.*holds 7.*void=7"),
        (lambda root: Image.new("RGB", SIZE).save(root / "train/labels/img3.png"), "img3.png.*colours"),
        (lambda root: (root / "train/labels/img3.png").write_bytes(b"no image"), "cannot read the mask.*img3"),
        (lambda root: Image.new("RGB", SIZE).save(root / "train/images/img3.jpg"), "share one mask"),
        (lambda root: shutil.rmtree(root / "test/labels"), "has no folder 'labels'"),
        (lambda root: shutil.rmtree(root / "train"), "no train/"),
        (lambda root: [f.rename(f.with_name(f"x{f.name}")) for f in (root / "val/labels").iterdir()], "no image in"),
    ],
)
def test_what_is_wrong_is_refused_by_name(masks, tmp_path, spoil, message):
    spoil(masks)
    with pytest.raises(InputError, match=message):
        extract(open_source(masks, void=9, class_names=NAMES), "patches:4", tmp_path / "store")
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_a_usual_void_is_not_taken_for_a_class(masks):
    Image.new("L", SIZE, 255).save(masks / "train/labels/img0.png")
    with pytest.raises(InputError, match="void=255"):
        open_source(masks, void=9).pixels("train")
    assert len(open_source(masks, void=255).class_names) == 4


def test_what_has_no_partner_is_counted_by_name(masks, tmp_path):
    (masks / "train/labels/img5.png").unlink()
    (masks / "val/images/img1.png").unlink()
    (masks / "val/images/notes.txt").write_text("")
    store = extract(masks, "patches:4", tmp_path / "store", void=9)
    found = store.manifest.found["left_out"]
    assert found["image without a mask"] == {"count": 1, "names": ["train/images/img5.png"]}
    assert found["mask without an image"]["names"] == ["val/labels/img1.png"]
    assert found["not an image (.txt)"]["count"] == 1
    lines = census_lines(store.manifest.found, store.class_names)
    assert lines[0].startswith("train: 5 images with masks; pixels: 0 ")
    assert "void" in lines[0]
    assert len(store["train"]) == 5
    assert len(store["val"]) == 2


def test_void_and_names_are_for_masks(photos):
    with pytest.raises(InputError, match="are for masks"):
        open_source(photos, void=0)


@pytest.mark.parametrize(("size", "image_size"), [((48, 32), None), ((48, 32), 24), ((37, 53), 64), ((640, 480), 96)])
def test_the_window_of_a_squeezed_image_is_all_of_it(size, image_size):
    assert measure_window(RawPatches(4, image_size).prepare, size) == (0, 0, *size)


@pytest.mark.parametrize("size", [(97, 64), (480, 360), (360, 481), (2000, 1500)])
def test_the_window_of_a_centre_crop(size):
    def prepare(image):
        short = min(image.size)
        scaled = image.resize([int(80 * side / short) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (scaled.width - 64) // 2, (scaled.height - 64) // 2
        return torch.from_numpy(np.array(scaled.crop((left, top, left + 64, top + 64)))).permute(2, 0, 1)

    w, h = (int(80 * side / min(size)) for side in size)
    left, top, x, y = (w - 64) // 2, (h - 64) // 2, size[0] / w, size[1] / h
    assert np.allclose(measure_window(prepare, size), (left * x, top * y, (left + 64) * x, (top + 64) * y))


def test_the_window_of_a_crop_that_is_scaled_afterwards():
    def prepare(image):
        box = (0.21 * image.width, 0.13 * image.height, 0.91 * image.width, 0.98 * image.height)
        return torch.from_numpy(np.array(image.resize((70, 60), Image.Resampling.BILINEAR, box))).permute(2, 0, 1)

    found = measure_window(prepare, (300, 200))
    assert np.allclose(found, (63, 26, 273, 196), atol=0.1)


def test_preprocessing_that_does_more_is_refused():
    def flipped(image):
        return RawPatches(4, 32).prepare(image).flip(2)

    with pytest.raises(InputError, match="does not only resize and crop"):
        measure_window(flipped, (64, 64))


def test_targets_are_shares_of_area():
    rng = np.random.default_rng(1)
    mask = rng.integers(-1, 3, (12, 20)).astype(np.int16)
    targets, weights = patch_targets(mask, Window(0, 0, 20, 12), (3, 5), 3)
    for t in range(15):
        cell = mask[4 * (t // 5) :, 4 * (t % 5) :][:4, :4]
        counts = np.array([(cell == k).sum() for k in range(3)])
        assert np.allclose(targets[t].numpy(), counts / counts.sum())
        assert np.isclose(weights[t], counts.sum() / 16)


def test_targets_of_cells_that_cut_pixels_and_leave_the_image():
    fine = np.repeat(np.repeat(np.array([[0, 1], [1, -1]], np.int16), 5, 0), 5, 1)
    # the window (−2, 1) .. (8, 8.5) on a grid of 3 x 4, counted on pixels 100 times as fine
    window, grid = Window(-2.0, 1.0, 8.0, 8.5), (3, 4)
    y, x = (np.arange(1500) + 0.5) * 7.5 / 1500 + 1, (np.arange(1500) + 0.5) * 10 / 1500 - 2
    seen = np.full((1500, 1500), -1)
    inside = np.ix_((y >= 0) & (y < 10), (x >= 0) & (x < 10))
    seen[inside] = fine[np.ix_(y[(y >= 0) & (y < 10)].astype(int), x[(x >= 0) & (x < 10)].astype(int))]
    targets, weights = patch_targets(fine, window, grid, 2)
    cells = seen.reshape(3, 500, 4, 375).transpose(0, 2, 1, 3).reshape(12, -1)
    shares = np.stack([(cells == k).mean(1) for k in range(2)], 1)
    assert np.allclose(shares, (targets * weights[:, None]).numpy(), atol=2e-3)


def test_a_store_of_masks(masks, tmp_path):
    store = extract(masks, "patches:4", tmp_path / "store", void=9, class_names=NAMES, shard_size=4)
    train = store["train"]
    assert train.has_masks
    assert train.targets.shape == (6, 24, 3)
    assert train.weights.shape == (6, 24)
    source = open_source(masks, void=9)
    for i in range(6):
        mask = source.mask("train", i)
        for t in range(24):
            cell = mask[4 * (t // 6) :, 4 * (t % 6) :][:4, :4]
            assert np.isclose(train.weights[i, t], (cell >= 0).mean())
            if (cell >= 0).any():
                counts = np.array([(cell == k).sum() for k in range(3)])
                assert np.allclose(train.targets[i, t], counts / counts.sum())
    store.verify()
    with pytest.raises(InputError, match="pool=None"):
        _ = train.labels
    some = train.subset(np.array([4, 1]))
    assert np.array_equal(some.targets, train.targets[[4, 1]])
    # pooled when written, and when read
    pooled = extract(masks, "patches:4", tmp_path / "pooled", void=9, class_names=NAMES, token_pool=(2, 3))
    assert np.allclose(pooled["train"].weights, train.pooled((2, 3)).weights)
    assert np.allclose(pooled["train"].targets, train.pooled((2, 3)).targets, atol=1e-6)


def test_another_void_is_another_store(masks, tmp_path):
    extract(masks, "patches:4", tmp_path / "store", void=9, class_names=NAMES)
    again = extract(masks, "patches:4", tmp_path / "store", void=9, class_names=NAMES)
    assert again["train"].has_masks
    with pytest.raises(ValueError, match="another run"):
        extract(masks, "patches:4", tmp_path / "store", void=9, class_names=["a", "b", "c"])


def test_like_takes_classes_and_void(masks, tmp_path):
    extract(masks, "patches:4", tmp_path / "store", void=9, class_names=NAMES)
    other = extract(masks, None, tmp_path / "other", like=tmp_path / "store")
    assert other.class_names == NAMES
    assert other.manifest.config["masks"] == {"void": 9}
    with pytest.raises(InputError, match="`like` has 'sky'"):
        extract(masks, None, tmp_path / "third", like=tmp_path / "store", class_names=["a", "b", "c"])


@pytest.mark.parametrize("void", [0, 1, 9])
def test_classes_that_are_numbers_leave_the_void_out_wherever_it_lies(masks, tmp_path, void):
    first = extract(masks, "patches:4", tmp_path / "store", void=void)
    assert first.class_names == [str(number) for number in (0, 1, 2, 9) if number != void]
    given = open_source(masks).like(first.class_names, void)
    assert given.class_names == first.class_names
    mask = np.asarray(Image.open(masks / "val" / "labels" / "img1.png")).astype(int)
    assert np.array_equal(given.mask("val", 1) == -1, mask == void)


def test_stores_without_masks_have_none(photos, tmp_path):
    store = extract(photos, "patches:4", tmp_path / "store")
    assert not store["train"].has_masks
    assert store["train"].labels.shape == (22,)
    with pytest.raises(InputError, match="no masks"):
        _ = TokenStore.open(tmp_path / "store")["train"].targets


def test_images_that_are_no_squares_are_seen_whole(masks, tmp_path):
    store = extract(masks, "patches:4", tmp_path / "store", void=9, image_size=(8, 12))
    assert store.grid == (2, 3)
    targets, weights = patch_targets(open_source(masks, void=9).mask("test", 2), Window(0, 0, *SIZE), (2, 3), 3)
    assert np.array_equal(store["test"].targets[2], targets)
    assert np.array_equal(store["test"].weights[2], weights)
    same = extract(masks, None, tmp_path / "same", like=tmp_path / "store")
    assert same.manifest.config["preprocessing"]["image_size"] == [8, 12]
