"""Rows of a split, gathered out of its shards."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import FileFormatError
from convexhead.tokens.store.shards import Shard, ShardFile, to_float


class ShardedRows:
    """The arrays of a split, row after row over its shards. Only rows that are asked for are read."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._folder = folder
        self._shards = shards
        self._stops = [shard.rows[1] for shard in shards]

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    @cached_property
    def layouts(self) -> list[ShardFile]:
        """The shards' layouts; the files are opened on first use."""
        layouts = [ShardFile(self._folder / shard.file) for shard in self._shards]
        for layout, shard in zip(layouts, self._shards, strict=True):
            if layout.sha256 != shard.sha256:
                raise FileFormatError(f"{str(layout.path)!r} is not the shard that the manifest lists")
        return layouts

    def take(self, name: str, rows: Any) -> NDArray[Any]:
        """Return rows of an array: a slice, index array or mask gives ``(k, ...)``, an integer ``(...)``.

        Raises
        ------
        IndexError
            Rows that are not there, or something that is no index.
        """
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return self._take_range(name, start, max(start, stop))
            rows = np.arange(start, stop, step)
        index = self._normalise(np.asarray(rows))
        out = self._take_index(name, index.reshape(-1))
        taken: NDArray[Any] = out if index.ndim else out[0]
        return taken

    def _normalise(self, index: NDArray[Any]) -> NDArray[Any]:
        """Turn masks and negative rows into rows ``0 .. n - 1``."""
        if index.dtype == bool:
            if index.shape != (len(self),):
                raise IndexError(f"a mask of shape {index.shape} does not fit {len(self)} images")
            index = np.flatnonzero(index)
        if index.size == 0:
            index = index.astype(np.int64)
        if index.dtype.kind not in "iu" or index.ndim > 1:
            raise IndexError("a split is indexed by an integer, a slice, a mask or a one-dimensional index array")
        if index.size and not -len(self) <= index.min() <= index.max() < len(self):
            raise IndexError(f"row {index.max()} or {index.min()} is out of the {len(self)} images")
        return np.where(index < 0, index + len(self), index)

    def _take_range(self, name: str, start: int, stop: int) -> NDArray[Any]:
        first = bisect.bisect_right(self._stops, start)
        parts = []
        for shard, layout in zip(self._shards[first:], self.layouts[first:], strict=True):
            if shard.rows[0] >= stop:
                break
            part = layout.map(name)[max(start - shard.rows[0], 0) : stop - shard.rows[0]]
            parts.append(to_float(np.array(part)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [self._nothing(name)])

    def _take_index(self, name: str, index: NDArray[Any]) -> NDArray[Any]:
        nothing = self._nothing(name)
        out = np.empty((len(index), *nothing.shape[1:]), nothing.dtype)
        owner = np.searchsorted(self._stops, index, side="right")
        for k in np.unique(owner):
            here = np.flatnonzero(owner == k)
            out[here] = to_float(self.layouts[k].map(name)[index[here] - self._shards[k].rows[0]])
        return out

    def _nothing(self, name: str) -> NDArray[Any]:
        """Return no rows of the right shape and type."""
        return to_float(np.array(self.layouts[0].map(name)[:0]))
