"""Rows of an array that lies in a file or in memory: only those that are asked for are read."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens.store.files import StoreWriteError

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Rows:
    """An array on disk or in memory.

    Attributes
    ----------
    name
        Its file and key, for messages.
    shape
        ``(n, ...)``.
    dtype
        As numpy and torch call it: ``"float16"``, ``"bfloat16"``, ``"int64"``, ``"str320"``, ...
    slice_
        Returns rows ``start .. stop`` as numpy array or tensor. Safe to call from several threads.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    slice_: Callable[[int, int], Any]

    def __len__(self) -> int:
        return self.shape[0]

    def tensor(self, start: int, stop: int) -> torch.Tensor:
        """Return some rows of numbers, in memory of their own."""
        part = self._read(start, stop)
        return part.clone() if isinstance(part, torch.Tensor) else torch.from_numpy(_native(part))

    def whole(self) -> Array:
        """Return all rows as a numpy array, for labels and names."""
        part = self._read(0, len(self))
        return part.numpy() if isinstance(part, torch.Tensor) else np.asarray(part)

    def _read(self, start: int, stop: int) -> Any:
        try:
            return self.slice_(start, stop)
        except Exception as error:  # whatever damaged bytes lead the readers to
            raise FileFormatError(f"{self.name} cannot be read: {in_a_line(error)}") from error


def rows_of(array: Any, name: str) -> Rows:
    """Return the rows of an array or a tensor in memory, or of a memory map.

    Raises
    ------
    InputError
        Something else.
    """
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        dtype = str(array.dtype).removeprefix("torch.")
    else:
        array = array if isinstance(array, np.ndarray) else np.asarray(array)
        dtype = array.dtype.name
    if array.ndim == 0:
        raise InputError(f"{name} is a single value, not an array")
    return Rows(name, tuple(array.shape), dtype, lambda start, stop: array[start:stop])


def mapped(file: Any, dtype: Any, offset: int, shape: tuple[int, ...], name: str) -> Rows:
    """Return the rows of an array that lies row by row in a file, or in an open one.

    Each slice is a map of its own: pages that were read are let go with it, so that reading much does not fill the
    memory.
    """
    dtype = np.dtype(dtype)
    size = dtype.itemsize * math.prod(shape[1:])

    def read(start: int, stop: int) -> Array:
        n = max(0, min(stop, shape[0]) - start)
        if n * size == 0:
            return np.empty((n, *shape[1:]), dtype)
        return np.memmap(file, dtype, "r", offset + start * size, (n, *shape[1:]))

    return Rows(name, shape, dtype.name, read)


def unpack(blocks: Iterable[Any], file: Any) -> None:
    """Write blocks of bytes into a temporary ``file``.

    Raises
    ------
    StoreWriteError
        It has no room for them.
    """
    try:
        for block in blocks:
            file.write(block)
        file.flush()
    except OSError as error:
        raise StoreWriteError(
            f"cannot unpack into the temporary folder {tempfile.gettempdir()!r}: {error.strerror}; set TMPDIR to a "
            "larger disk"
        ) from error


def _native(array: Any) -> Array:
    """Return an array of this machine's byte order, in contiguous memory of its own: torch takes no other."""
    array = np.array(array, order="C")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def in_a_line(error: Exception) -> str:
    """Return what an error of a file says, without its lines."""
    with suppress(AttributeError):
        if error.strerror:  # type: ignore[attr-defined]
            return str(error.strerror)  # type: ignore[attr-defined]
    return " ".join(str(error).split())[:300] or type(error).__name__
