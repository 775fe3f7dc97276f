"""Stores for other programs, and several stores in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens import TokenStore, export_store, extract, merge_stores


@pytest.fixture
def store(photos: Path, tmp_path: Path) -> TokenStore:
    return extract(photos, "patches:4", tmp_path / "store", shard_size=5, dtype="bfloat16", constant=True)


def read(path: Path, format: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays of an export as ``split/name``, and the facts."""
    names = [f"{split}/{name}" for split in ("train", "test") for name in ("tokens", "labels", "files")]
    if format == "npy":
        arrays = {name: np.load(path / f"{name.replace('/', '-')}.npy") for name in names}
        return arrays, json.loads((path / "store.json").read_text())
    library = pytest.importorskip({"h5": "h5py", "zarr": "zarr"}[format])
    group = library.File(path, "r") if format == "h5" else library.open_group(str(path), mode="r")
    return {name: group[name][:] for name in names}, json.loads(group.attrs["store"])


@pytest.mark.slow
@pytest.mark.parametrize("format", ["npy", "h5", "zarr"])
@pytest.mark.parametrize("raw", [False, True])
def test_export(store: TokenStore, tmp_path: Path, format: str, raw: bool) -> None:
    pytest.importorskip({"npy": "numpy", "h5": "h5py", "zarr": "zarr"}[format])
    path = export_store(store.path, tmp_path / "deep" / "out", format=format, raw=raw)
    arrays, facts = read(path, format)
    for split in ("train", "test"):
        view = store[split]
        expected = view.raw(0, len(view)) if raw else view.read()
        np.testing.assert_array_equal(arrays[f"{split}/tokens"], expected)
        assert arrays[f"{split}/tokens"].dtype == np.float32
        np.testing.assert_array_equal(arrays[f"{split}/labels"], view.labels)
        names = arrays[f"{split}/files"]
        assert [bytes(name).rstrip(b"\0").decode() for name in names] == view.files
        assert names.view(f"S{names.shape[1]}")[0, 0].decode() == view.files[0]
    assert facts["class_names"] == ["cat", "dog"]
    assert facts["raw"] == raw
    with pytest.raises(FileFormatError, match="exists"):
        export_store(store.path, path, format=format)
    assert [each.name for each in path.parent.iterdir()] == ["out"]


def test_export_errors(store: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'npy'"):
        export_store(store.path, tmp_path / "out", format="npz")
    with pytest.raises(FileFormatError, match="does not exist"):
        export_store(tmp_path / "none", tmp_path / "out")


def test_merge_of_two_parts(photos: Path, tmp_path: Path, write_images: Any) -> None:
    more = tmp_path / "more"
    write_images(more / "train", {"cat": 4, "dog": 3}, seed=5)
    write_images(more / "val", {"cat": 1, "dog": 1}, seed=6)
    options: dict[str, Any] = {"reduce": "pca", "channels": 6, "constant": True}
    first = extract(photos, "patches:4", tmp_path / "first", shard_size=5, **options)
    second = extract(more, "patches:4", tmp_path / "second", shard_size=3, **options)
    merged = merge_stores([first.path, second.path], tmp_path / "merged")
    merged.verify()
    assert merged.splits == ("train", "val", "test")
    assert merged["train"].shape == (29, 9, 7)
    raw = np.concatenate([first["train"].raw(0, 22), second["train"].raw(0, 7)])
    np.testing.assert_array_equal(merged["train"].raw(0, 29), raw)
    assert merged["train"].files == first["train"].files + second["train"].files
    labels = np.concatenate([first["train"].labels, second["train"].labels])
    np.testing.assert_array_equal(merged["train"].labels, labels)
    np.testing.assert_array_equal(merged["val"].raw(0, 2), second["val"].raw(0, 2))
    # The reduction is fitted anew, on all of train.
    np.testing.assert_allclose(merged.reduction.mean, raw.astype(float).mean((0, 1)), rtol=1e-5)


def test_merge_errors(photos: Path, tmp_path: Path, write_images: Any) -> None:
    first = extract(photos, "patches:4", tmp_path / "first")
    again = extract(photos, "patches:4", tmp_path / "again", shard_size=3)
    with pytest.raises(InputError, match="at least two"):
        merge_stores([first.path], tmp_path / "out")
    with pytest.raises(InputError, match="the same images"):
        merge_stores([first.path, again.path], tmp_path / "out")
    write_images(tmp_path / "other", {"cat": 2, "emu": 2})
    other = extract(tmp_path / "other", "patches:4", tmp_path / "third", dtype="float32")
    with pytest.raises(InputError, match="differ in dtype, classes"):
        merge_stores([first.path, other.path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_images(tmp_path / "more", {"cat": 2, "dog": 2}, seed=7)
    more = extract(tmp_path / "more", "patches:4", tmp_path / "fourth")
    with pytest.raises(FileFormatError, match="not an empty folder"):
        merge_stores([first.path, more.path], photos)
