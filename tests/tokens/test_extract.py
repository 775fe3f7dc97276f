"""Extraction: what is stored, resuming after a kill, refusing to mix runs, and failing disks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens import (
    BrokenImageError,
    Progress,
    StoreWriteError,
    extract,
    open_backbone,
    open_source,
)
from convexhead.tokens.backbones.base import Backbone, TokenBatch
from convexhead.tokens.store.manifest import Manifest

LITE0 = "packaged:efficientnet-lite0"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_stored_tokens_are_the_backbones(photos: Path, tmp_path: Path, dtype: Any) -> None:
    store = extract(photos, LITE0, tmp_path / "out", layer=4, image_size=64, dtype=dtype, standardize=False)
    source, backbone = open_source(photos), open_backbone(LITE0, layer=4, image_size=64)
    with torch.no_grad():
        images = [backbone.prepare(source.load("test", i)) for i in range(6)]
        expected = backbone(torch.stack(images)).tokens.numpy()
    error = np.abs(store["test"].read() - expected).max() / np.abs(expected).max()
    assert error <= (1e-3 if dtype == "float16" else 1e-5)
    assert store["test"].grid == (4, 4)
    assert store["test"].files == source.files("test")
    np.testing.assert_array_equal(store["test"].labels, source.labels("test"))


@pytest.mark.slow
def test_prefix_tokens_are_kept(photos: Path, tmp_path: Path, weights: Path) -> None:
    spec = f"timm:vit_small_patch14_dinov2@{weights / 'dinov2_vits14_imgfocus_fp16.safetensors'}"
    store = extract(photos, spec, tmp_path / "out", image_size=28, channels=96, shard_size=4)
    assert store["test"].shape == (6, 4, 96)
    assert store["test"].prefix(3, 6).shape == (3, 1, 96)
    backbone = open_backbone(spec, image_size=28)
    image = backbone.prepare(open_source(photos).load("test", 5))
    with torch.no_grad():
        batch = backbone(image[None])
    expected = torch.nn.functional.adaptive_avg_pool1d(batch.prefix, 96).numpy()
    np.testing.assert_allclose(store["test"].prefix(5, 6), expected, rtol=2e-3, atol=2e-3)


def test_data_free_reductions_are_applied_before_writing(photos: Path, tmp_path: Path) -> None:
    plain = extract(photos, "patches:3", tmp_path / "a", standardize=False, dtype="float32")
    small = extract(photos, "patches:3", tmp_path / "b", standardize=False, dtype="float32", channels=9, token_pool=2)
    assert small["train"].raw(0, 3).shape == (3, 4, 9)
    assert small.grid == (2, 2)
    x = torch.from_numpy(plain["train"].read())
    x = x.reshape(22, 2, 2, 2, 2, 27).mean((2, 4)).reshape(22, 4, 27)
    expected = torch.nn.functional.adaptive_avg_pool1d(x, 9).numpy()
    np.testing.assert_allclose(small["train"].read(), expected, atol=1e-6)


class CountingPatches(Backbone):
    """Each image as 2 x 2 tokens of its own pixels, counting the forward passes."""

    spec, layer, weights_hash, preprocessing, passes = "counting", None, "", {}, 0

    def prepare(self, image: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(image.resize((4, 4)))).permute(2, 0, 1)

    def forward(self, images: torch.Tensor) -> TokenBatch:
        type(self).passes += 1
        tokens = images.float().reshape(len(images), 12, 4).transpose(1, 2)
        return TokenBatch(tokens, tokens.new_zeros(len(images), 0, 12), (2, 2))


def test_refitting_does_not_run_the_backbone(photos: Path, tmp_path: Path) -> None:
    backbone, out = CountingPatches(), tmp_path / "out"
    store = extract(photos, backbone, out)
    passes = CountingPatches.passes
    assert passes > 0
    train = store["train"].raw(0, 22).reshape(-1, 12).astype(float)

    store = extract(photos, backbone, out, reduce="pca", channels=3, constant=True)
    assert store["train"].shape == (22, 4, 4)
    scaler = StandardScaler().fit(train)
    pca = PCA(3).fit(scaler.transform(train))
    expected = pca.transform(scaler.transform(store["test"].raw(0, 6).reshape(-1, 12).astype(float)))
    got = store["test"].read()[..., :3].reshape(-1, 3)
    np.testing.assert_allclose(np.abs(got), np.abs(expected), atol=1e-4)

    before = (out / "reduction.safetensors").stat().st_mtime_ns
    extract(photos, backbone, out, reduce="pca", channels=3, constant=True)
    assert (out / "reduction.safetensors").stat().st_mtime_ns == before
    assert CountingPatches.passes == passes


def test_other_runs_are_refused(photos: Path, tmp_path: Path, write_images: Any) -> None:
    out = tmp_path / "out"
    extract(photos, "patches:3", out)
    before = contents(out)
    for options, message in [
        ({"channels": 5}, "channels was None, now 5"),
        ({"image_size": 24}, "preprocessing was"),
        ({"dtype": "float32"}, "dtype was 'float16', now 'float32'"),
        ({"token_pool": (2, 1)}, "token_pool"),
    ]:
        with pytest.raises(FileFormatError, match=message):
            extract(photos, "patches:3", out, **options)
    with pytest.raises(FileFormatError, match="backbone was 'patches:3', now 'patches:6'"):
        extract(photos, "patches:6", out)
    write_images(photos / "train", {"emu": 1})
    with pytest.raises(FileFormatError, match=r"source was .*choose another folder"):
        extract(photos, "patches:3", out)
    assert contents(out) == before


def test_foreign_targets_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no tokens: choose a new"):
        extract(photos, "patches:3", photos)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileFormatError, match="is a file"):
        extract(photos, "patches:3", tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "PCA"}, "unknown reduction 'PCA'"),
        ({"reduce": "pca"}, "needs channels"),
        ({"reduce": "pca", "channels": 99}, "at most the tokens' 27"),
        ({"channels": 99}, "between 1 and the 27"),
        ({"channels": 0}, "channels=0"),
        ({"token_pool": 5}, "token_pool"),
        ({"dtype": "float61"}, "did you mean 'float16'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
        ({"layer": 2}, "no inner layers"),
    ],
)
def test_bad_arguments(photos: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        extract(photos, "patches:3", tmp_path / "out", **options)


def test_broken_images(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("train/cat/img1.png", "train/dog/img4.png"):
        (photos / name).write_bytes(b"\x89PNG but not really")
    with pytest.raises(BrokenImageError, match=r"cat/img1\.png"):
        extract(photos, "patches:3", out, shard_size=8, batch_size=4)
    store = extract(photos, "patches:3", out, shard_size=8, batch_size=4, skip_broken=True)
    train = store["train"]
    assert len(train) == len(train.files) == len(train.labels) == 20
    assert np.bincount(train.labels).tolist() == [10, 10]
    assert train.broken == ["train/cat/img1.png", "train/dog/img4.png"]
    source = open_source(photos)
    last = np.asarray(source.load("train", 21), dtype=np.float32)[-3:, -3:].reshape(-1) / 255
    np.testing.assert_allclose(train.raw(19, 20)[0, -1], last, atol=1e-3)
    for path in (photos / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="no train image"):
        extract(photos, "patches:3", tmp_path / "none", skip_broken=True)


def test_images_of_unequal_size(photos: Path, tmp_path: Path, write_images: Any) -> None:
    write_images(photos / "train", {"emu": 1}, size=(15, 12))
    with pytest.raises(InputError, match="give image_size"):
        extract(photos, "patches:3", tmp_path / "out")
    assert extract(photos, "patches:3", tmp_path / "fine", image_size=12)["train"].shape == (23, 16, 27)


def test_overflow_of_half_precision(photos: Path, tmp_path: Path) -> None:
    class Loud(CountingPatches):
        def forward(self, images: torch.Tensor) -> TokenBatch:
            tokens, prefix, grid = super().forward(images)
            return TokenBatch(tokens * 1e4, prefix, grid)

    with pytest.raises(InputError, match="too large for float16: use dtype='float32'"):
        extract(photos, Loud(), tmp_path / "out")


def test_target_that_cannot_be_made(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreWriteError, match="cannot make the folder"):
        extract(photos, "patches:3", tmp_path / "file" / "out")


def test_progress(photos: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    extract(photos, "patches:3", tmp_path / "out", shard_size=8, batch_size=4, progress=seen.append)
    assert [each.done for each in seen] == [4, 8, 12, 16, 20, 22, 26, 28]
    assert {each.total for each in seen} == {28}
    assert [each.split for each in seen].count("test") == 2
    assert all(each.images_per_second > 0 for each in seen)
    assert seen[0].seconds_left > 0
    assert seen[-1].seconds_left == 0


@pytest.mark.slow
def test_bfloat16(photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layer": 4, "image_size": 64, "standardize": False}
    exact = extract(photos, LITE0, tmp_path / "exact", dtype="float32", **options)["train"]
    store = extract(photos, LITE0, tmp_path / "out", dtype="bfloat16", **options)
    expected = torch.from_numpy(exact.read()).bfloat16().float().numpy()
    np.testing.assert_array_equal(store["train"].read(), expected)
    np.testing.assert_array_equal(store["train"][[3, 1]], expected[[3, 1]])
    assert store["train"].raw(0, 2).dtype == np.float32
    store.verify()
    assert sum(path.stat().st_size for path in store.path.glob("train*")) < 0.6 * exact.read().nbytes


PEAKS = """
import os, resource, sys
from convexhead.tokens import TokenStore, extract
import convexhead.tokens.sources.image_arrays, sklearn.datasets

def write(n):
    extract(f"npz:{sys.argv[1]}/{n}.npz", "patches:4", f"{sys.argv[1]}/{n}", image_size=32, shard_size=64)

def read(n):
    for chunk in TokenStore.open(f"{sys.argv[1]}/{n}")["train"].chunks(64):
        chunk.sum()

for work in (write, read):
    for n in (512, 8192):
        if os.fork() == 0:  # a child has a peak of its own
            work(n)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
            os._exit(0)
        assert os.wait()[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_memory_does_not_grow_with_images(tmp_path: Path) -> None:
    """16 times the images (50 MB of tokens against 3 MB) take no more memory to write or to read."""
    rng = np.random.default_rng(0)
    for n in (512, 8192):
        images = rng.integers(0, 256, (n, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"{n}.npz", images=images, labels=np.arange(n) % 2)
    done = subprocess.run([sys.executable, "-c", PEAKS, str(tmp_path)], check=True, capture_output=True, text=True)
    write_few, write_many, read_few, read_many = map(int, done.stdout.split())
    assert write_many - write_few < 10_000, done.stdout  # kilobytes
    assert read_many - read_few < 10_000, done.stdout


@pytest.mark.parametrize("complete", [True, False])
def test_old_store_of_another_layout_is_refused(photos: Path, tmp_path: Path, complete: bool) -> None:
    """Earlier versions took the class token of some backbones for a patch; their stores have no count of images."""
    out = tmp_path / "out"
    extract(photos, "patches:4", out)
    manifest = Manifest.load(out)
    manifest.found, manifest.complete = {}, complete
    manifest.save(out)
    assert extract(photos, "patches:4", out).grid == (3, 3)
    manifest.grid = (9, 1)
    manifest.complete = complete
    manifest.found = {}
    manifest.save(out)
    with pytest.raises(FileFormatError, match=r"on the grid \(9, 1\) with 0 prefix tokens.*another folder"):
        extract(photos, "patches:4", out)
