"""Tokens that stay on disk, read a chunk ahead of the work on them."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convexhead.runtime.ranks import Ranks

CHUNK_BYTES = {"cpu": 32e6, "cuda": 256e6}
"""Bytes of tokens that are read at a time. Chosen by hand: long enough for a disk, little beside a budget."""


class StoredTokens:
    """Tokens ``(n, s, d)`` that stay on disk and are read a slice at a time.

    Parameters
    ----------
    source : split of a token store, or numpy memmap
    check : callable (array) -> Tensor (k, s, d)
        Turns what was read into tokens, or raises: see `inputs.as_tokens`.
    rows : slice or None
        The part of ``source`` that these are.
    """

    def __init__(self, source: Any, check: Callable[[Any], Tensor], rows: slice | None = None) -> None:
        self._source, self._check = source, check
        start, stop, _ = (rows or slice(None)).indices(len(source))
        self._rows = range(start, stop)
        probe = check(source[start : start + 1])
        self.dtype = probe.dtype
        self.shape = (len(self._rows), *probe.shape[1:])

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def checksum(self) -> str | None:
        """What the files of a store say of these tokens, where values depend on how many are read at a time.

        None where the values themselves tell: only principal components and whitened tokens are products, whose
        rounding may differ.
        """
        reduction = getattr(self._source, "reduction", None)
        return None if reduction is None or reduction.basis is None else str(self._source.tokens_identity)

    @property
    def first(self) -> int:
        """The place of the first of them in the store or map."""
        return self._rows.start

    @property
    def origin(self) -> tuple[Any, range]:
        """What they are read from, and which of its rows they are."""
        return self._source, self._rows

    def share(self, rows: slice) -> StoredTokens:
        """Some of them, still on disk."""
        part = self._rows[rows]
        return StoredTokens(self._source, self._check, slice(part.start, part.stop))

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Read ``(k, s, d)``: of a slice, or of a tensor of positions."""
        rows: Any = self._rows[index] if isinstance(index, slice) else self._rows.start + index.cpu().numpy()
        if isinstance(rows, range):
            rows = slice(rows.start, rows.stop, rows.step)
        tokens = self._check(self._source[rows])
        if isinstance(self._source, np.memmap):
            tokens = tokens.clone() if np.may_share_memory(tokens.numpy(), self._source) else tokens
        forget_pages(self._source)
        return tokens

    def read(self) -> Tensor:
        """All of them."""
        out = torch.empty(self.shape, dtype=self.dtype)
        for rows, chunk in read_ahead(self, chunk_rows(self, CHUNK_BYTES["cpu"])):
            out[rows] = chunk
        return out

    def decoded(self) -> StoredTokens:
        """These tokens as they come out of reading, in a temporary file that goes with the process: where decoding
        takes long (a product) and leaves less than was stored, it pays to do it only once."""
        reduction = getattr(self._source, "reduction", None)
        if reduction is None or reduction.basis is None or 2 * self.shape[2] > len(reduction.mean):
            return self
        with tempfile.TemporaryFile(prefix="convexhead-tokens-") as file:
            out = np.memmap(file, str(self.dtype).removeprefix("torch."), "w+", shape=self.shape)
        for rows, chunk in read_ahead(self, chunk_rows(self, CHUNK_BYTES["cpu"])):
            out[rows] = chunk.numpy()
            out.flush()
            forget_pages(out)
        return StoredTokens(out, self._check)


class SomeRows:
    """Some rows of a memory map, read as they are asked for."""

    def __init__(self, source: Any, rows: NDArray[np.int64]) -> None:
        self.source, self.rows = source, rows
        self.shape, self.ndim, self.dtype = (len(rows), *source.shape[1:]), source.ndim, source.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        read = self.source[self.rows[index]]
        forget_pages(self.source)
        return read


Tokens = Tensor | StoredTokens


class AllTokens:
    """Tokens of all processes, of which some are asked for: each process brings its own, and all get the same.

    Parameters
    ----------
    X : Tensor (m, s, d) or StoredTokens
        Those of this process.
    ranks : Ranks
    n : int
        Samples of all processes together.

    Attributes
    ----------
    shape : tuple of int
        ``(n, s, d)``.
    """

    def __init__(self, X: Tokens, ranks: Ranks, n: int) -> None:
        self._X, self._ranks, self._n = X, ranks, n
        self.shape = (n, *X.shape[1:])

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Return the samples at ``index``, a slice or positions among all, in every process."""
        if self._ranks.size == 1:
            return self._X[index]
        rows = torch.arange(self._n)[index]
        share = self._ranks.share(self._n)
        mine = (rows >= share.start) & (rows < share.stop)
        own = self._X[rows[mine] - share.start]
        found = own.new_zeros(len(rows), *own.shape[1:])
        found[mine] = own
        return self._ranks.sum(found)[0]


def forget_pages(source: Any) -> None:
    """Let go of what was read of a memory map: it stays in the system's cache, and no longer counts as this process's.

    Anything else is left alone, copy-on-write maps among it: their pages may hold changes that are nowhere else. Those
    written to a shared map are the file's.
    """
    pages = getattr(source, "_mmap", None)
    if isinstance(pages, mmap.mmap) and source.mode in ("r", "r+", "w+") and hasattr(pages, "madvise"):
        pages.madvise(mmap.MADV_DONTNEED)


def chunk_rows(X: Tokens, size: float) -> int:
    """Samples whose tokens take about ``size`` bytes."""
    return max(1, int(size // token_bytes(X)))


def token_bytes(X: Tokens) -> int:
    """Bytes of one sample's tokens."""
    return int(np.prod(X.shape[1:])) * X.dtype.itemsize


def read_ahead(
    X: Tokens, size: int, *, start: int = 0, stop: int | None = None, device: torch.device | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of ``size`` samples; a thread reads and decodes the next one while the caller works on the last."""
    stop = len(X) if stop is None else stop

    def load(rows: slice) -> Tensor:
        tokens = X[rows]
        if device is None or device.type == "cpu":
            return tokens
        return tokens.pin_memory().to(device, non_blocking=True)

    chunks = [slice(i, min(i + size, stop)) for i in range(start, stop, size)]
    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(load, rows) for rows in chunks[:1]]
        for k, rows in enumerate(chunks):
            tokens = ahead.pop().result()
            if k + 1 < len(chunks):
                ahead.append(reader.submit(load, chunks[k + 1]))
            yield rows, tokens
