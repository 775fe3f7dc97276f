"""What users pass as tokens and targets, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_array

from convexhead.errors import InputError

CHUNK_NUMBERS = 16_000_000
"""Numbers of tokens that a pass over user data holds at once."""


def is_store(X: Any) -> bool:
    """Whether ``X`` is a split of a token store: sliced into arrays, with labels of its own."""
    return hasattr(X, "chunks") and hasattr(X, "labels")


def resolve_store(X: Any) -> Any:
    """The train split where ``X`` is a whole token store of several splits; anything else unchanged."""
    if hasattr(X, "splits") and not isinstance(X, (np.ndarray, torch.Tensor)):
        return X["train"] if "train" in X.splits else X[next(iter(X.splits))]
    return X


def is_table(X: Any) -> bool:
    """Whether ``X`` is ordinary 2-D input, for which scikit-learn's own validation is right."""
    if is_store(X) or isinstance(X, torch.Tensor):
        return False
    return (X.ndim if hasattr(X, "ndim") else np.asarray(X).ndim) <= 2


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
    if is_store(X):
        X = X.read()
    elif isinstance(X, torch.Tensor):
        X = X.detach().cpu()
        X = (X.float() if X.dtype in (torch.float16, torch.bfloat16) else X).numpy()
    elif isinstance(X, np.ndarray) and X.dtype == np.float16:
        X = X.astype(np.float32)
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


def token_chunks(X: Any, **expected: int | None) -> Iterator[torch.Tensor]:
    """`as_tokens` a chunk at a time, for passes that must not hold everything."""
    X = resolve_store(X)
    if is_store(X):
        for chunk in X.chunks(max(1, CHUNK_NUMBERS // int(np.prod(X.shape[1:])))):
            yield as_tokens(chunk, **expected)
    else:
        yield as_tokens(X, **expected)


def check_lengths(X: torch.Tensor, targets: int) -> None:
    """Raise unless there is one target a sample."""
    if len(X) != targets:
        raise InputError(
            f"Found input variables with inconsistent numbers of samples: {len(X)} tokens, {targets} targets"
        )


def check_informative(X: torch.Tensor) -> None:
    """Raise if all samples are the same: nothing can be learned then, whatever the head."""
    if len(X) > 1 and bool((X[1:] == X[:1]).all()):
        raise InputError("the tokens are constant: every sample is the same, so there is nothing to learn from")


def one_hot(labels: NDArray[np.int64], n_classes: int) -> torch.Tensor:
    """Targets ``(n, 1, c)`` of class indices."""
    return torch.nn.functional.one_hot(torch.as_tensor(labels), n_classes).double().unsqueeze(1)


def pick_device(device: str) -> torch.device:
    """``"auto"``: CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return chosen
