"""The samples of one process, in memory as far as a budget goes and read from disk again in every pass beyond it.

Peak memory is set by the budget, not by the number of samples:

    tokens in memory, where all of them fit             n · s · d numbers, once
    prepared tokens of the first samples                as many as fit into what is left
    the rest, prepared anew in every pass               three chunks: read ahead, at hand, being prepared

Beside them grows only what a sample takes that is not tokens: targets, outputs and residuals ``(n, r, c)``, and a bit
for every gated entry of a score.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from convexhead.heads.base import Data
from convexhead.ranks import local_ranks

if TYPE_CHECKING:
    from convexhead.activation import Activation

CHUNK_BYTES = {"cpu": 32e6, "cuda": 256e6}
"""Tokens that are read at a time: long enough to read well, and few beside a budget."""


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
            _forget_pages(self._source)
        return tokens

    def read(self) -> Tensor:
        """All of them."""
        out = torch.empty(self.shape, dtype=self.dtype)
        for rows, chunk in read_ahead(self, chunk_rows(self, CHUNK_BYTES["cpu"])):
            out[rows] = chunk
        return out

    def decoded(self) -> StoredTokens:
        """These tokens as they come out of reading, in a temporary file that goes with the process: where decoding
        takes long (principal components) and leaves less than was stored, it pays to do it only once."""
        reduction = getattr(self._source, "reduction", None)
        if reduction is None or reduction.basis is None or 2 * self.shape[2] > len(reduction.mean):
            return self
        with tempfile.TemporaryFile(prefix="convexhead-tokens-") as file:
            out = np.memmap(file, np.float32, "w+", shape=self.shape)
        for rows, chunk in read_ahead(self, chunk_rows(self, CHUNK_BYTES["cpu"])):
            out[rows] = chunk.numpy()
            out.flush()
            _forget_pages(out)
        return StoredTokens(out, self._check)


Tokens = Tensor | StoredTokens


def _forget_pages(mapped: np.memmap) -> None:
    """Let go of the pages that were read: they stay in the system's cache, and no longer count as this process's."""
    pages = getattr(mapped, "_mmap", None)
    if pages is not None and mapped.mode in ("r", "r+", "w+") and hasattr(pages, "madvise"):
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


class Samples:
    """Tokens as passes over them want them; see the module's text.

    Parameters
    ----------
    X : Tensor (n, s, d) or StoredTokens
        Brought into memory, on ``device``, where all of it fits.
    activation : Activation
        Prepares tokens for mixing, and packs the masks of gates.
    dtype : torch.dtype
        Precision of prepared tokens.
    memory : float
        Bytes that may be taken for tokens that are not yet in memory and for prepared ones.
    reuse : bool
        Prepare for many passes and keep the result as far as memory goes; else prepare in every pass.
    step : int
        Samples prepared at a time.

    Attributes
    ----------
    data : dict of Tensor (kept, ...)
        Prepared tokens of the first ``kept`` samples.
    masks : Tensor (n, j, m) or None
        Bit-packed masks of all samples.
    """

    def __init__(
        self,
        X: Tokens,
        activation: Activation,
        *,
        dtype: torch.dtype,
        device: torch.device,
        memory: float,
        reuse: bool,
        step: int,
    ) -> None:
        self.X, self.activation, self._n = X, activation, len(X)
        self.device = torch.empty(0, device=device).device
        self.dtype = self.products = dtype
        self.memory = memory
        self._chunk = min(CHUNK_BYTES[device.type], memory / 8)
        first = X[:1].to(self.device)
        self.masks = self._empty_masks(activation.pack_masks(first))
        self._plan(first, reuse)
        self._fill(step)

    def __len__(self) -> int:
        return self._n

    @property
    def bytes(self) -> int:
        """Memory that prepared tokens take."""
        return sum(value.nbytes for value in self.data.values() if not self._is_tokens(value))

    @property
    def complete(self) -> bool:
        """Whether every sample is kept prepared."""
        return self.kept == len(self)

    def _resident(self) -> bool:
        return isinstance(self.X, Tensor) and self.X.device == self.device

    def _is_tokens(self, value: Tensor) -> bool:
        """Whether a prepared tensor is nothing but the tokens themselves, which are in memory anyhow."""
        return isinstance(self.X, Tensor) and _same(value, self.X)

    def _empty_masks(self, like: Tensor | None) -> Tensor | None:
        return None if like is None else like.new_empty(len(self.X), *like.shape[1:])

    def _plan(self, first: Tensor, reuse: bool) -> None:
        """Decide what is brought into memory and how many samples are kept prepared; make room for them."""
        n, tokens = len(self.X), token_bytes(self.X)
        cast = first.to(self.dtype)
        self.like = self.activation.prepare(cast, reuse=reuse)
        same = [key for key, value in self.like.items() if _same(value, first)]
        each = sum(value.nbytes for key, value in self.like.items() if key not in same) if reuse else 0
        if not self._resident() and n * (tokens + each) <= self.memory:
            self.X = (self.X.read() if isinstance(self.X, StoredTokens) else self.X).to(self.device)
            self.memory -= n * tokens
        elif isinstance(self.X, StoredTokens):
            self.X = self.X.decoded()
        if not self._resident():
            each, same = sum(value.nbytes for value in self.like.values()), []
            self.memory -= 3 * self._chunk
        self.kept = int(min(n, max(self.memory, 0) // max(each, 1))) if reuse else 0
        self.data: Data = {}
        for key, value in self.like.items() if self.kept else ():
            self.data[key] = self.X[: self.kept] if key in same else value.new_empty(self.kept, *value.shape[1:])

    def _fill(self, step: int) -> None:
        for rows, X in self._tokens(0, self.kept if self.masks is None else len(self), step):
            packed = None if self.masks is None else self.activation.pack_masks(X)
            if self.masks is not None and packed is not None:
                self.masks[rows] = packed
            inside = max(0, min(self.kept, rows.stop) - rows.start)
            if inside:
                prepared = self.activation.prepare(X[:inside].to(self.dtype), reuse=True)
                for key, value in prepared.items():
                    if not self._is_tokens(self.data[key]):
                        self.data[key][rows.start : rows.start + inside] = value

    def _tokens(self, start: int, stop: int, size: int) -> Iterator[tuple[slice, Tensor]]:
        """At most ``size`` samples after another, on the device."""
        if self._resident():
            for i in range(start, stop, size):
                rows = slice(i, min(i + size, stop))
                yield rows, self.X[rows]
            return
        chunk = chunk_rows(self.X, self._chunk)
        for rows, tokens in read_ahead(self.X, chunk, start=start, stop=stop, device=self.device):
            for i in range(0, len(tokens), size):
                part = tokens[i : i + size]
                yield slice(rows.start + i, rows.start + i + len(part)), part

    def batches(self, size: int) -> Iterator[tuple[slice, Data]]:
        """Slices of at most ``size`` samples with their prepared tokens and masks."""
        for i in range(0, self.kept, size):
            rows = slice(i, min(i + size, self.kept))
            yield rows, self._masked({key: value[rows] for key, value in self.data.items()}, rows)
        for rows, X in self._tokens(self.kept, len(self), size):
            data = self.activation.prepare(X.to(self.dtype), reuse=False)
            if self.products != self.dtype:
                data = {key: value.to(self.products) for key, value in data.items()}
            yield rows, self._masked(data, rows)

    def _masked(self, data: Data, rows: slice) -> Data:
        return data if self.masks is None else {**data, "masks": self.masks[rows]}

    # -- the same samples otherwise -----------------------------------------------------------------------------------
    def in_precision(self, dtype: torch.dtype, *, reuse: bool, step: int) -> Samples:
        """Prepared in another precision; what is kept here stays, and leaves less memory for the other."""
        other = copy(self)
        other.dtype = other.products = dtype
        other.memory = self.memory - self.bytes if self._resident() else 0.0
        other.masks = None  # they do not depend on the precision: only tokens are prepared anew
        other._plan(self.X[:1].to(self.device), reuse)
        other._fill(step)
        other.masks = self.masks
        return other

    def with_products(self, products: torch.dtype) -> Samples:
        """Large products in another precision, from the tokens prepared here."""
        other = copy(self)
        other.products = products
        each = sum(value.nbytes for value in self.like.values()) * products.itemsize / self.dtype.itemsize
        other.kept = int(min(self.kept, max(self.memory - self.bytes, 0) // each))
        other.data = {key: value[: other.kept].to(products) for key, value in self.data.items()}
        return other

    def take(self, index: Tensor) -> Samples:
        """Some of the samples, with what was prepared of them."""
        other = copy(self)
        other._n, other.masks = len(index), None if self.masks is None else self.masks[index]
        if self.complete:
            other.data, other.kept = {key: value[index] for key, value in self.data.items()}, len(index)
        else:
            other.X, other.data, other.kept = self.X[index].to(self.device), {}, 0
        return other


def _same(value: Tensor, tokens: Tensor) -> bool:
    """Whether a tensor is ``tokens``, or the first samples of it."""
    return value.data_ptr() == tokens.data_ptr() and value.shape[1:] == tokens.shape[1:]


def default_memory(device: torch.device) -> float:
    """Half of what is free on the device or, shared by the processes of a run, in this machine or container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2
    free = float("inf")
    meminfo, cgroup = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        free = float(line.split()[1]) * 1024
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) / 2
    if (cgroup / "memory.max").exists() and (limit := (cgroup / "memory.max").read_text().strip()) != "max":
        free = min(free, float(limit) - float((cgroup / "memory.current").read_text()))
    return free / 2 / local_ranks()[1]
