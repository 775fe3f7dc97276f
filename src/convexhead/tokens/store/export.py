"""Tokens for other programs: plain numpy files, HDF5 or Zarr, written chunk by chunk."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import FileFormatError, choose, require
from convexhead.tokens.store.files import StoreWriteError, make_folder
from convexhead.tokens.store.store import TokenStore
from convexhead.tokens.store.view import SplitView


class _Sink(Protocol):
    """A file or folder under way."""

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return a new array that slices can be assigned to."""

    def about(self, facts: dict[str, Any]) -> None:
        """Write the facts about the store."""


class _Npy:
    """A folder of ``.npy`` files, with the facts in ``store.json``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        file = self.path / f"{name.replace('/', '-')}.npy"
        return np.lib.format.open_memmap(file, "w+", dtype, shape)

    def about(self, facts: dict[str, Any]) -> None:
        (self.path / "store.json").write_text(json.dumps(facts, indent=1))


class _Grouped:
    """An HDF5 file or a Zarr folder: one group a split, the facts as JSON in the attribute ``store``."""

    def __init__(self, group: Any, create: Callable[..., Any]) -> None:
        self.group = group
        self._create = create

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        # Few images a chunk: rows can be read without many of their neighbours.
        chunks = (min(CHUNK_IMAGES, shape[0]), *shape[1:])
        return self._create(name, shape=shape, dtype=dtype, chunks=chunks)

    def about(self, facts: dict[str, Any]) -> None:
        self.group.attrs["store"] = json.dumps(facts)


FORMATS = ("npy", "h5", "zarr")
CHUNK_IMAGES = 16


def export_store(path: str | Path, out: str | Path, *, format: str = "npy", raw: bool = False) -> Path:
    """Write all splits of a store as arrays that other programs read, and return ``out``.

    Every split gives ``tokens (n, s, d)``, ``labels (n,)`` int64 (or ``targets``, of images with masks also
    ``weights``: see `SplitView`), ``files (n, w)`` uint8 (UTF-8, padded with zeros: ``files.view(f"S{w}")`` are the
    names) and, where there are any, ``prefix (n, n_prefix, d)`` and ``lengths (n,)``: files ``train-tokens.npy`` or
    arrays ``train/tokens``. What `TokenStore.info` says and the class names go along.

    Parameters
    ----------
    path
        The store.
    out
        A folder (npy, zarr) or a file (h5) that does not exist yet.
    format
        ``"npy"``, ``"h5"`` or ``"zarr"``.
    raw
        Write tokens as they are stored, not reduced to float32. Prefix tokens are always as stored.

    Raises
    ------
    InputError
        Unknown format.
    FileFormatError
        Not a store, or ``out`` exists.
    MissingExtraError
        h5py or zarr is not installed.
    StoreWriteError
        ``out`` cannot be written; nothing is left of it.
    """
    choose("export format", format, FORMATS)
    store = TokenStore.open(path)
    target = Path(out).expanduser()
    if target.exists():
        raise FileFormatError(f"{str(target)!r} exists: choose another name for the export")
    make_folder(target.parent)
    temporary = target.with_name(target.name + ".tmp")
    _remove(temporary)
    try:
        with _open(format, temporary) as sink:
            for name in store.splits:
                _write_split(sink, name, store[name], raw)
            sink.about({**store.info(), "class_names": store.class_names, "raw": raw})
        os.replace(temporary, target)
    except OSError as error:
        _remove(temporary)
        raise StoreWriteError(f"cannot write {str(target)!r}: {error.strerror or error}") from error
    return target


def _write_split(sink: _Sink, name: str, view: SplitView, raw: bool) -> None:
    _write(sink, f"{name}/tokens", len(view), view.raw_chunks() if raw else view.chunks())
    if view.n_prefix:
        _write(sink, f"{name}/prefix", len(view), view.prefix_chunks())
    _write(sink, f"{name}/{'labels' if view.task == 'classes' else 'targets'}", len(view), iter([view.known]))
    if view.lengths is not None:
        _write(sink, f"{name}/lengths", len(view), iter([view.lengths]))
    if view.has_masks:
        _write(sink, f"{name}/weights", len(view), iter([view.weights]))
    _write(sink, f"{name}/files", len(view), iter([_as_bytes(view.files)]))


def _write(sink: _Sink, name: str, n: int, chunks: Iterator[NDArray[Any]]) -> None:
    array, start = None, 0
    for chunk in chunks:
        if array is None:
            array = sink.array(name, (n, *chunk.shape[1:]), chunk.dtype)
        array[start : start + len(chunk)] = chunk
        start += len(chunk)


def _as_bytes(names: list[str]) -> NDArray[np.uint8]:
    encoded = np.char.encode(np.array(names), "utf-8")
    return encoded.view(np.uint8).reshape(len(names), -1)


@contextlib.contextmanager
def _open(format: str, path: Path) -> Iterator[_Sink]:
    if format == "npy":
        yield _Npy(path)
    elif format == "h5":
        with require("h5py", "stores").File(path, "w") as file:
            yield _Grouped(file, file.create_dataset)
    else:
        group = require("zarr", "stores").open_group(str(path), mode="w")
        yield _Grouped(group, group.create_array)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
