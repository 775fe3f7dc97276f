"""A token store: a folder of shards, read by memory map."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import FileFormatError, InputError, choose
from convexhead.tokens.manifest import Manifest, Shard
from convexhead.tokens.reduce import Reduction
from convexhead.tokens.view import READ_ROWS, FloatArray, SplitView


class TokenStore:
    """A complete folder of tokens on disk.

    ``store["train"]`` is a `SplitView`. A store with a single split also answers as that split does
    (``shape``, ``labels``, slices, ...); of several splits one must be named.
    """

    ndim = 3
    dtype = np.dtype(np.float32)

    def __init__(self, folder: Path, manifest: Manifest, reduction: Reduction) -> None:
        self.path = folder
        self.manifest = manifest
        self.reduction = reduction
        self.splits = tuple(manifest.splits)
        self.class_names = list(manifest.class_names)
        self.grid = manifest.grid
        self._views = {split: SplitView(folder, manifest, split, reduction) for split in self.splits}

    @overload
    @classmethod
    def open(cls, path: str | Path, split: None = None) -> TokenStore: ...
    @overload
    @classmethod
    def open(cls, path: str | Path, split: str) -> SplitView: ...
    @classmethod
    def open(cls, path: str | Path, split: str | None = None) -> TokenStore | SplitView:
        """Open a store, or one split of it. Nothing but the manifest and the reduction is read.

        Raises:
            FileFormatError: not a token store, not finished, of a newer format, or with missing or truncated
                files.
            InputError: no such split.
        """
        folder = Path(path).expanduser()
        manifest = Manifest.load(folder)
        if not manifest.complete:
            raise FileFormatError(
                f"the token store {str(path)!r} is not finished: run the same extract again to resume"
            )
        for each in manifest.splits.values():
            for shard in each.shards:
                if problem := shard_problem(folder, shard):
                    raise FileFormatError(f"{problem}: run the same extract again to restore it")
        store = cls(folder, manifest, Reduction.load(folder / manifest.reduction))
        return store if split is None else store[choose("split", split, store.splits)]

    def verify(self) -> None:
        """Read every shard and compare it with its checksum.

        Raises:
            FileFormatError: names the first shard that differs.
        """
        for split in self.manifest.splits.values():
            for shard in split.shards:
                if sha256(self.path / shard.file) != shard.sha256:
                    raise FileFormatError(
                        f"{str(self.path / shard.file)!r} has changed since it was written: delete it and "
                        "run the same extract again to restore it"
                    )

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}: {view.shape}" for name, view in self._views.items())
        return f"TokenStore({str(self.path)!r}, {counts})"

    @overload
    def __getitem__(self, key: str) -> SplitView: ...
    @overload
    def __getitem__(self, key: int | slice | Sequence[int] | NDArray[Any]) -> FloatArray: ...
    def __getitem__(self, key: Any) -> SplitView | FloatArray:
        if isinstance(key, str):
            return self._views[choose("split", key, self.splits)]
        return self._only[key]

    def __len__(self) -> int:
        return len(self._only)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self._only.__array__(dtype, copy)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._only.shape

    @property
    def labels(self) -> NDArray[np.int64]:
        return self._only.labels

    @property
    def files(self) -> list[str]:
        return self._only.files

    def read(self) -> FloatArray:
        return self._only.read()

    def chunks(self, size: int = READ_ROWS) -> Iterator[FloatArray]:
        return self._only.chunks(size)

    def raw(self, start: int, stop: int) -> NDArray[Any]:
        return self._only.raw(start, stop)

    @property
    def _only(self) -> SplitView:
        if len(self.splits) > 1:
            raise InputError(
                f"the token store {str(self.path)!r} has the splits {', '.join(self.splits)}: "
                f"choose one, for example store[{self.splits[0]!r}]"
            )
        return self._views[self.splits[0]]


def sha256(path: Path) -> str:
    """Hash a file; a missing one hashes to nothing."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def shard_problem(folder: Path, shard: Shard) -> str | None:
    """Say what is wrong with a shard as far as its size tells, or return None."""
    path = folder / shard.file
    if not path.is_file():
        return f"the shard {str(path)!r} is missing"
    if (size := path.stat().st_size) != shard.bytes:
        return f"the shard {str(path)!r} has {size} bytes instead of {shard.bytes}"
    return None
