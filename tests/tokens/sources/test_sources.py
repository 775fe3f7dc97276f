"""Image sources: what they hold, and how they refuse what they cannot use."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens import BrokenImageError, TokenStore, extract, merge_stores, open_source
from convexhead.tokens.backbones.timm_import import import_torchvision
from convexhead.tokens.store.census import census_lines
from convexhead.tokens.store.manifest import digest_json


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
    write_images(photos / "extra", {"cat": 1})
    with pytest.raises(InputError, match="'extra' beside train"):
        open_source(photos)
    shutil.rmtree(photos / "extra")
    write_images(photos / "validation", {"cat": 1})
    assert open_source(photos).splits == ("train", "val", "test")
    assert open_source(photos).files("val") == ["validation/cat/img1.png"]
    write_images(photos / "val", {"cat": 1})
    with pytest.raises(InputError, match="both 'val' and 'validation'"):
        open_source(photos)
    shutil.rmtree(photos / "val")
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
        ({"images": IMAGES + 1.01, "labels": np.zeros(3, int)}, InputError, r"floats outside of \[0, 1\]"),
        ({"images": IMAGES - 0.01, "labels": np.zeros(3, int)}, InputError, r"floats outside of \[0, 1\]"),
        ({"images": IMAGES * np.nan, "labels": np.zeros(3, int)}, InputError, r"floats outside of \[0, 1\]"),
        *(
            ({"images": IMAGES.astype(kind), "labels": np.zeros(3, int)}, InputError, f"not {kind}, whose black")
            for kind in ("int8", "int16", "int64", "uint32", "complex64")
        ),
        (
            {"images": np.zeros((3, 3, 32, 32), np.uint8), "labels": np.zeros(3, int)},
            InputError,
            "channels come last.*transpose",
        ),
        *(
            ({"images": np.zeros(shape, np.uint8), "labels": np.zeros(3, int)}, InputError, "channels first or last")
            for shape in ((3, 3, 3, 3), (3, 3, 8, 1), (3, 1, 8, 3))
        ),
        ({"images": np.zeros((3, 8, 8, 4), np.uint8), "labels": np.zeros(3, int)}, InputError, "must be uint8"),
        (
            {"images": IMAGES, "labels": np.zeros(3, int), "test_labels": np.zeros(3, int)},
            InputError,
            "test_labels belongs to no split",
        ),
        (
            {
                **{"train_images": IMAGES, "train_labels": np.zeros(3, int)},
                **{"validation_images": IMAGES, "validation_labels": np.zeros(3, int)},
            },
            InputError,
            "validation_images belongs to no split",
        ),
        ({"images": IMAGES, "labels": np.array(["a", "", "b"])}, InputError, "train-1 has no label"),
        (
            {
                **{"train_images": IMAGES, "train_labels": np.array([0, 1, 1])},
                **{"test_images": IMAGES, "test_labels": np.array([0, 1, 2])},
            },
            InputError,
            "the class '2' has test images but no train images",
        ),
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


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 128, 257, 32768, 65535], np.uint16), [0, 0, 1, 128, 255]),
        (np.array([0, 128, 257, 32768, 65535], ">u2"), [0, 0, 1, 128, 255]),
        (np.array([False, True, True, False, True]), [0, 255, 255, 0, 255]),
        (np.array([0, 0.5, 1 / 255, 100 / 255, 1]), [0, 128, 1, 100, 255]),
        (np.array([0, 0.5, 1 / 255, 100 / 255, 1], np.float32), [0, 128, 1, 100, 255]),
        (np.array([0, 0.5, 1 / 255, 100 / 255, 1], np.float16), [0, 128, 1, 100, 255]),
    ],
    ids=lambda values: str(getattr(values, "dtype", "")),
)
def test_npz_ranges(tmp_path: Path, values: Any, expected: list[int]) -> None:
    images = np.stack([values.reshape(1, 5), values[::-1].reshape(1, 5)])
    np.savez(tmp_path / "deep.npz", images=images, labels=np.array([b"cat", b"dog"]), note=np.zeros(3))
    source = open_source(f"npz:{tmp_path / 'deep.npz'}")
    np.testing.assert_array_equal(np.asarray(source.load("train", 0))[0, :, 1], expected)
    np.testing.assert_array_equal(np.asarray(source.load("train", 1))[0, :, 1], expected[::-1])
    assert source.class_names == ["cat", "dog"]
    assert source.left_out == {"arrays of another name": ["note"]}


def test_nested_folders_belong_to_their_class(tmp_path: Path, write_images: Any) -> None:
    """As torchvision's ImageFolder has it: files and labels of both agree."""
    root = tmp_path / "nested"
    write_images(root / "train", {"cat": 2, "dog/big": 3, "dog/small/black": 2})
    write_images(root / "train" / "dog", {"b.old": 1})
    write_images(root / "test", {"cat/a": 1, "dog": 2})
    source = open_source(root)
    assert source.class_names == ["cat", "dog"]
    folders = import_torchvision().datasets.ImageFolder
    for split in source.splits:
        theirs = folders(str(root / split))
        expected = sorted((Path(path).relative_to(root).as_posix(), label) for path, label in theirs.samples)
        ours = sorted(zip(source.files(split), source.labels(split).tolist(), strict=True))
        assert ours == expected
        assert theirs.classes == source.class_names


def test_folder_counts_what_it_leaves_out(photos: Path, tmp_path: Path) -> None:
    cat = photos / "train" / "cat"
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "more.txt", "img.heic", "README", ".hidden.png"):
        (cat / name).write_bytes(b"x")
    (photos / "train" / "logo.png").write_bytes(b"x")
    (photos / "list.csv").write_bytes(b"x")
    (photos / ".git").mkdir()
    store = extract(photos, "patches:4", tmp_path / "out")
    found = store.info()["found"]
    assert found["splits"] == {
        "train": {"images": 22, "per_class": [11, 11]},
        "test": {"images": 6, "per_class": [3, 3]},
    }
    assert {reason: what["names"] for reason, what in found["left_out"].items()} == {
        "beside the folders of classes": ["list.csv", "train/logo.png"],
        "hidden": [".git", "train/cat/.DS_Store", "train/cat/.hidden.png"],
        "not an image (.db)": ["train/cat/Thumbs.db"],
        "not an image (.heic)": ["train/cat/img.heic"],
        "not an image (.txt)": ["train/cat/more.txt", "train/cat/notes.txt"],
        "not an image (no extension)": ["train/cat/README"],
    }
    lines = census_lines(found)
    assert lines[0] == "train: 22 images of 2 classes, 11 to 11 a class (median 11)"
    assert "not read, not an image (.txt): 2 ('train/cat/more.txt', 'train/cat/notes.txt')" in lines


def test_stores_without_a_census_still_open(photos: Path, tmp_path: Path) -> None:
    """Earlier versions stored none: such stores are read, extended and merged as before."""
    out = extract(photos, "patches:4", tmp_path / "out").path
    manifest = json.loads((out / "manifest.json").read_bytes())
    del manifest["found"], manifest["checksum"]
    manifest["checksum"] = digest_json(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert TokenStore.open(out).info()["found"] == {}
    assert extract(photos, "patches:4", out)["train"].shape[0] == 22
    (photos / "train" / "cat" / "img1.png").unlink()
    other = extract(photos, "patches:4", tmp_path / "other").path
    assert merge_stores([out, other], tmp_path / "merged").info()["found"] == {}
    again = extract(photos, "patches:4", tmp_path / "again", shard_size=7).path
    (photos / "train" / "dog" / "img1.png").unlink()
    (photos / "test" / "dog" / "x.txt").write_text("")
    last = extract(photos, "patches:4", tmp_path / "last").path
    found = merge_stores([again, last], tmp_path / "both").info()["found"]
    assert found["splits"]["train"] == {"images": 41, "per_class": [20, 21]}
    assert found["left_out"] == {"not an image (.txt)": {"count": 1, "names": ["test/dog/x.txt"]}}


def test_folders_that_look_like_splits(tmp_path: Path, write_images: Any) -> None:
    """None of these is read as classes named after splits, or with train and test images in one class."""
    for name, tree in {
        "capitals": {"Train/cat": 1, "Train/dog": 1, "Test/cat": 1},
        "endings": {"training/cat": 1, "training/dog": 1, "testing/cat": 1},
        "beside": {"Train/cat": 1, "lion": 2},
        "flat": {"train": 2, "test": 2},
    }.items():
        write_images(tmp_path / name, tree)
        with pytest.raises(InputError, match="where class folders should be: splits are the folders train, val, test"):
            open_source(tmp_path / name)
    write_images(tmp_path / "high", {"pets/train/cat": 1, "pets/test/cat": 1, "birds/train/owl": 1})
    with pytest.raises(InputError, match=r"'birds/train' .*looks like a split inside a class"):
        open_source(tmp_path / "high")
    write_images(tmp_path / "one", {"data/cat": 1, "data/dog": 1})
    with pytest.raises(InputError, match="only class folder, and its images lie in folders of their own"):
        open_source(tmp_path / "one")


def test_folder_with_odd_names_and_links(tmp_path: Path, write_images: Any) -> None:
    root = write_images(tmp_path / "odd", {"b\udcff": 1, "\u00e9t\u00e9": 1, "[1]{2} %s": 1})
    for i, name in enumerate(("UP.PNG", "two.dots.Jpg", "\u65e5\u672c.jpeg", "x\udcfe.gif", "-.bmp")):
        Image.new("RGB", (12, 12), (i,) * 3).save(tmp_path / "any.png")
        shutil.copy(tmp_path / "any.png", root / "\u00e9t\u00e9" / name)
    write_images(tmp_path / "elsewhere", {"far": 2})
    (root / "linked").symlink_to(tmp_path / "elsewhere" / "far")
    (root / "\u00e9t\u00e9" / "link.png").symlink_to(tmp_path / "any.png")
    (root / "circle").symlink_to(root / "circle")
    source = open_source(root)
    assert source.class_names == ["[1]{2} %s", "b\udcff", "linked", "\u00e9t\u00e9"]
    assert np.bincount(source.labels("train")).tolist() == [1, 1, 2, 7]
    store = extract(root, "patches:4", tmp_path / "out")
    assert store["train"].files == source.files("train")
    assert source.left_out == {"beside the folders of classes": ["circle"]}
    (root / "linked").unlink()
    (root / "b\udcff" / "loop").symlink_to(root)
    with pytest.raises(InputError, match="is a link to a folder that holds it"):
        open_source(root)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read anything")
def test_folder_without_permission(photos: Path, tmp_path: Path) -> None:
    (photos / "train" / "cat" / "img3.png").chmod(0)
    with pytest.raises(BrokenImageError, match=r"img3\.png': Permission denied"):
        extract(photos, "patches:4", tmp_path / "out")
    assert extract(photos, "patches:4", tmp_path / "out", skip_broken=True)["train"].broken == ["train/cat/img3.png"]
    (photos / "train" / "dog").chmod(0)
    with pytest.raises(InputError, match="cannot list the folder"):
        open_source(photos)
    (photos / "train" / "dog").chmod(0o700)
