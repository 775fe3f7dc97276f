"""The samples of one process, in memory as far as a budget goes and read from disk again in every pass beyond it.

Peak memory is set by the budget, not by the number of samples:

    masks of gates                                      a bit for every entry of a score
    tokens in memory, where all of them fit             n · s · d numbers, once
    prepared tokens of the first samples                as many as fit into what is left
    the rest, prepared anew in every pass               four chunks: read ahead, at hand, the last, being prepared
    the same prepared tokens in other precisions        as many as fit into what is left then

One `Budget` is shared by all of these and by the mixed tokens that solvers keep. Beside it grows only what a sample
takes that is not tokens: targets, outputs and residuals ``(n, r, c)``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convexhead.program.heads.base import Data
from convexhead.runtime.budget import Budget
from convexhead.runtime.ranks import local_ranks
from convexhead.runtime.stored_tokens import CHUNK_BYTES, StoredTokens, Tokens, chunk_rows, read_ahead, token_bytes

if TYPE_CHECKING:
    from convexhead.program.activations import Activation
    from convexhead.program.moments import Moments
    from convexhead.program.recent_outputs import RecentOutputs

BATCH_BYTES = {"cpu": 3_000_000, "cuda": 1_000_000_000}
"""Bytes of workspace that a batch may take. Chosen by hand: on a CPU it stays in the caches during a pass."""
COMPACT = 0.25
"""Prepared tokens of at most this share of the bytes of their tokens are kept in every precision once it was asked for.
Chosen by hand: pooled tokens are a few hundredths, and to pool again costs a pass over all tokens."""


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
        Bytes that may be taken for tokens that are not yet in memory and for all that is made of tokens.
    reuse : bool
        Prepare for many passes and keep the result as far as memory goes; else prepare in every pass.

    Attributes
    ----------
    data : dict of Tensor (kept, ...)
        Prepared tokens of the first ``kept`` samples.
    like : dict of Tensor (1, ...)
        The first sample prepared.
    masks : Tensor (n, j, m) or None
        Bit-packed masks of all samples.
    norms : list of Tensor (n,)
        ``‖X_i‖_F`` once they have been asked for, in any precision.
    moments : dict of Moments
        Second moments of pooled tokens once a solver has made them, in any precision; their diagonal under True.
    kernels : dict of Tensor (n, n)
        Inner products of features once a solver has made them, by the precision of the features.
    problems : int
        How many are to be solved with these samples, as far as is known.
    recent : RecentOutputs or None
        Of the last models of a path of the linear head; None elsewhere, where nobody would ask for them.
    compact : dict of Samples
        The same samples in other precisions, where they are small beside their tokens.
    budget : Budget
        Shared with the same samples in other precisions, and with whoever keeps what is mixed from them.
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
    ) -> None:
        self.X, self.activation, self.n = X, activation, len(X)
        self.device = torch.empty(0, device=device).device
        self.dtype = self.product_dtype = dtype
        self.budget = Budget(memory)
        self._chunk = min(CHUNK_BYTES[device.type], memory / 8)
        first = X[:1].to(self.device)
        packed = activation.pack_masks(first)
        self.masks = None if packed is None else packed.new_empty(len(X), *packed.shape[1:])
        self.budget.take(0 if self.masks is None else self.masks.nbytes)
        self.like = activation.prepare(first.to(dtype), reuse=reuse, masks=packed)
        self._bring_in(first, reuse)
        self.kept, self.data = self._room(self.like, first, reuse)
        self.budget.lend(self.bytes, self)
        self._fill(self.data, dtype, self.batch_size(self._workspace), pack=True)
        self.norms: list[Tensor] = []
        self.moments: dict[bool, Moments] = {}
        self.kernels: dict[torch.dtype, Tensor] = {}
        self.problems = 1
        self.recent: RecentOutputs | None = None
        self.compact: dict[torch.dtype, Samples] = {}

    def __len__(self) -> int:
        return self.n

    @property
    def bytes(self) -> int:
        """Memory that prepared tokens take."""
        return sum(value.nbytes for value in self.data.values() if not self._is_tokens(value))

    @property
    def complete(self) -> bool:
        """Whether every sample is kept prepared."""
        return self.kept == len(self)

    def batch_size(self, numbers: int) -> int:
        """Samples whose workspace of so many ``numbers`` each fits a batch."""
        return max(1, BATCH_BYTES[self.device.type] // self.product_dtype.itemsize // max(1, numbers))

    @property
    def _workspace(self) -> int:
        """Numbers that preparing a sample takes."""
        head = self.activation.head
        return head.s * max(head.s, head.d)

    def _resident(self) -> bool:
        return isinstance(self.X, Tensor) and self.X.device == self.device

    def _is_tokens(self, value: Tensor) -> bool:
        """Whether a prepared tensor is nothing but the tokens themselves, which are in memory anyhow."""
        return isinstance(self.X, Tensor) and _same(value, self.X)

    def _bring_in(self, first: Tensor, reuse: bool) -> None:
        """Bring the tokens into memory where they fit with what is prepared of them, else make room for chunks."""
        if self._resident():
            return
        tokens = token_bytes(self.X)
        beside = sum(value.nbytes for value in self.like.values() if not _same(value, first)) if reuse else 0
        if self.budget.fits(len(self), tokens + beside) == len(self):
            self.budget.take(len(self) * tokens)
            self.X = (self.X.read() if isinstance(self.X, StoredTokens) else self.X).to(self.device)
        else:
            self.budget.take(4 * self._chunk)
            self.X = self.X.decoded() if isinstance(self.X, StoredTokens) else self.X

    def _room(self, like: Data, first: Tensor, reuse: bool) -> tuple[int, Data]:
        """How many samples are kept prepared, given the ``first`` and what is prepared of it; room for them."""
        same = [key for key, value in like.items() if self._resident() and _same(value, first)]
        each = sum(value.nbytes for key, value in like.items() if key not in same)
        kept = self.budget.fits(len(self), each) if reuse else 0
        data: Data = {}
        for key, value in like.items() if kept else ():
            data[key] = self.X[:kept] if key in same else value.new_empty(kept, *value.shape[1:])
        return kept, data

    def _fill(self, data: Data, dtype: torch.dtype, step: int, *, pack: bool) -> None:
        """Prepare the samples that ``data`` has room for, ``step`` at a time; ``pack`` the masks of all on the way."""
        kept = max((len(value) for value in data.values()), default=0)
        for rows, X in self._tokens(0, len(self) if pack and self.masks is not None else kept, step):
            if pack and self.masks is not None and (new := self.activation.pack_masks(X)) is not None:
                self.masks[rows] = new
            inside = max(0, min(kept, rows.stop) - rows.start)
            if inside:
                packed = None if self.masks is None else self.masks[rows][:inside]
                prepared = self.activation.prepare(X[:inside].to(dtype), reuse=True, masks=packed)
                for key, value in prepared.items():
                    if not self._is_tokens(data[key]):
                        data[key][rows.start : rows.start + inside] = value

    def _tokens(self, start: int, stop: int, size: int) -> Iterator[tuple[slice, Tensor]]:
        """At most ``size`` samples after another, on the device."""
        assert start == stop or len(self.X) == len(self), "of some of the samples only what was prepared is at hand"
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
            if self.product_dtype != self.dtype:
                data = {key: value.to(self.product_dtype) for key, value in data.items()}
            yield rows, self._masked(data, rows)

    def _masked(self, data: Data, rows: slice) -> Data:
        return data if self.masks is None else {**data, "masks": self.masks[rows]}

    @property
    def mix_bounds(self) -> Tensor:
        """``a_i (n,)`` in float64, of `Head.mix_bound`."""
        return self.activation.head.mix_bound(self._token_norms)

    @property
    def operations(self) -> float:
        """Of `Head.operations`."""
        return self.activation.head.operations(float(self._token_norms.max()))

    @property
    def _token_norms(self) -> Tensor:
        """``‖X_i‖_F (n,)``: one pass over the tokens the first time, in any precision."""
        if not self.norms:
            norms = torch.empty(len(self), dtype=torch.float64, device=self.device)
            for rows, X in self._tokens(0, len(self), self.batch_size(self._workspace)):
                norms[rows] = _norms(self.activation.head.present(X.double()).flatten(1))
            self.norms.append(norms)
        return self.norms[0]

    # -- the same samples otherwise -----------------------------------------------------------------------------------
    def astype(self, dtype: torch.dtype, *, reuse: bool) -> Samples:
        """Prepared in another precision, and kept as far as the budget that both share still goes.

        What is small beside its tokens is kept whether ``reuse`` or not, and is made once for each precision.
        """
        if dtype in self.compact:
            return self.compact[dtype]
        other, first = self._copy(), self.X[:1].to(self.device)
        other.dtype = other.product_dtype = dtype
        packed = None if self.masks is None else self.masks[:1]
        other.like = self.activation.prepare(first.to(dtype), reuse=reuse, masks=packed)
        if sum(value.nbytes for value in other.like.values()) <= COMPACT * token_bytes(self.X):
            self.compact[dtype], reuse = other, True
        other.kept, other.data = self._room(other.like, first, reuse)
        self.budget.lend(other.bytes, other)
        # Masks do not depend on the precision: only tokens are prepared anew.
        self._fill(other.data, dtype, other.batch_size(self._workspace), pack=False)
        return other

    def with_products(self, dtype: torch.dtype) -> Samples:
        """Large products in another precision, from the tokens prepared here."""
        other = self._copy()
        other.product_dtype = dtype
        each = sum(value.numel() for value in self.like.values()) * dtype.itemsize
        other.kept = self.budget.fits(self.kept, 2 * each)  # as much again is left for mixed tokens
        other.data = {key: value[: other.kept].to(dtype) for key, value in self.data.items()}
        self.budget.lend(other.bytes, other)
        return other

    def take(self, index: Tensor) -> Samples:
        """Some of the samples, with what was prepared of them."""
        other = self._copy()
        other.n, other.masks = len(index), None if self.masks is None else self.masks[index]
        other.norms, other.moments, other.kernels, other.recent = [norms[index] for norms in self.norms], {}, {}, None
        if self.complete:
            other.data, other.kept = {key: value[index] for key, value in self.data.items()}, len(index)
        else:
            other.X, other.data, other.kept = self.X[index].to(self.device), {}, 0
        return other

    def _copy(self) -> Samples:
        """A copy that holds none of the same samples in other precisions, so that nothing refers to itself."""
        other = copy(self)
        other.compact = {}
        return other


def _norms(X: Tensor) -> Tensor:
    """2-norms of rows, whose squares need not be in the range of floats."""
    norms = torch.linalg.vector_norm(X, dim=1)
    smallest, largest_norm = norms.aminmax()
    if not 1e-140 < float(smallest) <= float(largest_norm) < 1e140:
        largest = X.abs().amax(1, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
        norms = largest[:, 0] * (X / largest).norm(dim=1)
    return norms * (1 + 1e-12)


def _same(value: Tensor, tokens: Tensor) -> bool:
    """Whether a tensor is ``tokens``, or the first samples of it."""
    return value.data_ptr() == tokens.data_ptr() and value.shape[1:] == tokens.shape[1:]


def default_memory(device: torch.device) -> float:
    """Half of what is free on the device or, shared by the processes of a run, in this machine or container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2
    free = float("inf")
    if meminfo := _text("/proc/meminfo"):
        free = float(meminfo.partition("MemAvailable:")[2].split(maxsplit=1)[0]) * 1024
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) / 2
    if (limit := _text("/sys/fs/cgroup/memory.max").strip()) not in ("", "max"):
        free = min(free, float(limit) - float(_text("/sys/fs/cgroup/memory.current")))
    return free / 2 / local_ranks()[1]


def _text(path: str) -> str:
    """What a file of the system says; nothing where there is none."""
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return ""
