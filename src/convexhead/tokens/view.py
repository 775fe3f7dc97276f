"""One split of a token store: an array on disk behind memory-mapped shards."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens.manifest import Manifest
from convexhead.tokens.reduce import Reduction

FloatArray = NDArray[np.float32]

READ_ROWS = 256
"""Images that are read and reduced at a time where the caller does not say how many."""


class SplitView:
    """The tokens of one split, an array ``(n, s, d)`` float32 that lives on disk.

    Slices, index arrays and boolean masks read only the rows they name; the store's `Reduction` is applied on
    the way. ``np.asarray(view)`` reads everything.

    Attributes:
        grid: ``(h, w)`` with ``h * w = s``.
        class_names: what the labels mean.
    """

    ndim = 3
    dtype = np.dtype(np.float32)

    def __init__(self, folder: Path, manifest: Manifest, split: str, reduction: Reduction | None) -> None:
        self.split = split
        self.grid = manifest.grid
        self.class_names = list(manifest.class_names)
        self._folder = folder
        self._manifest = manifest
        self._split = manifest.splits[split]
        self._reduction = reduction
        self._stops = [shard.rows[1] for shard in self._split.shards]

    def __repr__(self) -> str:
        return f"SplitView({str(self._folder)!r}, {self.split!r}, shape={self.shape})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(n, s, d)`` after reduction."""
        s, d = self._manifest.shape
        return len(self), s, self._reduction.channels if self._reduction else d

    def __len__(self) -> int:
        return self._split.count

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """int64 ``(n,)``, indices into ``class_names``."""
        parts = [np.array(arrays["labels"]) for arrays in self._shards]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    @cached_property
    def files(self) -> list[str]:
        """One name an image."""
        try:
            names = json.loads((self._folder / self._split.files).read_bytes())
        except (OSError, ValueError) as error:
            raise FileFormatError(
                f"{str(self._folder / self._split.files)!r} is not readable: {error}"
            ) from error
        return cast(list[str], names)

    def __getitem__(self, rows: Any) -> FloatArray:
        """Return reduced tokens: ``(k, s, d)`` of a slice, mask or index array, ``(s, d)`` of an integer."""
        return self._reduce(self._gather("tokens", rows))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError(
                "a token store is reduced while it is read: it cannot be an array without a copy"
            )
        return self.read() if dtype is None else self.read().astype(dtype, copy=False)

    def read(self) -> FloatArray:
        """Read the whole split."""
        out = np.empty(self.shape, np.float32)
        for start in range(0, len(self), READ_ROWS):
            out[start : start + READ_ROWS] = self[start : start + READ_ROWS]
        return out

    def chunks(self, size: int = READ_ROWS) -> Iterator[FloatArray]:
        """Yield reduced tokens of ``size`` images after another, the last chunk possibly smaller."""
        if size < 1:
            raise InputError(f"a chunk of {size} images is not possible")
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def raw(self, start: int, stop: int) -> NDArray[Any]:
        """Return the tokens of rows ``start .. stop`` as they are stored, before the reduction."""
        return self._gather("tokens", slice(start, stop))

    def prefix(self, start: int, stop: int) -> NDArray[Any]:
        """Return the class and register tokens ``(k, n_prefix, d)`` of rows ``start .. stop``, as stored."""
        if not self._manifest.n_prefix:
            raise InputError(f"the backbone {self._manifest.backbone!r} has no class or register tokens")
        return self._gather("prefix", slice(start, stop))

    def _reduce(self, tokens: NDArray[Any]) -> FloatArray:
        return self._reduction.apply(tokens) if self._reduction else tokens.astype(np.float32)

    def _gather(self, name: str, rows: Any) -> NDArray[Any]:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return self._gather_range(name, start, max(start, stop))
            rows = np.arange(start, stop, step)
        index = np.asarray(rows)
        if index.dtype == bool:
            if index.shape != (len(self),):
                raise IndexError(f"a mask of shape {index.shape} does not fit {len(self)} images")
            index = np.flatnonzero(index)
        if index.size == 0:
            index = index.astype(np.int64)
        if index.dtype.kind not in "iu" or index.ndim > 1:
            raise IndexError(
                "a split is indexed by an integer, a slice, a mask or a one-dimensional index array"
            )
        if index.size and not -len(self) <= index.min() <= index.max() < len(self):
            raise IndexError(f"row {index.max()} or {index.min()} is out of the {len(self)} images")
        out = self._gather_rows(name, np.where(index < 0, index + len(self), index).reshape(-1))
        return out if index.ndim else cast(NDArray[Any], out[0])

    def _gather_range(self, name: str, start: int, stop: int) -> NDArray[Any]:
        first = bisect.bisect_right(self._stops, start)
        parts = []
        for shard, arrays in zip(self._split.shards[first:], self._shards[first:], strict=True):
            if shard.rows[0] >= stop:
                break
            parts.append(arrays[name][max(start - shard.rows[0], 0) : stop - shard.rows[0]])
        return np.concatenate(parts) if parts else self._empty(name, 0)

    def _gather_rows(self, name: str, index: NDArray[Any]) -> NDArray[Any]:
        out = self._empty(name, len(index))
        owner = np.searchsorted(self._stops, index, side="right")
        for k in np.unique(owner):
            here = np.flatnonzero(owner == k)
            out[here] = self._shards[k][name][index[here] - self._split.shards[k].rows[0]]
        return out

    def _empty(self, name: str, n: int) -> NDArray[Any]:
        s, d = self._manifest.shape
        return np.empty(
            (n, s if name == "tokens" else self._manifest.n_prefix, d), self._manifest.config["dtype"]
        )

    @cached_property
    def _shards(self) -> list[dict[str, NDArray[Any]]]:
        return [map_safetensors(self._folder / shard.file) for shard in self._split.shards]

    def __getstate__(self) -> dict[str, Any]:
        """Leave memory maps out: another process maps the files itself."""
        return {key: value for key, value in self.__dict__.items() if key != "_shards"}


def map_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """Map the tensors of a safetensors file into memory as read-only arrays.

    The library itself copies what it reads; a map gathers rows from many places without reading the rest.

    Raises:
        FileFormatError: the file is missing or its header makes no sense.
    """
    types = {"F16": np.float16, "F32": np.float32, "I64": np.int64}
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        arrays: dict[str, NDArray[Any]] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                dtype, shape = types[entry["dtype"]], tuple(entry["shape"])
                offset = 8 + length + entry["data_offsets"][0]
                # Nothing can be mapped where there is nothing.
                arrays[name] = (
                    np.asarray(np.memmap(path, dtype, "r", offset, shape))
                    if 0 not in shape
                    else np.empty(shape, dtype)
                )
        return arrays
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise FileFormatError(f"{str(path)!r} is not a shard of tokens: {error}") from error
