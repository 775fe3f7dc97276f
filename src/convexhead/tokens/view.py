"""One split of a token store: an array on disk behind memory-mapped shards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import InputError
from convexhead.tokens.gather import ShardedRows
from convexhead.tokens.manifest import Manifest, digest_json
from convexhead.tokens.reduce import Reduction

FloatArray = NDArray[np.float32]

READ_NUMBERS = 1_000_000
"""Numbers of stored tokens that are read at a time where the caller does not say how many images."""


class SplitView:
    """The tokens of one split, an array ``(n, s, d)`` float32 that lives on disk.

    Slices, index arrays and boolean masks read only the rows they name; the store's `Reduction` is applied on
    the way. ``np.asarray(view)`` reads everything.

    Attributes:
        grid: ``(h, w)`` with ``h * w = s``.
        class_names: what the labels mean.
        reduction: what is applied on the way, or None.
        broken: names of the images that could not be read and were left out.
    """

    ndim = 3
    dtype = np.dtype(np.float32)

    def __init__(self, folder: Path, manifest: Manifest, split: str, reduction: Reduction | None) -> None:
        self.split = split
        self.grid = manifest.grid
        self.class_names = list(manifest.class_names)
        self.broken = manifest.splits[split].broken
        self._folder = folder
        self._manifest = manifest
        self.reduction = reduction
        self._rows = ShardedRows(folder, manifest.splits[split].shards)
        self._with_class_token = False

    def __repr__(self) -> str:
        return f"SplitView({str(self._folder)!r}, {self.split!r}, shape={self.shape})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(n, s, d)`` after reduction."""
        s, d = self._manifest.shape
        return len(self), s + self._with_class_token, self.reduction.channels if self.reduction else d

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def identity(self) -> str:
        """A text that two views share only if they hold the same tokens."""
        shards = [shard.sha256 for shard in self._manifest.splits[self.split].shards]
        reduction = self._manifest.reduction_sha256 if self.reduction else ""
        return digest_json({"shards": shards, "reduction": reduction, "class_token": self._with_class_token})

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """int64 ``(n,)``, indices into ``class_names``."""
        return self._rows.take("labels", slice(None))

    @property
    def files(self) -> list[str]:
        """One name an image."""
        return [name for layout in self._rows.layouts for name in layout.files]

    def with_class_token(self) -> SplitView:
        """Return a view whose token 0 is the class token, ``(n, 1 + s, d)``, which ``pool="cls"`` reads.

        It is reduced as the other tokens are (with what was fitted on those). The tokens then lie on no grid
        any more: ``grid`` is ``(1 + s, 1)``.

        Raises:
            InputError: the backbone has no class token.
        """
        self._check_prefix()
        view = copy.copy(self)
        view._with_class_token = True
        view.grid = (1 + self._manifest.shape[0], 1)
        return view

    def unreduced(self) -> SplitView:
        """Return a view of the tokens as they are stored, as float32."""
        view = copy.copy(self)
        view.reduction = None
        return view

    def class_tokens(self, rows: Any) -> FloatArray:
        """Return the class tokens ``(k, d)`` of ``rows``, not reduced.

        Raises:
            InputError: the backbone has no class token.
        """
        self._check_prefix()
        return self._rows.take("prefix", rows)[..., 0, :].astype(np.float32, copy=False)

    def __getitem__(self, rows: Any) -> FloatArray:
        """Return reduced tokens: ``(k, s, d)`` of a slice, mask or index array, ``(s, d)`` of an integer."""
        tokens = self._rows.take("tokens", rows)
        if self._with_class_token:
            first = self._rows.take("prefix", rows)[..., :1, :]
            tokens = np.concatenate([first, tokens], axis=-2)
        return self.reduction.apply(tokens) if self.reduction else tokens.astype(np.float32, copy=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a token store is reduced while it is read: it cannot be an array without a copy")
        return self.read() if dtype is None else self.read().astype(dtype, copy=False)

    def read(self) -> FloatArray:
        """Read the whole split."""
        out = np.empty(self.shape, np.float32)
        start = 0
        for chunk in self.chunks():
            out[start : start + len(chunk)] = chunk
            start += len(chunk)
        return out

    def chunks(self, size: int | None = None) -> Iterator[FloatArray]:
        """Yield reduced tokens of ``size`` images after another, the last chunk possibly smaller."""
        return (self[start:stop] for start, stop in self._ranges(size))

    def raw_chunks(self, size: int | None = None) -> Iterator[NDArray[Any]]:
        """Yield what `raw` returns, ``size`` images after another."""
        return (self.raw(start, stop) for start, stop in self._ranges(size))

    def raw(self, start: int, stop: int) -> NDArray[Any]:
        """Return the tokens of rows ``start .. stop`` as stored (bfloat16 as float32), not reduced."""
        return self._rows.take("tokens", slice(start, stop))

    @property
    def n_prefix(self) -> int:
        """Number of class and register tokens an image."""
        return self._manifest.n_prefix

    def prefix_chunks(self, size: int | None = None) -> Iterator[NDArray[Any]]:
        """Yield what `prefix` returns, ``size`` images after another."""
        return (self.prefix(start, stop) for start, stop in self._ranges(size))

    def prefix(self, start: int, stop: int) -> NDArray[Any]:
        """Return class and register tokens ``(k, n_prefix, d)`` of rows ``start .. stop``, not reduced."""
        self._check_prefix()
        return self._rows.take("prefix", slice(start, stop))

    def _ranges(self, size: int | None) -> Iterator[tuple[int, int]]:
        size = max(1, READ_NUMBERS // int(np.prod(self.shape[1:]))) if size is None else size
        if size < 1:
            raise InputError(f"a chunk of {size} images is not possible")
        return ((start, min(start + size, len(self))) for start in range(0, len(self), size))

    def _check_prefix(self) -> None:
        if not self.n_prefix:
            raise InputError(f"the backbone {self._manifest.backbone!r} has no class or register tokens")
