"""Reading stores: indexing, reduction, and damaged folders."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens import SplitView, TokenStore, extract
from convexhead.tokens.backbones import Backbone, TokenBatch
from convexhead.tokens.manifest import digest_json


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of digits: 1,257 train and 540 test images as 16 tokens of 12 channels, in many shards."""
    folder = tmp_path_factory.mktemp("stores") / "digits"
    extract("sklearn:digits", "patches:2", folder, shard_size=100, batch_size=100, constant=True)
    return folder


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(finished, tmp_path / "store")
    return tmp_path / "store"


def test_attributes(finished: Path) -> None:
    store = TokenStore.open(finished)
    assert store.splits == ("train", "test")
    train = store["train"]
    assert train.shape == (1257, 16, 13)
    assert len(train) == 1257
    assert train.dtype == np.float32
    assert train.labels.dtype == np.int64
    assert train.labels.shape == (1257,)
    assert len(train.files) == 1257
    assert train.class_names == list("0123456789")
    assert train.grid == (4, 4)
    assert isinstance(TokenStore.open(finished, split="test"), SplitView)
    store.verify()


@pytest.mark.parametrize(
    "rows",
    [
        slice(95, 305),
        slice(None, None, 97),
        slice(-3, None),
        slice(50, 20),
        slice(20, 5, -2),
        np.array([1256, 0, 100, 99, 99, -1]),
        [3, 4],
        [],
        np.arange(1257) % 5 == 0,
        7,
        np.int64(-1),
    ],
    ids=str,
)
def test_rows(finished: Path, rows: Any) -> None:
    train = TokenStore.open(finished)["train"]
    everything = train.read()
    got = train[rows]
    assert got.dtype == np.float32
    expected = everything[np.asarray(rows, dtype=int)] if isinstance(rows, list) else everything[rows]
    np.testing.assert_array_equal(got, expected)


def test_ways_to_read_all(finished: Path) -> None:
    train = TokenStore.open(finished)["train"]
    everything = train.read()
    assert np.isfinite(everything).all()
    np.testing.assert_array_equal(np.asarray(train), everything)
    assert np.asarray(train, dtype=np.float64).dtype == np.float64
    np.testing.assert_array_equal(np.concatenate(list(train.chunks(333))), everything)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(train))[:5], everything[:5])
    raw = train.raw(95, 105)
    assert raw.dtype == np.float16
    assert raw.shape == (10, 16, 12)
    np.testing.assert_array_equal(TokenStore.open(finished).reduction.apply(raw), everything[95:105])


def test_standardised_on_train_only(finished: Path) -> None:
    store = TokenStore.open(finished)
    train, test = store["train"].read()[..., :12], store["test"].read()[..., :12]
    np.testing.assert_allclose(train.mean((0, 1), dtype=np.float64), 0, atol=1e-5)
    np.testing.assert_allclose(train.std((0, 1), dtype=np.float64), 1, atol=1e-3)
    raw = store["train"].raw(0, 1257).astype(np.float64)
    np.testing.assert_allclose(store.reduction.mean, raw.mean((0, 1)), rtol=1e-6)
    assert np.abs(test.mean((0, 1))).max() > 1e-3
    assert (store["test"].read()[..., 12] == 1).all()


@pytest.mark.parametrize("rows", [1257, [0, -1258], np.zeros((2, 2), int), np.zeros(5, bool), [0.5], "valid"])
def test_bad_rows(finished: Path, rows: Any) -> None:
    with pytest.raises(IndexError):
        TokenStore.open(finished)["train"][rows]


def test_several_splits_need_a_name(finished: Path, tmp_path: Path, write_images: Any) -> None:
    several = TokenStore.open(finished)
    with pytest.raises(InputError, match=r"store\['train'\]"):
        len(several)
    with pytest.raises(InputError, match="did you mean 'train'"):
        several["trian"]
    with pytest.raises(InputError, match="no class or register tokens"):
        several["train"].prefix(0, 1)
    single = extract(write_images(tmp_path / "photos", {"a": 2, "b": 3}), "patches:6", tmp_path / "out")
    assert single.shape == single["train"].shape == (5, 4, 108)
    assert len(single) == 5
    np.testing.assert_array_equal(np.asarray(single)[1:3], single[1:3])


def damage_manifest(folder: Path, **changes: Any) -> None:
    """Change entries, with a checksum that fits."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    for key, value in changes.items():
        if value is None:
            del manifest[key]
        else:
            manifest[key] = value
    path.write_text(json.dumps({**manifest, "checksum": digest_json(manifest)}))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def cut(path: Path, n: int) -> None:
    path.write_bytes(path.read_bytes()[:n])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (lambda f: (f / "manifest.json").unlink(), "not a token store"),
        (lambda f: cut(f / "manifest.json", 200), "not readable JSON"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "not readable JSON"),
        (lambda f: (f / "manifest.json").write_text('{"name": "my-app"}'), "something else"),
        (lambda f: damage_manifest(f, version=2), "store format 2"),
        (lambda f: damage_manifest(f, grid=None), "grid"),
        (lambda f: damage_manifest(f, splits={"train": {}}), "shards"),
        (lambda f: damage_manifest(f, complete=False), r"not finished: run .*extract again to resume"),
        (lambda f: (f / "train-00003.safetensors").unlink(), "train-00003.safetensors' is missing"),
        (lambda f: cut(f / "train-00003.safetensors", 999), "has 999 bytes instead of"),
        (lambda f: cut(f / "reduction.safetensors", 50), "not a stored reduction"),
        (lambda f: (f / "reduction.safetensors").unlink(), "not a stored reduction"),
        (lambda f: flip(f / "reduction.safetensors", -3), "reduction.safetensors' has changed"),
        (
            lambda f: flip(f / "manifest.json", (f / "manifest.json").read_bytes().index(b"digits")),
            "has changed",
        ),
    ],
)
def test_damage_is_seen_on_opening(store: Path, damage: Any, message: str) -> None:
    damage(store)
    with pytest.raises(FileFormatError, match=message):
        TokenStore.open(store)


@pytest.mark.parametrize("position", [60, -100, -9000])
def test_flipped_bit_is_seen_by_verify(store: Path, position: int) -> None:
    flip(store / "test-00001.safetensors", position)
    with pytest.raises(FileFormatError, match=r"test-00001\.safetensors' "):
        TokenStore.open(store).verify()


def test_garbled_header_is_seen_on_reading(store: Path) -> None:
    shard = store / "train-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[:16] = b"\xff" * 16
    shard.write_bytes(content)
    with pytest.raises(FileFormatError, match="not a shard"):
        TokenStore.open(store)["train"][:3]


def test_exchanged_shard_is_seen_on_reading(store: Path) -> None:
    shutil.copy(store / "train-00001.safetensors", store / "train-00002.safetensors")
    with pytest.raises(FileFormatError, match=r"not the shard that the manifest lists|instead of"):
        TokenStore.open(store)["train"][:3]


def test_lost_files_are_restored(store: Path, finished: Path) -> None:
    (store / "train-00003.safetensors").unlink()
    cut(store / "test-00000.safetensors", 10)
    flip(store / "test-00002.safetensors", 60)
    flip(store / "reduction.safetensors", -3)
    kept = (store / "train-00002.safetensors").stat().st_mtime_ns
    options: dict[str, Any] = {"shard_size": 100, "batch_size": 100, "constant": True}
    extract("sklearn:digits", "patches:2", store, **options)
    assert (store / "train-00002.safetensors").stat().st_mtime_ns == kept
    assert contents(store) == contents(finished)
    (store / "manifest.json").unlink()
    extract("sklearn:digits", "patches:2", store, **options)
    assert (store / "train-00002.safetensors").stat().st_mtime_ns == kept
    assert contents(store) == contents(finished)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_info(finished: Path) -> None:
    info = json.loads(json.dumps(TokenStore.open(finished).info()))
    assert info["images"] == {"train": 1257, "test": 540}
    assert (info["tokens"], info["grid"], info["channels"], info["stored_channels"]) == (16, [4, 4], 13, 12)
    assert (info["source"], info["backbone"], info["dtype"]) == ("sklearn:digits", "patches:2", "float16")
    assert info["bytes"] == sum(path.stat().st_size for path in finished.glob("t*.safetensors"))


class Prefixed(Backbone):
    """Four tokens of three channels behind a class and a register token, fixed by the image."""

    spec, layer, weights_hash, preprocessing = "prefixed", None, "", {}

    def prepare(self, image: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def forward(self, images: torch.Tensor) -> TokenBatch:
        x = images.flatten(1)[:, :18].float().reshape(-1, 6, 3)
        return TokenBatch(x[:, 2:], x[:, :2] + 300, (2, 2))


def test_class_token_in_front(tmp_path: Path, photos: Path) -> None:
    store = extract(photos, Prefixed(), tmp_path / "out", shard_size=5, dtype="float32", constant=True)
    plain = store["train"]
    view = plain.with_class_token()
    assert view.shape == (22, 5, 4)
    assert view.grid == (5, 1)
    assert plain.shape == (22, 4, 4)
    assert plain.n_prefix == 2
    raw = np.concatenate([plain.prefix(0, 22)[:, :1], plain.raw(0, 22)], axis=1)
    expected = store.reduction.apply(raw)
    np.testing.assert_array_equal(view.read(), expected)
    np.testing.assert_array_equal(np.concatenate(list(view.chunks(4))), expected)
    np.testing.assert_array_equal(view[7], expected[7])
    np.testing.assert_array_equal(view[[20, 3]], expected[[20, 3]])
    # The reduction is that of the other tokens: class tokens, 300 higher, do not move it.
    assert abs(plain.read()[..., :3].mean()) < 1e-4
    assert view.read()[:, 0, :3].mean() > 2
