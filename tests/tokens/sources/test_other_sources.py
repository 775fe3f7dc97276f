"""Tar shards, data sets of the datasets library and of torchvision, all made here."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convexhead.errors import FileFormatError, HubError, InputError
from convexhead.tokens import BrokenImageError, extract, open_source
from convexhead.tokens.backbones.timm_import import import_torchvision
from convexhead.tokens.store.census import take_census

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two train shards of five and four images, labels 3 and 12, and a test shard of three."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for name, rows in {"train-000": range(5), "train-001": range(5, 9), "test-000": range(9, 12)}.items():
        members = {}
        for i in rows:
            members[f"{i:04d}.png"] = png(PIXELS[i])
            members[f"{i:04d}.cls"] = b"12\n" if i % 2 else b"3"
            members[f"{i:04d}.json"] = b"{}"
        write_tar(folder / f"{name}.tar", members)
    return folder


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/t*-{000..000}.tar"])
def test_webdataset(tars: Path, pattern: str) -> None:
    source = open_source(f"webdataset:{tars}{pattern}")
    assert source.splits == ("train", "test")
    assert source.class_names == ["3", "12"]
    n = 5 if "{" in pattern else 9
    assert source.labels("train").tolist() == [i % 2 for i in range(n)]
    assert source.files("test") == ["test-000.tar/0009.png", "test-000.tar/0010.png", "test-000.tar/0011.png"]
    for split, rows in (("train", range(n)), ("test", range(9, 12))):
        for index, row in enumerate(rows):
            np.testing.assert_array_equal(source.load(split, index), PIXELS[row])


def test_webdataset_is_extracted_as_a_folder_is(tars: Path, tmp_path: Path) -> None:
    store = extract(f"webdataset:{tars}", "patches:4", tmp_path / "out", dtype="float32", standardize=False)
    patches = PIXELS[:9].reshape(9, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(9, 4, 48) / 255
    np.testing.assert_allclose(store["train"].read(), patches, atol=1e-6)


def test_webdataset_errors(tars: Path, tmp_path: Path) -> None:
    before = open_source(f"webdataset:{tars}").fingerprint()
    with pytest.raises(InputError, match="no file matches"):
        open_source(f"webdataset:{tmp_path}/none-*.tar")
    with pytest.raises(InputError, match=r"no tar shard '.*train-002\.tar'"):
        open_source(f"webdataset:{tars}/train-{{000..002}}.tar")
    with pytest.raises(InputError, match="no train shards"):
        open_source(f"webdataset:{tars}/test-*.tar")
    write_tar(tars / "train-000.tar", {"a.png": b"not an image", "a.cls": b"3"})
    source = open_source(f"webdataset:{tars}")
    assert source.fingerprint() != before
    with pytest.raises(BrokenImageError, match=r"train-000\.tar/a\.png"):
        source.load("train", 0)
    write_tar(tars / "train-000.tar", {"a.png": png(PIXELS[0])})
    with pytest.raises(FileFormatError, match=r"'a\.png' has no label"):
        open_source(f"webdataset:{tars}")
    write_tar(tars / "train-000.tar", {"a.txt": b"text"})
    with pytest.raises(InputError, match="holds no images"):
        open_source(f"webdataset:{tars}")
    (tars / "train-000.tar").write_bytes(b"1" * 2000)
    with pytest.raises(FileFormatError, match="not a whole, uncompressed tar"):
        open_source(f"webdataset:{tars}")
    with tarfile.open(tars / "train-000.tar", "w:gz") as archive:
        archive.add(tars / "train-001.tar", "x.tar")
    with pytest.raises(FileFormatError, match="uncompressed"):
        open_source(f"webdataset:{tars}")


def parquet(folder: Path, **columns: Any) -> Path:
    """Write a data set of twelve images as train and validation parquet files."""
    datasets = pytest.importorskip("datasets")
    folder.mkdir()
    features = datasets.Features({"picture": datasets.Image(), **{name: kind for name, (kind, _) in columns.items()}})
    for split, rows in (("train", range(9)), ("validation", range(9, 12))):
        data = {"picture": [{"bytes": png(PIXELS[i]), "path": None} for i in rows]}
        data |= {name: [values[i] for i in rows] for name, (_, values) in columns.items()}
        datasets.Dataset.from_dict(data, features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other sources are tested without the library, too."""
    if importlib.util.find_spec("datasets"):
        config = importlib.import_module("datasets").config
        monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_hf_folder_of_parquet_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=["cat", "dog"])
    folder = parquet(tmp_path / "pets", label=(kind, [i % 2 for i in range(12)]))
    source = open_source(f"hf:{folder}")
    assert source.splits == ("train", "val")
    assert source.class_names == ["cat", "dog"]
    assert source.labels("train").tolist() == [i % 2 for i in range(9)]
    np.testing.assert_array_equal(source.load("val", 2), PIXELS[11])
    assert source.fingerprint() == open_source(f"hf:{folder}").fingerprint()
    assert extract(f"hf:{folder}", "patches:4", tmp_path / "out")["val"].shape == (3, 4, 48)


def test_hf_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    fine = (datasets.ClassLabel(names=["a", "b", "c"]), [i % 3 for i in range(12)])
    coarse = (datasets.Value("string"), ["u10" if i % 2 else "u9" for i in range(12)])
    labels = (datasets.ClassLabel(names=["x", "y"]), [0] * 12)
    folder = parquet(tmp_path / "two", fine=fine, coarse=coarse, other=labels)
    with pytest.raises(InputError, match=r"label columns fine, other: .*label=COLUMN"):
        open_source(f"hf:{folder}")
    source = open_source(f"hf:{folder}?label=coarse")
    assert source.class_names == ["u9", "u10"]
    assert source.labels("train").tolist() == [i % 2 for i in range(9)]
    with pytest.raises(InputError, match="did you mean 'fine'"):
        open_source(f"hf:{folder}?label=fin")
    with pytest.raises(InputError, match="did you mean 'label'"):
        open_source(f"hf:{folder}?labels=fine")


def test_hf_folder_of_images(photos: Path) -> None:
    source, plain = open_source(f"hf:{photos}"), open_source(photos)
    assert source.splits == plain.splits
    assert source.class_names == plain.class_names
    assert np.bincount(source.labels("test")).tolist() == [3, 3]
    ours = {np.asarray(source.load("test", i)).tobytes() for i in range(6)}
    assert ours == {np.asarray(plain.load("test", i)).tobytes() for i in range(6)}
    path = photos / "test" / "cat" / "img1.png"
    path.write_bytes(path.read_bytes()[:60])
    broken = open_source(f"hf:{photos}")
    with pytest.raises(BrokenImageError, match="test-"):
        [broken.load("test", i) for i in range(6)]


def test_hf_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_retries: Callable[..., None]) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match="not a folder that datasets can read"):
        open_source(f"hf:{tmp_path / 'empty'}")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://192.0.2.1")
    monkeypatch.setattr(datasets, "load_dataset", no_retries)
    with pytest.raises(HubError, match=r"hf:uoft-cs/cifar100.*cannot be reached"):
        open_source("hf:uoft-cs/cifar100")


def test_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CIFAR-100 of twelve images in the official layout, with checksums to match."""
    cls = import_torchvision().datasets.CIFAR100
    folder = tmp_path / cls.base_folder
    folder.mkdir()

    def write(name: str, content: dict[str, Any]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    flat = PIXELS.repeat(4, 1).repeat(4, 2).transpose(0, 3, 1, 2).reshape(12, -1)
    train = write("train", {"data": flat[:8], "fine_labels": [i % 2 for i in range(8)]})
    test = write("test", {"data": flat[8:], "fine_labels": [1, 0, 0, 1]})
    meta = write("meta", {"fine_label_names": ["apple", "bear"]})
    monkeypatch.setattr(cls, "train_list", [["train", train]])
    monkeypatch.setattr(cls, "test_list", [["test", test]])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": meta})
    source = open_source(f"torchvision:CIFAR100@{tmp_path}")
    assert source.splits == ("train", "test")
    assert source.class_names == ["apple", "bear"]
    assert source.labels("test").tolist() == [1, 0, 0, 1]
    np.testing.assert_array_equal(np.asarray(source.load("test", 3))[::4, ::4], PIXELS[11])


def test_torchvision_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_retries: Callable[..., None]) -> None:
    with pytest.raises(InputError, match="did you mean 'CIFAR100'"):
        open_source("torchvision:CIFAR1000")
    cls = import_torchvision().datasets.CIFAR100
    monkeypatch.setattr(cls, "url", "http://192.0.2.1/cifar.tar.gz")
    monkeypatch.setattr(cls, "download", no_retries)
    with pytest.raises(HubError, match=r"CIFAR100 are not in .*cannot be reached"):
        open_source(f"torchvision:CIFAR100@{tmp_path}")


def tar_bytes(members: list[tuple[str, bytes]], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


PAIRS = [(f"{i}.{kind}", png(PIXELS[i]) if kind == "png" else b"a") for i in range(3) for kind in ("png", "cls")]


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tar_bytes(PAIRS)
    end = len(whole.rstrip(b"\0")) + 511
    end -= end % 512  # the two blocks of zeros begin here
    shard = tmp_path / "s.tar"
    shard.write_bytes(whole)
    assert len(open_source(f"webdataset:{shard}").labels("train")) == 3
    shard.write_bytes(whole[: end + 1024])
    assert len(open_source(f"webdataset:{shard}").labels("train")) == 3
    for cut in [*range(0, end, 128), end - 1, end, end + 1, end + 511, end + 512, end + 1023]:
        shard.write_bytes(whole[:cut])
        with pytest.raises(FileFormatError, match="is not a whole"):
            open_source(f"webdataset:{shard}")


def test_a_tar_that_goes_on_or_is_damaged_is_refused(tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    shard.write_bytes(tar_bytes(PAIRS[:4]) + tar_bytes(PAIRS[4:]))
    with pytest.raises(FileFormatError, match=r"goes on after its end, .*tar --concatenate"):
        open_source(f"webdataset:{shard}")
    whole = bytearray(tar_bytes(PAIRS))
    second = 512 + 512 * -(-len(PAIRS[0][1]) // 512)
    for at in (second, second + 150, second + 300):  # in the header of the second file
        damaged = whole.copy()
        damaged[at] ^= 1
        shard.write_bytes(damaged)
        with pytest.raises(FileFormatError, match=f"no file's header at byte {second}"):
            open_source(f"webdataset:{shard}")


P, Q = png(PIXELS[0]), png(PIXELS[1])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", P), ("a.cls", b"1"), ("a.jpg", Q)], r"'a.png' and 'a.jpg' are two images of the key 'a'"),
        ([("a.1.png", P), ("a.2.png", Q), ("a.cls", b"1")], r"'a.1.png' and 'a.2.png' are two images of the key 'a'"),
        ([("a.1.png", P), ("a.1.cls", b"1"), ("a.2.cls", b"2")], "two labels of the key 'a'"),
        ([("a.png", P), ("a.cls", b"1"), ("a.png", Q)], "two images of the key 'a'"),
        ([("a.png", P), ("a.cls", b"1"), ("./a.cls", b"2")], "two labels of the key 'a'"),
        ([("a.png", P), ("a.cls", b"1"), ("b.png", P)], "image 'b.png' has no label"),
        ([("a.png", P), ("a.cls", b"1"), ("b.cls", b"1")], "label 'b.cls' has no image"),
        ([("a.png", P), ("a.cls", b"1"), ("b.heic", P), ("b.cls", b"1")], "label 'b.cls' has no image"),
        ([("a.png", P), ("a.cls", b" \n")], "image 'a.png' has no label"),
        ([("x/a.png", P), ("y/a.cls", b"1")], "image 'x/a.png' has no label"),
        ([("a.png", P), ("a.cls", b"\xff")], "not a whole, uncompressed tar"),
    ],
)
def test_no_image_or_label_of_a_shard_disappears(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    (tmp_path / "s.tar").write_bytes(tar_bytes(members))
    with pytest.raises(FileFormatError, match=message):
        open_source(f"webdataset:{tmp_path / 's.tar'}")


def test_links_of_a_shard_are_refused(tmp_path: Path) -> None:
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        with tarfile.open(tmp_path / "s.tar", "w") as archive:
            for name, content in PAIRS[:2]:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
            entry = tarfile.TarInfo("1.png")
            entry.type, entry.linkname = kind, "0.png"
            archive.addfile(entry)
        with pytest.raises(FileFormatError, match=r"'1.png' is a link"):
            open_source(f"webdataset:{tmp_path / 's.tar'}")


def test_webdataset_keys_and_what_is_left_out(tmp_path: Path) -> None:
    members = [
        *(("d.x/a.v1.PNG", P), ("d.x/a.CLS", b"c"), ("d.x/a.json", b"{}"), ("b.cls", b"\xc3\xa9 t"), ("b.png", Q)),
        *(("._b.png", b"mac"), ("README", b""), ("long/" * 60 + "\u65e5.png", P), ("long/" * 60 + "\u65e5.cls", b"c")),
    ]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        (tmp_path / "s.tar").write_bytes(tar_bytes(members, format=form))
        source = open_source(f"webdataset:{tmp_path}")
        assert source.class_names == ["c", "\u00e9 t"]
        assert source.files("train")[:2] == ["s.tar/d.x/a.v1.PNG", "s.tar/b.png"]
        assert source.labels("train").tolist() == [0, 1, 0]
        for i, row in enumerate((0, 1, 0)):
            np.testing.assert_array_equal(source.load("train", i), PIXELS[row])
        found = take_census(source)["left_out"]
        assert {reason: what["names"] for reason, what in found.items()} == {
            "hidden": ["s.tar/._b.png"],
            "no image or label (.json)": ["s.tar/d.x/a.json"],
            "no image or label (no extension)": ["s.tar/README"],
        }
    (tmp_path / "more.tgz").write_bytes(b"")
    assert open_source(f"webdataset:{tmp_path}").left_out["beside the shards"] == ["more.tgz"]
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileFormatError, match=r"gone\.tar"):
        open_source(f"webdataset:{tmp_path}")


@pytest.mark.parametrize(
    ("shards", "splits"),
    [
        (["train-0", "imagenet-val-0", "my_test_0"], ["train", "val", "test"]),
        (["training-0", "validation-0", "testing-0"], ["train", "val", "test"]),
        (["valley-0", "testimony-0", "a0"], ["train"] * 3),
        (["TRAIN0", "VAL0"], ["train", "val"]),
        (["train/0", "val/0", "test/0"], ["train", "val", "test"]),
        (["test/0", "test/1"], ["train", "train"]),  # one folder: its name says nothing
    ],
)
def test_shards_say_their_split(tmp_path: Path, shards: list[str], splits: list[str]) -> None:
    for shard in shards:
        (tmp_path / shard).parent.mkdir(exist_ok=True)
        (tmp_path / f"{shard}.tar").write_bytes(tar_bytes(PAIRS))
    source = open_source(f"webdataset:{tmp_path}/{'*/' * shards[0].count('/')}*.tar")
    assert source.splits == tuple(split for split in ("train", "val", "test") if split in splits)
    for split in source.splits:
        assert len(source.labels(split)) == 3 * splits.count(split)
        assert len(set(source.files(split))) == len(source.files(split))


def test_shard_of_two_splits_and_class_without_train_images(tmp_path: Path) -> None:
    (tmp_path / "train-0.tar").write_bytes(tar_bytes(PAIRS))
    (tmp_path / "test-0.tar").write_bytes(tar_bytes([("a.png", P), ("a.cls", b"zebra")]))
    with pytest.raises(InputError, match="the class 'zebra' has test images but no train images"):
        open_source(f"webdataset:{tmp_path}")
    (tmp_path / "test-0.tar").rename(tmp_path / "train-test.tar")
    with pytest.raises(InputError, match="has the names of 2 splits"):
        open_source(f"webdataset:{tmp_path}")


def deep_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 25700, np.uint16)).save(buffer, "png")
    return buffer.getvalue()


def test_deep_images_of_every_source(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "s.tar").write_bytes(tar_bytes([("a.png", deep_png()), ("a.cls", b"c")]))
    (tmp_path / "pet").mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = {"image": [{"bytes": deep_png(), "path": None}], "label": [3]}
    datasets.Dataset.from_dict(data, features).to_parquet(tmp_path / "pet" / "train.parquet")
    for spec in (f"webdataset:{tmp_path / 's.tar'}", f"hf:{tmp_path / 'pet'}"):
        store = extract(spec, "patches:4", tmp_path / spec[:2], standardize=False, dtype="float32")
        np.testing.assert_allclose(store["train"].read(), 100 / 255, atol=1e-6)


def hf_set(folder: Path, **splits: tuple[Any, list[Any]]) -> str:
    """Write one parquet file a split, each with a kind of label and its labels."""
    datasets = pytest.importorskip("datasets")
    folder.mkdir()
    for split, (kind, labels) in splits.items():
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        data = {"image": [{"bytes": P, "path": None}] * len(labels), "label": labels}
        datasets.Dataset.from_dict(data, features).to_parquet(folder / f"{split}.parquet")
    return f"hf:{folder}"


def test_hf_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    value, names = datasets.Value, datasets.ClassLabel(names=["cat", "dog"])
    refused = {
        "none": (value("string"), ["a", None], r"train-1.* has no label \(None\)"),
        "empty": (value("string"), ["a", " "], "train-1.* has no label"),
        "null": (value("int64"), [3, None], "train-1.* has no label"),
        "nan": (value("float64"), [3.0, float("nan")], "train-1.* has no label"),
        "half": (value("float32"), [3.0, 0.5], "train-1.* has the label '0.5'"),
        "list": (datasets.Sequence(value("int64")), [[1], [2, 3]], r"train-0.* has the label '\[1\]'"),
        "dict": ({"a": value("int64")}, [{"a": 1}, {"a": 2}], "train-0.* has the label"),
        "hidden": (names, [0, -1], "train-1.* has no label"),
        "unknown": (names, [0, None], "train-1.* has no label"),
    }
    for name, (kind, labels, message) in refused.items():
        with pytest.raises(InputError, match=message):
            open_source(hf_set(tmp_path / name, train=(kind, labels)))
    for name, (kind, labels, classes) in {
        "whole": (value("float64"), [10.0, 9.0], ["9", "10"]),
        "bool": (value("bool"), [True, False], ["False", "True"]),
        "text": (value("string"), ["\u00e9", "b c"], ["b c", "\u00e9"]),
    }.items():
        source = open_source(hf_set(tmp_path / name, train=(kind, labels)))
        assert source.class_names == classes
        assert source.labels("train").tolist() == [1, 0]


def test_hf_classes_are_matched_by_name(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one, other = datasets.ClassLabel(names=["cat", "dog"]), datasets.ClassLabel(names=["dog", "cat"])
    # The library reads all files with the first one's names.
    with pytest.raises(InputError, match=r"train\.parquet has the classes|test\.parquet has the classes"):
        open_source(hf_set(tmp_path / "files", train=(one, [0, 1]), test=(other, [0, 0])))

    def save(name: str, test: Any, labels: list[int], **more: Any) -> str:
        kinds = {"train": (one, [0, 1]), "test": (test, labels), **more}
        parts = {}
        for split, (kind, values) in kinds.items():
            features = datasets.Features({"image": datasets.Image(), "label": kind})
            data = {"image": [{"bytes": P, "path": None}] * len(values), "label": values}
            parts[split] = datasets.Dataset.from_dict(data, features)
        datasets.DatasetDict(parts).save_to_disk(tmp_path / name)
        return f"hf:{tmp_path / name}"

    source = open_source(save("saved", other, [0, 0, 1], extra=(one, [1])))
    assert source.class_names == ["cat", "dog"]
    assert source.labels("test").tolist() == [1, 1, 0]
    assert take_census(source)["left_out"] == {"splits of another name": {"count": 1, "names": ["extra"]}}
    with pytest.raises(InputError, match="the class 'emu' has test images but no train images"):
        open_source(save("stranger", datasets.ClassLabel(names=["emu", "cat"]), [0]))
    with pytest.raises(InputError, match="both 'validation' and 'valid'"):
        open_source(save("twice", one, [0], validation=(one, [0]), valid=(one, [1])))


def test_hf_broken_images_can_be_skipped(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    images = [{"bytes": P, "path": None}, None, {"bytes": b"", "path": None}]
    (tmp_path / "set").mkdir()
    data = datasets.Dataset.from_dict({"image": images, "label": [1, 1, 2]}, features)
    data.to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(BrokenImageError, match="train-1"):
        extract(f"hf:{tmp_path / 'set'}", "patches:4", tmp_path / "strict")
    store = extract(f"hf:{tmp_path / 'set'}", "patches:4", tmp_path / "out", skip_broken=True)
    assert store["train"].files == ["train-0"]
    assert store["train"].broken == ["train-1", "train-2"]
    with pytest.raises(InputError, match="holds no images"):
        open_source(f"hf:{tmp_path / 'set'}?image=label")


def test_torchvision_damage(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in (("train", 4), ("t10k", 2)):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, n, 28, 28) + bytes(784 * n))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + bytes(n))
    assert len(open_source(f"torchvision:MNIST@{tmp_path}").labels("train")) == 4
    (raw / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 3) + bytes(3))
    with pytest.raises(FileFormatError, match="4 train images and 3 labels"):
        open_source(f"torchvision:MNIST@{tmp_path}")
    (raw / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08")
    with pytest.raises(FileFormatError, match="is damaged"):
        open_source(f"torchvision:MNIST@{tmp_path}")
    (raw / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 4) + bytes(4))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 2) + b"\1\1")
    with pytest.raises(InputError, match="the class '1 - one' has test images but no train images"):
        open_source(f"torchvision:MNIST@{tmp_path}")
