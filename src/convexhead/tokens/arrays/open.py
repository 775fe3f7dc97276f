"""Opening arrays in files.

=====================  =========================================================================================
``.npy``               mapped into memory
``.npz``               members are mapped; compressed ones are unpacked into a temporary file first
``.safetensors``       slices
``.h5``, ``.hdf5``     slices; arrays in groups are named ``group/array``
``.parquet``           columns of numbers, texts or lists; ``a0, a1, ...`` are the array ``a``. Lists are unpacked
                       into a temporary file
=====================  =========================================================================================
"""

from __future__ import annotations

import json
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from convexhead.errors import ConvexHeadError, FileFormatError, InputError, require
from convexhead.tokens.arrays.rows import Rows, in_a_line, mapped, rows_of, unpack


def open_arrays(path: Path) -> dict[str, Rows]:
    """Return the arrays of a file by name; the only one of an ``.npy`` file has the file's.

    Raises
    ------
    InputError
        No such file, or none of these formats.
    FileFormatError
        Not what its extension says, cut short, or with pickled Python objects.
    MissingExtraError
        h5py or pyarrow is not installed.
    """
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{str(path)!r} is of no known format: {', '.join(READERS)} are read")
    try:
        return reader(path)
    except ConvexHeadError:
        raise
    except Exception as error:  # whatever damaged bytes lead the readers to
        raise FileFormatError(
            f"{str(path)!r} is no whole {path.suffix} file of plain arrays: {in_a_line(error)}"
        ) from error


def facts_of(path: Path) -> dict[str, Any]:
    """Return what stands beside the arrays of an HDF5 file or in a JSON file, as ``convexhead store export`` writes it.

    Raises
    ------
    FileFormatError
        No readable JSON.
    """
    try:
        if path.suffix.lower() in (".h5", ".hdf5"):
            with require("h5py", "stores").File(path, "r") as file:
                facts = json.loads(file.attrs["store"]) if "store" in file.attrs else dict(file.attrs)
        else:
            facts = json.loads(path.read_bytes())
    except ConvexHeadError:
        raise
    except Exception as error:  # whatever damaged bytes lead the readers to
        raise FileFormatError(f"{str(path)!r} has no readable JSON: {in_a_line(error)}") from error
    return facts if isinstance(facts, dict) else {}


# -- formats -----------------------------------------------------------------------------------------------------------
def _open_npy(path: Path) -> dict[str, Rows]:
    array, name = np.load(path, mmap_mode="r", allow_pickle=False), repr(str(path))
    if not isinstance(array, np.ndarray):
        raise FileFormatError(f"{name} holds several arrays: call it .npz")
    if isinstance(array, np.memmap) and array.flags.c_contiguous and array.ndim:
        return {path.stem: mapped(path, array.dtype, array.offset, array.shape, name)}
    return {path.stem: rows_of(array, name)}


def _open_npz(path: Path) -> dict[str, Rows]:
    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            key = member.filename.removesuffix(".npy")
            if key != member.filename and (rows := _member(archive, member, f"{str(path)!r}: {key}")):
                found[key] = rows
    return found


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> Rows | None:
    """Return the rows of an array in the archive; None for a single value."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds pickled Python objects, which may run code")
        if not shape:
            return None
        file: Any = archive.filename
        offset = stream.tell()
        if member.compress_type == zipfile.ZIP_STORED:
            offset += _begin(archive.filename, member)
        else:
            file, offset = tempfile.TemporaryFile(), 0  # noqa: SIM115 - lives as long as its rows
            unpack(iter(lambda: stream.read(1 << 22), b""), file)
    if fortran and 0 not in shape:
        return rows_of(np.memmap(file, dtype, "r", offset, shape, "F"), name)
    return mapped(file, dtype, offset, shape, name)


def _begin(file: Any, member: zipfile.ZipInfo) -> int:
    """Return the place in the archive at which the bytes of a member begin: behind its local header."""
    with open(file, "rb") as archive:
        archive.seek(member.header_offset)
        name, extra = struct.unpack("<26xHH", archive.read(30))
    return member.header_offset + 30 + int(name) + int(extra)


def _open_safetensors(path: Path) -> dict[str, Rows]:
    # Slices of torch know bfloat16, those of numpy do not.
    with safetensors.safe_open(path, framework="pt") as file:
        found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        types = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "I64": "int64"}

        def slices(key: str) -> Callable[[int, int], Any]:
            def read(start: int, stop: int) -> Any:
                with safetensors.safe_open(path, framework="pt") as again:
                    return again.get_slice(key)[start:stop]

            return read

        return {
            key: Rows(
                f"{str(path)!r}: {key}", tuple(s.get_shape()), types.get(s.get_dtype(), s.get_dtype()), slices(key)
            )
            for key, s in found.items()
            if s.get_shape()
        }


def _open_h5(path: Path) -> dict[str, Rows]:
    h5py = require("h5py", "stores")
    file, found = h5py.File(path, "r"), {}

    def visit(key: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape:
            text = h5py.check_string_dtype(item.dtype) is not None
            rows = item.asstr() if text else item
            found[key] = Rows(
                f"{str(path)!r}: {key}", item.shape, "str" if text else item.dtype.name, lambda i, j: rows[i:j]
            )

    file.visititems(visit)
    return found


def _open_parquet(path: Path) -> dict[str, Rows]:
    require("pyarrow", "stores")
    from convexhead.tokens.arrays.parquet import open_columns

    return open_columns(path)


READERS: dict[str, Callable[[Path], dict[str, Rows]]] = {
    ".npz": _open_npz,
    ".npy": _open_npy,
    ".h5": _open_h5,
    ".hdf5": _open_h5,
    ".safetensors": _open_safetensors,
    ".parquet": _open_parquet,
}
