"""Reading stores: indexing, reduction, and damaged folders."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import convexhead as ch
from convexhead.errors import FileFormatError, InputError
from convexhead.tokens import SplitView, TokenStore, extract
from convexhead.tokens.backbones.base import Backbone, TokenBatch
from convexhead.tokens.store import verified
from convexhead.tokens.store.manifest import digest_json
from convexhead.tokens.store.shards import ShardFile


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


def test_pooled_tokens_are_a_view(finished: Path) -> None:
    """Pooling and a reduction are applied on the way, whichever rows are read; the view says so of itself."""
    whole = TokenStore.open(finished)["train"]
    pooled = whole.pooled((2, 2))
    assert pooled.shape == (1257, 4, 13)
    assert pooled.grid == (2, 2)
    # The reduction is affine: it may come before or after the mean.
    expected = whole.read().reshape(-1, 2, 2, 2, 2, 13).mean((2, 4)).reshape(-1, 4, 13)
    np.testing.assert_allclose(pooled.read(), expected, atol=1e-5)
    for rows in (5, -1, slice(7, 90), slice(None, None, -100), [3, 1, -2], np.arange(1257) % 7 == 0):
        np.testing.assert_array_equal(pooled[rows], pooled.read()[rows])
    np.testing.assert_array_equal(pooled.subset(np.arange(40, 60))[:], pooled[40:60])
    assert len({whole.identity, pooled.identity, whole.pooled((1, 4)).identity}) == 3
    assert whole.pooled((4, 4)).identity == whole.identity
    assert pooled.unreduced().shape == (1257, 16, 12)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(pooled))[:9], pooled[:9])
    with pytest.raises(InputError, match="token_pool"):
        whole.pooled((5, 2))


def test_the_first_classes_are_all_that_a_view_knows(finished: Path) -> None:
    whole = TokenStore.open(finished)["train"]
    three = whole.first_classes(3)
    np.testing.assert_array_equal(three.labels, whole.labels[whole.labels < 3])
    np.testing.assert_array_equal(three[:], whole.read()[whole.labels < 3])
    assert three.class_names == ["0", "1", "2"]
    assert whole.first_classes(10) is whole.first_classes(None) is whole


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


def exchange(store: Path) -> None:
    """Exchange the tokens of two shards of equal size; headers, sizes and times stay."""
    paths = [store / f"train-0000{k}.safetensors" for k in (1, 2)]
    contents = [path.read_bytes() for path in paths]
    times = [path.stat() for path in paths]
    for path, own, other, before in zip(paths, contents, contents[::-1], times, strict=True):
        path.write_bytes(own[:-30000] + other[-30000:])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_quietly(store: Path, position: int = -9000) -> None:
    """Flip a bit of the fifth shard; its size and the time of its last change stay."""
    path = store / "train-00004.safetensors"
    before = path.stat()
    flip(path, position)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_label(store: Path) -> None:
    flip_quietly(store, ShardFile(store / "train-00004.safetensors")._places["labels"][2])


USES: dict[str, Any] = {
    "fit": lambda train: ch.ConvexHeadClassifier("linear", tol=0.1).fit(train),
    "path": lambda train: ch.regularization_path(train, head="linear", beta_ratios=[0.5], tol=0.1),
    "beta_max": lambda train: ch.beta_max(train, head="linear"),
    "audit": lambda train: ch.certify((None, np.zeros((13, 10))), train, beta=0.1, head="linear"),
    "read": lambda train: train.read(),
}


@pytest.fixture
def old(store: Path) -> Path:
    """A store whose files were not written just now."""
    time.sleep(1.5 * verified.YOUNG[0])
    return store


@pytest.mark.parametrize("damage", [exchange, flip_quietly, flip_label])
@pytest.mark.parametrize("use", USES)
def test_no_changed_shard_is_used(old: Path, use: str, damage: Callable[[Path], None]) -> None:
    TokenStore.open(old)["train"].read()  # verified and noted
    damage(old)
    with pytest.raises(FileFormatError, match=r"train-0000\d\.safetensors' has changed|none of its 10 classes"):
        USES[use](TokenStore.open(old)["train"])


def test_scores_and_predictions_are_of_whole_shards(old: Path) -> None:
    head = USES["fit"](TokenStore.open(old)["train"])
    flip_quietly(old)
    for use in (head.predict, head.score):
        with pytest.raises(FileFormatError, match=r"train-00004\.safetensors' has changed"):
            use(TokenStore.open(old)["train"])


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are read in full from now on."""
    names: list[str] = []
    content = ShardFile._content

    def count(self: ShardFile) -> str:
        names.append(self.path.name)
        return content(self)

    monkeypatch.setattr(ShardFile, "_content", count)
    return names


def test_a_shard_is_verified_once(old: Path, hashed: list[str]) -> None:
    train = TokenStore.open(old)["train"]
    train[150:250]
    assert hashed == ["train-00001.safetensors", "train-00002.safetensors"], "only shards that are used"
    train.read()
    train.read()
    assert sorted(hashed) == [f"train-{k:05d}.safetensors" for k in range(13)]
    hashed.clear()
    TokenStore.open(old)["train"].read()
    verified._read.clear()  # as in another process
    TokenStore.open(old)["train"].read()
    assert hashed == []
    os.utime(old / "train-00007.safetensors")
    train.read()
    assert hashed == ["train-00007.safetensors"]
    TokenStore.open(old).verify()
    assert len(hashed) == 1 + 13 + 6, "verify reads everything whatever was noted"


def test_a_shard_that_changes_while_it_is_open_is_found(old: Path) -> None:
    train = TokenStore.open(old)["train"]
    train.read()
    flip_quietly(old)
    with pytest.raises(FileFormatError, match=r"train-00004\.safetensors' has changed"):
        train.read()
    assert train[:100].shape[0] == 100


@pytest.mark.parametrize("cache", ["a file", "garbled", "another hash"])
def test_notes_that_cannot_be_kept_or_believed(
    cache: str, old: Path, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    if cache == "a file":
        home.write_text("")
    else:
        TokenStore.open(old)["train"].read()
        (notes,) = home.rglob("*.jsonl")
        lines = notes.read_text()
        notes.write_text(
            "x" * 9 + lines.replace("[", "{") if cache == "garbled" else re.sub(r"[0-9a-f]{64}", "0" * 64, lines)
        )
        verified._read.clear()
        hashed.clear()
    for _ in range(2):
        assert TokenStore.open(old)["train"].read().shape[0] == 1257
    assert len(hashed) == (26 if cache == "a file" else 13)


@pytest.mark.parametrize(("age", "reads"), [(0.01, 2), (10.0, 1)])
def test_a_file_written_just_now_is_not_noted(
    age: float, reads: int, store: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store / "train-00000.safetensors"
    monkeypatch.setattr(verified.time, "time_ns", lambda: path.stat().st_ctime_ns + int(1e9 * age))
    for _ in range(2):
        TokenStore.open(store)["train"][:1]
    assert hashed == [path.name] * reads


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
