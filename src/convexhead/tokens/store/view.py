"""One split of a token store: an array on disk behind memory-mapped shards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import InputError
from convexhead.tokens.reduce import Reduction, as_read, check_pool
from convexhead.tokens.store.gather import ShardedRows
from convexhead.tokens.store.known import KnownOfImages
from convexhead.tokens.store.manifest import Manifest, digest_json
from convexhead.tokens.store.origin import TokenOrigin

FloatArray = NDArray[np.float32]

READ_NUMBERS = 1_000_000
"""Numbers of tokens in a chunk where the caller does not say how many images."""
REDUCED_NUMBERS = 8_000_000
"""Numbers of stored tokens that are pooled and reduced at a time, 32 MB in float32. However many rows are asked for, no
more of them are in memory beside the result."""


class SplitView(KnownOfImages):
    """The tokens of one split, an array ``(n, s, d)`` float32 that lives on disk.

    Slices, index arrays and boolean masks read only the rows they name; the store's `Reduction` is applied on
    the way. ``np.asarray(view)`` reads everything.

    Attributes
    ----------
    class_names
        What the labels mean.
    token_pool
        The grid that stored tokens are averaged down to on the way, or None.
    reduction
        What is applied on the way, after that, or None.
    broken
        Names of the images that could not be read and were left out.
    rows
        The images of the split that this view shows, or None for all.
    """

    ndim = 3
    dtype = np.dtype(np.float32)

    def __init__(self, folder: Path, manifest: Manifest, split: str, reduction: Reduction | None) -> None:
        self.split = split
        self.class_names = list(manifest.class_names)
        self.broken = manifest.splits[split].broken
        self._folder = folder
        self._manifest = manifest
        self.token_pool: tuple[int, int] | None = None
        self.reduction = reduction
        self._rows = ShardedRows(folder, manifest.splits[split].shards)
        self._with_class_token = False
        self.rows: NDArray[np.int64] | None = None
        self._numbers: NDArray[np.int64] | None = None

    def __repr__(self) -> str:
        return f"SplitView({str(self._folder)!r}, {self.split!r}, shape={self.shape})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(n, s, d)`` after pooling and reduction."""
        (h, w), d = self.grid, self._manifest.shape[1]
        return len(self), h * w, self.reduction.channels if self.reduction else d

    @property
    def grid(self) -> tuple[int, int]:
        """``(h, w)`` with ``h * w = s``; with a class token ``(s, 1)``, since they then lie on none."""
        h, w = self.token_pool or self._manifest.grid
        return (1 + h * w, 1) if self._with_class_token else (h, w)

    @cached_property
    def lengths(self) -> NDArray[np.int64] | None:
        """int64 ``(n,)``: how many tokens each image has, the others being padding; None where all have the same."""
        return self._lengths(slice(None)) if self._ragged else None

    def _lengths(self, rows: Any) -> NDArray[np.int64]:
        lengths: NDArray[np.int64] = self._take("lengths", rows) + self._with_class_token
        return lengths

    @cached_property
    def grids(self) -> NDArray[np.int64]:
        """int64 ``(n, 2)``: ``(h, w)`` of the grid that the tokens of each image lie on.

        Raises
        ------
        InputError
            They lie on none.
        """
        if self._with_class_token or (self._ragged and not self._manifest.config.get("grids", False)):
            raise InputError(f"the tokens of {str(self._folder)!r} lie on no grid: extract them from images")
        return self._take("grids", slice(None)) if self._ragged else np.tile(self.grid, (len(self), 1))

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Bool ``(n, s)``: which tokens there are."""
        n, s, _ = self.shape
        return np.ones((n, s), bool) if self.lengths is None else np.arange(s) < self.lengths[:, None]

    @property
    def _ragged(self) -> bool:
        return bool(self._manifest.config.get("lengths", False))

    def __len__(self) -> int:
        return len(self._rows if self.rows is None else self.rows)

    @property
    def identity(self) -> str:
        """A text that two views share only if they hold the same tokens and labels."""
        numbers = None if self._numbers is None else self._numbers.tolist()
        return digest_json({"tokens": self.tokens_identity, "numbers": numbers})

    @property
    def tokens_identity(self) -> str:
        """A text that two views share only if they hold the same tokens, however their classes are numbered."""
        facts: dict[str, Any] = {
            "shards": [shard.sha256 for shard in self._manifest.splits[self.split].shards],
            "reduction": self.reduction.identity if self.reduction else "",
            "class_token": self._with_class_token,
        }
        if self.token_pool is not None:
            facts["token_pool"] = list(self.token_pool)
        if self.rows is not None:
            facts["rows"] = self.rows.tolist()
        return digest_json(facts)

    @property
    def files(self) -> list[str]:
        """One name an image."""
        files = [name for layout in self._rows.layouts for name in layout.files]
        return files if self.rows is None else [files[row] for row in self.rows]

    def subset(self, rows: NDArray[np.int64]) -> SplitView:
        """Return a view of some of the images.

        Raises
        ------
        IndexError
            Rows that are not there.
        """
        return self._changed(rows=self._kept(rows))

    def first_classes(self, count: int | None) -> SplitView:
        """Return a view of the images of the first ``count`` classes, which are then all there are; None: all."""
        if count is None or count >= len(self.class_names):
            return self
        return self._changed(rows=self._kept(np.flatnonzero(self.labels < count)), class_names=self.class_names[:count])

    def _kept(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which images of the split the view's ``rows`` are."""
        return np.asarray(np.arange(len(self))[rows] if self.rows is None else self.rows[rows], np.int64)

    # -- the view and a head ------------------------------------------------------------------------------------------
    def origin(self) -> TokenOrigin:
        """Return where these tokens come from, which a head fitted on them keeps."""
        manifest = self._manifest
        return TokenOrigin(
            config=manifest.config,
            backbone=manifest.backbone,
            shape=manifest.shape,
            grid=manifest.grid,
            class_token=self._with_class_token,
            class_names=list(self.class_names),
            split=self.split,
            images=len(self._rows),
            rows=self.rows,
            reduction=self.reduction,
            token_pool=self.token_pool,
        )

    def read_as(self, origin: TokenOrigin) -> SplitView:
        """Return the view as a head of that ``origin`` reads it, whatever store this is.

        The stored tokens pass through the head's own pooling and reduction, with the class token in front if the
        head's had it there, and labels are numbered as the head's classes.

        Raises
        ------
        InputError
            Tokens that are made otherwise than the head's.
        """
        class_token = self._with_class_token or (origin.class_token and self.n_prefix > 0)
        origin.check(self._manifest, class_token, repr(str(self._folder)))
        numbers = origin.numbers(self._manifest.class_names)
        names = self.class_names if numbers is None or origin.class_names is None else list(origin.class_names)
        return self._changed(
            token_pool=origin.token_pool,
            reduction=origin.reduction,
            class_names=names,
            _numbers=numbers,
            _with_class_token=class_token,
        )

    def read_to_audit(self, origin: TokenOrigin) -> SplitView:
        """Return the images that a head of that ``origin`` was fitted on, as it reads them.

        Raises
        ------
        InputError
            This split does not hold them.
        """
        view = self.read_as(origin)
        images = len(self._rows)
        origin.check_training(self._manifest.config, self.split, images, repr(str(self._folder)))
        if self.rows is not None and not np.array_equal(self.rows, _every(origin.rows, images)):
            raise InputError(
                f"these are {len(self)} of the {images} images of {self.split!r}, others than this head was trained "
                "on: an audit is about the training data, pass the whole split"
            )
        _ = view.known  # refuses unknown classes
        return view if origin.rows is None or self.rows is not None else view.subset(origin.rows)

    def with_class_token(self) -> SplitView:
        """Return a view whose token 0 is the class token, ``(n, 1 + s, d)``, which ``pool="cls"`` reads.

        It is reduced as the other tokens are (with what was fitted on those). The tokens then lie on no grid
        any more: ``grid`` is ``(1 + s, 1)``.

        Raises
        ------
        InputError
            The backbone has no class token.
        """
        self._check_class_token()
        return self._changed(_with_class_token=True)

    def unreduced(self) -> SplitView:
        """Return a view of the tokens as they are stored, as float32."""
        return self._changed(token_pool=None, reduction=None)

    def pooled(self, grid: tuple[int, int]) -> SplitView:
        """Return a view whose tokens are averaged over their grid down to ``grid``, before they are reduced.

        Raises
        ------
        InputError
            ``grid`` is larger than that of the stored tokens, or not positive.
        """
        if self._ragged:
            raise InputError(f"the tokens of {str(self._folder)!r} lie on no common grid: they are not averaged")
        check_pool(self._manifest.grid, grid)
        return self._changed(token_pool=None if grid == self._manifest.grid else grid)

    def reduced(self, reduction: Reduction) -> SplitView:
        """Return a view whose tokens pass through ``reduction``."""
        return self._changed(reduction=reduction)

    def _changed(self, **changes: Any) -> SplitView:
        view = copy.copy(self)
        for name in ("labels", "targets", "weights", "known", "lengths", "grids"):
            vars(view).pop(name, None)  # read already, perhaps of other rows
        vars(view).update(changes)
        return view

    def _take(self, name: str, rows: Any) -> NDArray[Any]:
        return self._rows.take(name, rows if self.rows is None else self.rows[rows])

    def class_tokens(self, rows: Any) -> FloatArray:
        """Return the class tokens ``(k, d)`` of ``rows``, not reduced.

        Raises
        ------
        InputError
            The backbone has no class token.
        """
        self._check_class_token()
        return self._take("prefix", rows)[..., 0, :].astype(np.float32, copy=False)

    def __getitem__(self, rows: Any) -> FloatArray:
        """Return reduced tokens: ``(k, s, d)`` of a slice, mask or index array, ``(s, d)`` of an integer."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return self._in_pieces(max(0, stop - start), lambda i, j: slice(start + i, start + j))
        index = np.arange(len(self))[rows]
        if index.ndim == 0:
            return self._reduced(index[None])[0]
        return self._in_pieces(len(index), lambda i, j: index[i:j])

    def _in_pieces(self, count: int, rows: Callable[[int, int], Any]) -> FloatArray:
        """Return ``count`` rows, of which ``rows(i, j)`` are those from ``i`` to ``j``."""
        step = max(1, REDUCED_NUMBERS // int(np.prod(self._manifest.shape)))
        if count <= step:
            return self._reduced(rows(0, count))
        out = np.empty((count, *self.shape[1:]), np.float32)
        for start in range(0, count, step):
            stop = min(start + step, count)
            out[start:stop] = self._reduced(rows(start, stop))
        return out

    def _reduced(self, rows: Any) -> FloatArray:
        """Return the tokens ``(k, s, d)`` of not too many ``rows``."""
        first = self._take("prefix", rows)[..., :1, :] if self._with_class_token else None
        tokens = as_read(self._take("tokens", rows), first, self._manifest.grid, self.token_pool, self.reduction)
        if self._ragged:  # the reduction moves zeros
            tokens[np.arange(tokens.shape[-2]) >= self._lengths(rows)[..., None]] = 0
        return tokens

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

    def tokens_there(self, *, raw: bool = False) -> Iterator[NDArray[Any]]:
        """Yield the tokens ``(k, d)`` that there are, without padding; ``raw``: as stored, not reduced."""
        start = 0
        for chunk in self.raw_chunks() if raw else self.chunks():
            stop = start + len(chunk)
            there = slice(None) if self.lengths is None else self.mask[start:stop]
            yield chunk[there].reshape(-1, chunk.shape[2])
            start = stop

    def raw_chunks(self, size: int | None = None) -> Iterator[NDArray[Any]]:
        """Yield what `raw` returns, ``size`` images after another."""
        return (self.raw(start, stop) for start, stop in self._ranges(size))

    def raw(self, start: int, stop: int) -> NDArray[Any]:
        """Return the tokens of rows ``start .. stop`` as stored (bfloat16 as float32), not reduced."""
        return self._take("tokens", slice(start, stop))

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
        return self._take("prefix", slice(start, stop))

    def _ranges(self, size: int | None) -> Iterator[tuple[int, int]]:
        size = max(1, READ_NUMBERS // int(np.prod(self.shape[1:]))) if size is None else size
        if size < 1:
            raise InputError(f"a chunk must hold at least 1 image, got {size}")
        return ((start, min(start + size, len(self))) for start in range(0, len(self), size))

    def _check_class_token(self) -> None:
        self._check_prefix()
        if self._manifest.config.get("preprocessing", {}).get("class token", True) is False:
            told = f"the tokens that {self._manifest.backbone!r} puts in front are registers"
            raise InputError(f"{told}, and none is a class token: use pool='mean'")

    def _check_prefix(self) -> None:
        if not self.n_prefix:
            raise InputError(f"the backbone {self._manifest.backbone!r} has no class or register tokens")


def _every(rows: NDArray[np.int64] | None, images: int) -> NDArray[np.int64]:
    return np.arange(images) if rows is None else rows
