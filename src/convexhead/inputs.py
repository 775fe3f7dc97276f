"""What users pass as tokens and targets, checked and brought into one form."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.utils.validation import assert_all_finite, check_array

from convexhead.errors import InputError, InputTypeError
from convexhead.runtime.content import content_hash
from convexhead.runtime.ranks import local_ranks
from convexhead.runtime.stored_tokens import CHUNK_BYTES, SomeRows, StoredTokens, Tokens, chunk_rows, read_ahead

DATES = ("m", "M")
"""Kinds of numpy's dtypes for durations and dates."""


def is_store(X: Any) -> bool:
    """Whether ``X`` is a split of a token store: sliced into arrays, with labels of its own."""
    return hasattr(X, "chunks") and hasattr(type(X), "labels")  # of its class: reading labels may refuse them


def resolve_store(X: Any) -> Any:
    """The train split where ``X`` is a whole token store of several splits; anything else unchanged."""
    if hasattr(X, "splits") and not isinstance(X, (np.ndarray, torch.Tensor)):
        return X["train"] if "train" in X.splits else X[next(iter(X.splits))]
    return X


def is_table(X: Any) -> bool:
    """Whether ``X`` is ordinary 2-D input, for which scikit-learn's own validation is right."""
    if is_store(X) or isinstance(X, torch.Tensor):
        return False
    with told_plainly():
        return (X.ndim if hasattr(X, "ndim") else np.asarray(X).ndim) <= 2


def plain(value: Any, name: str) -> Any:
    """``value`` with tensors as numpy arrays, after refusing what has no dense numbers or labels to read.

    Data frames, lists and stores pass as they are, for those who know their names, lengths and files.

    Raises
    ------
    InputError
        Sparse, quantised, nested or masked values, records, dates, or nothing that holds values at all.
    """
    if is_store(value):
        return value
    if isinstance(value, torch.Tensor):
        if value.is_nested or value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            raise InputError(f"{name} is a {_kind(value)} tensor: pass a dense one with its values in memory")
        value = value.detach().cpu().resolve_conj().resolve_neg()
        value = (value.float() if value.is_floating_point() and value.dtype != torch.float64 else value).numpy()
    if sparse.issparse(value):
        raise InputError(f"{name} is sparse, which heads cannot read: pass the dense array {name}.toarray()")
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.getmaskarray(value).any():
            raise InputError(f"{name} has masked entries: fill them in, or leave those samples out")
        value = value.data
    if hasattr(value, "__array__") and not hasattr(value, "ndim"):
        value = np.asarray(value)  # what can become an array need not look like one
    scalar = getattr(value, "ndim", 1) == 0 or not hasattr(value, "__len__")
    if scalar or isinstance(value, (str, bytes, dict, set, frozenset)):
        raise InputError(f"{name} is a {type(value).__name__}: pass an array, a list, a tensor or a token store")
    if isinstance(value, np.matrix):
        value = np.asarray(value)
    dtypes = list(value.dtypes) if hasattr(value, "dtypes") and hasattr(value, "columns") else []
    dtypes += [value.dtype] if hasattr(value, "dtype") else []
    for dtype in dtypes:
        if getattr(dtype, "names", None) is not None:
            raise InputError(f"{name} has records of the fields {dtype.names}: pass one array of numbers")
        if name == "X" and getattr(dtype, "kind", "") in DATES:
            raise InputError(f"{name} holds dates or durations ({dtype}): turn them into numbers first")
    return value


def _kind(tensor: torch.Tensor) -> str:
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantised"
    return "meta" if tensor.device.type == "meta" else "sparse"


@contextlib.contextmanager
def told_plainly() -> Iterator[None]:
    """What numpy, pandas and scikit-learn say of unusable values, in one line and as an `InputError`."""
    try:
        with np.errstate(over="ignore"):  # what becomes infinite is refused as such
            yield
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        text = re.sub(r"(array=)?\[[^\]]{40,}\]*\.?", "", str(error), flags=re.DOTALL)
        kind = InputTypeError if isinstance(error, TypeError) else InputError
        raise kind(" ".join(text.split())) from error


def as_tokens(X: Any, *, n_channels: int | None = None, n_tokens: int | None = None) -> torch.Tensor:
    """Tokens as a finite float tensor ``(n, s, d)`` on the CPU.

    Parameters
    ----------
    X : array, memmap, tensor or split of a token store
        ``(n, s, d)``, or ``(n, d)`` for one token a sample. float32 and float64 are kept, other types become float32
        (floats of half precision) or float64.
    n_channels, n_tokens : int or None
        What the fitted head expects.

    Raises
    ------
    InputError
        Wrong rank, no samples, NaN or infinity, or another shape than the head was fitted on.
    """
    X = resolve_store(X)
    X = X.read() if is_store(X) else plain(X, "X")
    if isinstance(X, np.ndarray) and X.dtype == np.float16:
        X = X.astype(np.float32)
    with told_plainly():
        if _needs_no_conversion(X):
            assert_all_finite(X, input_name="X")
            array = X
        else:
            array = check_array(X, allow_nd=True, dtype=(np.float64, np.float32), order="C", input_name="X")
    if array.ndim > 3:
        raise InputError(
            f"tokens have {array.ndim} dimensions {array.shape}: flatten the grid to (n, s, d) and pass grid=(h, w)"
        )
    if array.ndim == 2:
        array = array[:, None, :]
    if min(array.shape) == 0:
        raise InputError(f"tokens have shape {array.shape}: there must be at least one token and one channel")
    if n_channels is not None and array.shape[2] != n_channels:
        raise InputError(
            f"X has {array.shape[2]} features, but this head was fitted with {n_channels} features a token"
        )
    if n_tokens is not None and array.shape[1] != n_tokens:
        raise InputError(f"X has {array.shape[1]} tokens a sample, but this head was fitted with {n_tokens}")
    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array)


def _needs_no_conversion(X: Any) -> bool:
    """Whether of scikit-learn's checks, which take as long as a step of a small fit, only that of values matters."""
    plain_array = type(X) is np.ndarray and X.ndim == 3 and X.size > 0 and X.flags.c_contiguous
    return plain_array and X.dtype in (np.float64, np.float32) and X.dtype.isnative


LARGEST_TARGET = 1e100
"""Largest target, and inverse of the smallest. Derived: beyond, squares leave the range of float64."""


def as_weights(values: Any, name: str) -> torch.Tensor:
    """Explicit gates or queries as a float64 tensor; their shape is for who uses them to check."""
    with told_plainly():
        array = np.asarray(plain(values, name))
        if array.dtype.kind not in "biufO":
            raise InputError(f"{name} must be real numbers, got an array of {array.dtype}")
        return torch.as_tensor(array.astype(np.float64))


def open_tokens(X: Any, **expected: int | None) -> Tokens:
    """Tokens as `as_tokens` has them; those of a token store or memory map stay on disk and are checked as they come.

    Raises
    ------
    InputError
        As `as_tokens`; NaN and infinity on disk are found when they are read.
    """

    def check(chunk: Any) -> torch.Tensor:
        return as_tokens(chunk, **expected)

    X = resolve_store(X)
    return StoredTokens(X, check) if is_store(X) or isinstance(X, (np.memmap, SomeRows)) else check(X)


def some_samples(X: Any, rows: NDArray[np.int64]) -> Any:
    """Some samples of tokens ``(n, s, d)``, of a split of a store or of a memory map; these two stay on disk."""
    if is_store(X):
        return X.subset(rows)
    return SomeRows(X, rows) if isinstance(X, np.memmap) else X[torch.from_numpy(rows)]


def token_chunks(X: Any, **expected: int | None) -> Iterator[torch.Tensor]:
    """`as_tokens` a chunk at a time, for passes that must not hold everything."""
    tokens = open_tokens(X, **expected)
    for _, chunk in read_ahead(tokens, chunk_rows(tokens, CHUNK_BYTES["cpu"])):
        yield chunk


def tokens_hash(X: Tokens) -> str:
    """A text that tokens share only with equal ones. Those of a store are known by its files' checksums, unread."""
    if not isinstance(X, StoredTokens):
        return f"sha256:{content_hash(X)}"
    source, rows = X.origin
    return f"sha256:{content_hash(getattr(source, 'identity', source), rows)}"


def as_targets(y: Any, *, n_tokens: int, every_token: bool) -> torch.Tensor:
    """Float targets ``(n, r, c)`` in float64.

    Parameters
    ----------
    y : array or tensor
        ``(n,)`` or ``(n, c)``; with ``every_token`` ``(n, s, c)``, and for one token a sample also the former.
    n_tokens : int
        ``s``.
    every_token : bool
        Whether there is an output for every token, ``r = s``, and not one for the pooled tokens.

    Raises
    ------
    InputError
        Another shape, NaN or infinity, or numbers whose squares float64 does not hold. Nothing is reshaped on a guess.
    """
    y = plain(y, "y")
    if getattr(getattr(y, "dtype", None), "kind", "") in DATES:
        raise InputError("y holds dates or durations: turn them into numbers first")
    with told_plainly():
        y = check_array(y, ensure_2d=False, allow_nd=True, dtype=np.float64, input_name="y")
    size = float(np.abs(y).max(initial=0.0))
    if size and not 1 / LARGEST_TARGET < size < LARGEST_TARGET:
        raise InputError(f"y has values of about {size:.0e}, whose squares leave the range of float64: rescale it")
    shape = y.shape
    if every_token and y.ndim == 2 and n_tokens == 1:
        y = y[:, None]
    if y.ndim == 1:
        y = y[:, None]
    if every_token and (y.ndim != 3 or y.shape[1] != n_tokens):
        raise InputError(f"with pool=None the targets must be (n, s, c) = (n, {n_tokens}, c), got {shape}")
    if not every_token:
        if y.ndim != 2:
            raise InputError(f"targets must be (n,) or (n, c) with pooled tokens, got {shape}")
        y = y[:, None]
    return torch.from_numpy(np.require(y, requirements=["C", "W"]))


def check_lengths(X: Tokens, targets: int) -> None:
    """Raise unless there is one target a sample."""
    if len(X) != targets:
        raise InputError(
            f"Found input variables with inconsistent numbers of samples: {len(X)} tokens, {targets} targets"
        )


def check_informative(X: Tokens) -> None:
    """Raise if all samples are the same: no head can tell them apart."""
    first, step = X[:2], chunk_rows(X, CHUNK_BYTES["cpu"])
    if len(X) == 1 or not torch.equal(first[0], first[1]):
        return  # as a rule nothing more is read
    if all(bool((X[i : i + step] == first[:1]).all()) for i in range(0, len(X), step)):
        raise InputError("the tokens are constant: every sample is the same, so no head can tell samples apart")


def one_hot(labels: NDArray[np.int64], n_classes: int) -> torch.Tensor:
    """Targets ``(n, 1, c)`` of class indices, a byte an entry."""
    return (torch.as_tensor(labels).unsqueeze(1) == torch.arange(n_classes)).unsqueeze(1)


def pick_device(device: str) -> torch.device:
    """``"auto"``: CUDA where there is one; of several, each process of a run takes its own."""
    if device == "auto":
        local, processes = local_ranks()
        gpu = "cuda" if processes == 1 else f"cuda:{local % max(torch.cuda.device_count(), 1)}"
        return torch.device(gpu if torch.cuda.is_available() else "cpu")
    if not isinstance(device, (str, torch.device)):
        raise InputError(f"device must be 'auto' or a device such as 'cpu' or 'cuda:0', got {device!r}")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if chosen.type == "meta":
        raise InputError("device 'meta' holds no values: choose 'auto', 'cpu' or 'cuda'")
    return chosen
