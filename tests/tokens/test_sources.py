"""Image sources: what they hold, and how they refuse what they cannot use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens import BrokenImageError, open_source


def test_folder_with_splits(photos: Path) -> None:
    source = open_source(photos)
    assert source.splits == ("train", "test")
    assert source.class_names == ["cat", "dog"]
    assert source.labels("train").dtype == np.int64
    assert source.labels("train").tolist() == [0] * 11 + [1] * 11
    assert source.files("train")[:2] == ["train/cat/img1.png", "train/cat/img2.png"]
    assert source.files("train")[10] == "train/cat/img11.png"  # natural order
    expected = Image.open(photos / "test" / "dog" / "img2.png")
    np.testing.assert_array_equal(source.load("test", 4), expected)


def test_folder_without_splits(tmp_path: Path, write_images: Any) -> None:
    source = open_source(str(write_images(tmp_path / "flat", {"test": 2, "b": 1})))
    assert source.splits == ("train",)
    assert source.class_names == ["b", "test"]
    assert source.files("train") == ["b/img1.png", "test/img1.png", "test/img2.png"]


def test_folder_formats_and_orientation(tmp_path: Path) -> None:
    folder = tmp_path / "mixed" / "a"
    folder.mkdir(parents=True)
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    for extension in ("jpg", "png", "webp", "bmp", "tif", "gif", "JPEG"):
        grey.save(folder / f"x.{extension}")
    (folder / "notes.txt").write_text("not an image")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # turn by 90 degrees
    grey.save(folder / "turned.jpg", exif=rotated)
    source = open_source(tmp_path / "mixed")
    images = {name: source.load("train", i) for i, name in enumerate(source.files("train"))}
    assert len(images) == 8
    assert {image.mode for image in images.values()} == {"RGB"}
    assert images.pop("a/turned.jpg").size == (3, 4)
    assert {image.size for image in images.values()} == {(4, 3)}


def test_folder_fingerprint_follows_content(photos: Path, tmp_path: Path) -> None:
    fingerprint = open_source(photos).fingerprint()
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    os.utime(copy / "train" / "cat" / "img1.png", (1, 1))
    assert open_source(copy).fingerprint() == fingerprint
    image = copy / "train" / "cat" / "img1.png"
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    image.write_bytes(content)
    os.utime(image, (1, 1))
    assert open_source(copy).fingerprint() != fingerprint


def test_folder_errors(photos: Path, tmp_path: Path, write_images: Any) -> None:
    with pytest.raises(InputError, match="no folder '/nowhere/at-all'"):
        open_source("/nowhere/at-all")
    with pytest.raises(InputError, match="no class folders"):
        open_source(photos / "train" / "cat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no class folders"):
        open_source(tmp_path / "empty")
    with pytest.raises(InputError, match="unknown split 'val'"):
        open_source(photos).labels("val")
    (photos / "train" / "emu").mkdir()
    with pytest.raises(InputError, match=r"emu' holds no images"):
        open_source(photos)
    (photos / "train" / "emu").rmdir()
    write_images(photos / "test", {"zebra": 1})
    with pytest.raises(InputError, match=r"zebra' has no counterpart"):
        open_source(photos)
    shutil.rmtree(photos / "test" / "zebra")
    write_images(photos / "validation", {"cat": 1})
    with pytest.raises(InputError, match="'validation' beside train"):
        open_source(photos)
    shutil.rmtree(photos / "train")
    with pytest.raises(InputError, match="no train/"):
        open_source(photos)


def test_broken_image_is_named(photos: Path) -> None:
    path = photos / "train" / "cat" / "img2.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(BrokenImageError, match=r"img2\.png"):
        open_source(photos).load("train", 1)


def test_unknown_scheme() -> None:
    with pytest.raises(InputError, match="did you mean 'sklearn'"):
        open_source("sklern:digits")
    with pytest.raises(InputError, match="did you mean 'digits'"):
        open_source("sklearn:digit")


def test_digits() -> None:
    source = open_source("sklearn:digits")
    assert source.splits == ("train", "test")
    counts = [len(source.labels(split)) for split in source.splits]
    assert counts == [1257, 540]
    assert source.class_names == [str(c) for c in range(10)]
    assert not set(source.files("train")) & set(source.files("test"))
    shares = np.bincount(source.labels("test")) / np.bincount(source.labels("train"))
    assert np.ptp(shares) < 0.02  # stratified
    image = np.asarray(source.load("train", 0))
    assert image.shape == (8, 8, 3)
    assert (image[..., 0] == image[..., 2]).all()
    assert image.max() == 255 or image.max() == round(15 * 255 / 16)
    assert source.fingerprint() == open_source("sklearn:digits").fingerprint()


def test_npz(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "one.npz", images=images, labels=np.array([7, 10, 7, 9, 10]))
    one = open_source(f"npz:{tmp_path / 'one.npz'}")
    assert one.splits == ("train",)
    assert one.class_names == ["7", "9", "10"]
    assert one.labels("train").tolist() == [0, 2, 0, 1, 2]
    np.testing.assert_array_equal(one.load("train", 3), images[3])

    np.savez_compressed(
        tmp_path / "two.npz",
        train_images=images[..., 0],
        train_labels=np.array([[0], [1], [1], [0], [1]]),
        test_images=images[:2, ..., :1],
        test_labels=np.array([[1], [0]]),
        class_names=np.array(["no", "yes"]),
    )
    two = open_source(f"npz:{tmp_path / 'two.npz'}")
    assert two.splits == ("train", "test")
    assert two.class_names == ["no", "yes"]
    assert two.labels("test").tolist() == [1, 0]
    assert two.load("test", 0).mode == "RGB"


IMAGES = np.zeros((3, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"pictures": IMAGES}, FileFormatError, r"no array images .*it holds pictures"),
        ({"images": IMAGES}, FileFormatError, "no array labels"),
        ({"test_images": IMAGES, "test_labels": np.zeros(3, int)}, FileFormatError, "train_images"),
        ({"images": IMAGES, "labels": np.zeros(2, int)}, InputError, "3 images but labels has shape"),
        ({"images": IMAGES.astype(float), "labels": np.zeros(3, int)}, InputError, "must be uint8"),
        ({"images": IMAGES[0], "labels": np.zeros(4, int)}, InputError, "must be uint8 of shape"),
        ({"images": IMAGES, "labels": np.zeros(3)}, InputError, "integers or strings, not float64"),
        (
            {"images": IMAGES, "labels": np.array([0, 1, 2]), "class_names": np.array(["a", "b"])},
            InputError,
            "below 2",
        ),
        (
            {"images": IMAGES, "labels": np.array([0, "a", None], dtype=object)},
            FileFormatError,
            "plain arrays",
        ),
    ],
)
def test_npz_errors(tmp_path: Path, arrays: dict[str, Any], error: type[Exception], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(error, match=message):
        open_source(f"npz:{tmp_path / 'bad.npz'}")


def test_npz_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        open_source(f"npz:{tmp_path / 'none.npz'}")
    file = tmp_path / "text.npz"
    file.write_text("hello")
    with pytest.raises(FileFormatError, match="not an npz file"):
        open_source(f"npz:{file}")
    with pytest.raises(InputError, match="did you mean 'npz:"):
        open_source(file)
    np.save(tmp_path / "array.npy", IMAGES)
    with pytest.raises(FileFormatError, match="not an npz file"):
        open_source(f"npz:{tmp_path / 'array.npy'}")
    np.savez(tmp_path / "cut.npz", images=IMAGES, labels=np.zeros(3, int))
    content = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(FileFormatError, match="not an npz file"):
        open_source(f"npz:{tmp_path / 'cut.npz'}")
