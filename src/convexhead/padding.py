"""Samples of different numbers of tokens, as a program of equal ones.

A sample of ``s_i`` tokens is padded with zeros to ``S``. Zero tokens add nothing: a linear head, an MLP and
self-attention sum over tokens, and ``σ(0) = 0``. What is left is the divisor ``1/S``, which should be ``1/s_i``.
Outputs are homogeneous of degree ``g`` in the tokens (3 for self-attention, else 1), with activations as well, so
tokens times

    α_i = (S / s_i)^{m / g},    m: how often the head divides by the number of tokens

give exactly the outputs of the sample's own tokens. So program and certificate are those of ordinary tokens. The factor
is made in float64: the program that is solved is that of tokens rounded to it.

A softmax does not sum over zero tokens as if they were not there. For the attentive head a token that is not there is a
row of ``−∞`` (`Head.absent`), which no token that is there can be, and its weight is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from convexhead import inputs
from convexhead.errors import InputError
from convexhead.program.heads.base import Head
from convexhead.runtime.content import content_hash
from convexhead.runtime.stored_tokens import StoredTokens, Tokens


class Padded:
    """Tokens ``(n, S, d)`` of which some count.

    Parameters
    ----------
    tokens : array or tensor (n, S, d)
        Anything may stand where ``mask`` is False.
    mask : array (n, S), bool
        Which tokens there are; at least one a sample.

    Raises
    ------
    InputError
        Another shape, a sample without tokens, or tokens that cannot be used.
    """

    source: Any = None
    """The split of a store that the tokens are of, from which they are read as they are asked for; or None."""

    def __init__(self, tokens: Any, mask: Any) -> None:
        with inputs.told_plainly():
            array, there = np.asarray(inputs.plain(tokens, "X")), np.asarray(inputs.plain(mask, "mask"))
        if array.ndim != 3 or there.shape != array.shape[:2]:
            raise InputError(f"X must be (n, s, d) and mask (n, s), got {array.shape} and {there.shape}")
        if there.dtype != bool and not np.isin(there, (0, 1)).all():
            raise InputError("mask must be True where a token is there and False where it is padding")
        there = there.astype(bool)
        if empty := np.flatnonzero(~there.any(1)).tolist():
            raise InputError(f"sample {empty[0]} has no tokens: leave it out")
        self.mask: Bool[Tensor, "n s"] = torch.from_numpy(there)
        self.tokens: Tokens = inputs.as_tokens(np.where(there[..., None], array, np.zeros((), array.dtype)))

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of_store(cls, view: Any) -> Padded:
        """The samples of a split of a store with lengths; their tokens stay on disk."""
        padded = cls.__new__(cls)
        padded.source, padded.mask = view, torch.from_numpy(view.mask)
        padded.tokens = inputs.open_tokens(view)
        return padded

    @classmethod
    def of_list(cls, samples: Sequence[Any]) -> Padded:
        """Tokens of arrays ``(s_i, d)``, those that there are first."""
        arrays = [np.asarray(inputs.plain(sample, "X")) for sample in samples]
        channels = {array.shape[1] for array in arrays if array.ndim == 2}
        if len(channels) != 1 or not all(array.ndim == 2 for array in arrays):
            raise InputError("a list of samples must hold arrays (s_i, d) of the same number of channels d")
        lengths = [len(array) for array in arrays]
        tokens = np.zeros((len(arrays), max(lengths), channels.pop()), np.result_type(*arrays))
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        tokens[mask] = np.concatenate(arrays)
        return cls(tokens, mask)

    def scaled(self, head: Head) -> Tokens:
        """``α_i X_i (n, s, d)`` for a head over ``S`` tokens, in float64.

        Raises
        ------
        InputError
            The head mixes by position, or reads a token that some sample does not have.
        """
        if not head.any_length:
            raise InputError(
                f"head={head.name!r} mixes tokens by their position, so all samples need the same number of tokens: "
                "use 'self-attention', 'mlp', 'linear', or 'attentive' with query_position=False"
            )
        if head.pool == "cls" and not bool(self.mask[:, 0].all()):
            raise InputError("pool='cls' reads token 0, which the mask leaves out of some sample")
        divisions, degree = head.divisions, 3 if head.reads_tokens else 1
        alpha = (head.s / self.mask.sum(1).double()) ** (divisions / degree)
        if isinstance(self.tokens, StoredTokens) and not head.absent:  # as they are read
            return StoredTokens(_Scaled(self.source, alpha.numpy()), inputs.as_tokens)
        scaled = self.in_memory().double() * alpha[:, None, None]
        return scaled.masked_fill(~self.mask.unsqueeze(2), head.absent)

    def in_memory(self) -> Float[Tensor, "n s d"]:
        """All tokens, read where they are a store's."""
        return self.tokens.read() if isinstance(self.tokens, StoredTokens) else self.tokens

    def weights(self, given: Any = None) -> Any:
        """Weights of tokens ``(n, s)``, or as fine as those given, 0 where there is none."""
        there = self.mask.numpy().astype(float)
        if given is None:
            return there
        w = np.asarray(given, float)
        return w.reshape(*w.shape, *[1] * max(0, 2 - w.ndim)) * (there if w.ndim < 3 else there[..., None])

    def rows(self, kept: NDArray[np.int64]) -> Padded:
        """Some of the samples."""
        if self.source is not None:
            return Padded.of_store(self.source.subset(kept))
        return Padded(self.tokens[torch.from_numpy(kept)], self.mask[kept])


class _Scaled:
    """Rows of a split of a store, each times a factor, read as they are asked for."""

    def __init__(self, view: Any, alpha: NDArray[np.float64]) -> None:
        self._view, self._alpha, self.reduction = view, alpha, view.reduction

    def __len__(self) -> int:
        return len(self._view)

    @property
    def identity(self) -> str:
        return f"{self._view.identity} x {content_hash(self._alpha)}"

    @property
    def tokens_identity(self) -> str:
        return f"{self._view.tokens_identity} x {content_hash(self._alpha)}"

    def __getitem__(self, rows: Any) -> NDArray[np.float64]:
        scaled: NDArray[np.float64] = self._view[rows].astype(np.float64) * self._alpha[rows][:, None, None]
        return scaled


def is_ragged(X: Any) -> bool:
    """Whether ``X`` is a list of arrays ``(s_i, d)`` of different lengths."""
    if not isinstance(X, (list, tuple)) or not all(getattr(sample, "ndim", 0) == 2 for sample in X):
        return False
    return len({len(sample) for sample in X}) > 1


def as_padded(X: Any, mask: Any = None) -> Any:
    """`Padded` where samples of arrays have different numbers of tokens; anything else, stores too, unchanged."""
    if isinstance(X, Padded):
        return X
    if isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 1:
        X = list(X)
    if mask is None:
        return Padded.of_list(X) if is_ragged(X) else X
    if inputs.is_store(inputs.resolve_store(X)) or is_ragged(X):
        raise InputError("mask goes with an array X (n, s, d); a list of samples says itself how long they are")
    return Padded(X, mask)


def with_lengths(X: Any) -> Any:
    """`Padded` of a split of a store whose samples have different numbers of tokens; anything else unchanged.

    It has to be read as its head reads it before: a `Padded` knows no other store.
    """
    return Padded.of_store(X) if getattr(X, "lengths", None) is not None else X


def padded_like(mask: NDArray[np.bool_] | None, y: Any, value: Any) -> Any:
    """Labels or numbers of tokens ``(n, S, …)`` of a list of ``(s_i, …)``, filled up with ``value``.

    Raises
    ------
    InputError
        Not one for each token.
    """
    if mask is None or not isinstance(y, (list, tuple)):
        return y
    arrays = [np.asarray(inputs.plain(each, "y")) for each in y]
    lengths = mask.sum(1).tolist()
    if [len(each) for each in arrays] != lengths or len({each.shape[1:] for each in arrays}) != 1:
        raise InputError(f"y must hold one target for each token: samples have {lengths[:5]}… tokens")
    joined = np.concatenate(arrays)
    filled = np.full((*mask.shape, *joined.shape[1:]), value, joined.dtype if joined.dtype.kind != "u" else np.int64)
    filled[mask] = joined
    return filled
