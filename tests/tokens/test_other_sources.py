"""Tar shards, data sets of the datasets library and of torchvision, all made here."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import pickle
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convexhead.errors import FileFormatError, HubError, InputError
from convexhead.tokens import BrokenImageError, extract, open_source
from convexhead.tokens.timm_import import import_torchvision

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


def test_hf_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match="not a folder that datasets can read"):
        open_source(f"hf:{tmp_path / 'empty'}")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://192.0.2.1")
    start = time.monotonic()
    with pytest.raises(HubError, match=r"hf:uoft-cs/cifar100.*cannot be reached"):
        open_source("hf:uoft-cs/cifar100")
    assert time.monotonic() - start < 5


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


def test_torchvision_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="did you mean 'CIFAR100'"):
        open_source("torchvision:CIFAR1000")
    cls = import_torchvision().datasets.CIFAR100
    monkeypatch.setattr(cls, "url", "http://192.0.2.1/cifar.tar.gz")
    start = time.monotonic()
    with pytest.raises(HubError, match=r"CIFAR100 are not in .*cannot be reached"):
        open_source(f"torchvision:CIFAR100@{tmp_path}")
    assert time.monotonic() - start < 5
