"""Columns of a parquet file as arrays."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from convexhead.errors import FileFormatError
from convexhead.tokens.arrays.rows import Rows, in_a_line, mapped, unpack

BATCH = 1024
"""Rows that are unpacked at a time. Chosen by hand."""
BUFFER = 1 << 20
"""Bytes of a column that are read at a time: a file may have all of its rows in one group. Chosen by hand."""


def open_columns(path: Path) -> dict[str, Rows]:
    """Return the columns of a file: numbers and texts ``(n,)``, lists ``(n, ...)``, numbered columns ``(n, d)``.

    Raises
    ------
    FileFormatError
        Not a parquet file, or rows without a value, or lists of unequal length.
    """
    try:
        file = pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise FileFormatError(f"{str(path)!r} is no whole parquet file: {in_a_line(error)}") from error
    schema = file.schema_arrow
    numbered: dict[str, dict[int, str]] = defaultdict(dict)
    found = {}
    for field in schema:
        number = re.fullmatch(r"(.*?)[_.-]?(\d+)", field.name)
        if number and pyarrow.types.is_floating(field.type):
            numbered[number[1]][int(number[2])] = field.name
        elif _depth(field.type):
            found[field.name] = _lists(path, file, [field.name], field.name)
        else:
            found[field.name] = _plain(path, file, field.name)
    for name, columns in numbered.items():
        key = name or "tokens"
        if len(columns) == max(columns) - min(columns) + 1 and key not in found:
            found[key] = _lists(path, file, [columns[i] for i in sorted(columns)], key)
        else:  # no array: columns that end in numbers all the same
            found |= {column: _plain(path, file, column) for column in columns.values()}
    return found


def _depth(kind: Any) -> int:
    """Return how many lists are around a number."""
    depth = 0
    types = pyarrow.types
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth


def _plain(path: Path, file: Any, column: str) -> Rows:
    name, n = f"{str(path)!r}: {column}", file.metadata.num_rows

    def read(start: int, stop: int) -> NDArray[Any]:
        values = np.array(file.read(columns=[column]).column(0).to_pylist(), object)[start:stop]
        # Numbers become what numpy has for them; None and texts stay objects, which the reader of labels judges.
        return np.array(values.tolist()) if not any(v is None for v in values) else values

    return Rows(name, (n,), "object", read)


def _lists(path: Path, file: Any, columns: list[str], key: str) -> Rows:
    name = f"{str(path)!r}: {key}"
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as its rows
    shape: tuple[int, ...] | None = None
    dtype: Any = None
    row = 0

    def blocks() -> Any:
        nonlocal shape, dtype, row
        for batch in file.iter_batches(BATCH, columns=columns):
            parts = [_dense(batch.column(batch.schema.get_field_index(c)), name, row) for c in columns]
            block = parts[0] if len(columns) == 1 and parts[0].ndim > 1 else np.stack(parts, 1)
            if shape is None:
                shape, dtype = block.shape[1:], block.dtype
            if block.shape[1:] != shape:
                raise FileFormatError(f"{name} has rows of shape {block.shape[1:]} from row {row} on, before {shape}")
            row += len(block)
            yield np.ascontiguousarray(block).data

    unpack(blocks(), unpacked)
    return mapped(unpacked, dtype or np.float32, 0, (row, *(shape or ())), name)


def _dense(array: Any, name: str, first: int) -> NDArray[Any]:
    """Return a batch of a column as ``(k, ...)``."""
    if array.null_count:
        raise FileFormatError(f"{name} has no value in row {first + array.is_null().to_pylist().index(True)}")
    sides: list[int] = []
    while _depth(array.type):
        lengths = np.asarray(array.value_lengths()) if not pyarrow.types.is_fixed_size_list(array.type) else None
        size = array.type.list_size if lengths is None else int(lengths[0])
        if lengths is not None and (wrong := np.flatnonzero(lengths != size)).size:
            row = first + int(wrong[0]) // int(np.prod(sides[1:] or [1]))
            raise FileFormatError(f"{name} has a list of {lengths[wrong[0]]} values in row {row}, before {size}")
        sides = [*(sides or [len(array)]), size]
        array = array.flatten()
        if array.null_count:
            missing = array.is_null().to_pylist().index(True)
            raise FileFormatError(f"{name} lacks a value in row {first + missing // int(np.prod(sides[1:]))}")
    return array.to_numpy(zero_copy_only=False).reshape(sides or [len(array)])
