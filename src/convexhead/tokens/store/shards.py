"""Shards: safetensors files that say of themselves what they hold.

A shard has the arrays ``tokens (n, s, d)``, ``labels (n,)`` int64 and, where the backbone has class or
register tokens, ``prefix (n, n_prefix, d)``. Of images with masks it has no labels but, in float32, ``targets
(n, s, c)`` and ``weights (n, s)``: see `convexhead.tokens.geometry.patch_targets`. Of images with several classes, or
with numbers, it has ``targets (n, c)`` in float64. Where images have different numbers of tokens, ``s`` is the largest,
``lengths (n,)`` int64 are these numbers, and tokens behind them are zeros.

Its metadata has one JSON entry: the hash of the configuration it was made with, the SHA-256 of its arrays, its file
names and those of the broken images it leaves out. A shard therefore needs no other record to be found again after a
crash: it is there, whole, or it is not.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from convexhead.errors import FileFormatError
from convexhead.tokens.store import verified

# numpy has no bfloat16: its bits are read as uint16 and widened by `to_float`.
_TYPES = {"F16": np.float16, "F32": np.float32, "BF16": np.uint16, "I64": np.int64, "F64": np.float64}
_KEY = "convexhead"
BLOCK = 1 << 20
"""Bytes that are hashed at a time. Chosen by hand."""


@dataclass(frozen=True)
class Shard:
    """What a manifest knows of a shard.

    Attributes
    ----------
    file
        Its name.
    rows
        The range of the split's rows that it holds.
    bytes
        Size of the file.
    sha256
        Hash of the file's header, which itself holds the hash of the arrays.
    broken
        Names of the images that could not be read.
    """

    file: str
    rows: tuple[int, int]
    bytes: int
    sha256: str
    broken: tuple[str, ...] = ()


def encode_shard(arrays: dict[str, Tensor], config_hash: str, files: list[str], broken: list[str]) -> bytes:
    """Return the content of a shard's file. Equal arguments give equal bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        if arrays[name].numel():  # the memory of none cannot be viewed as bytes
            digest.update(arrays[name].reshape(-1).view(torch.uint8).numpy().data)
    about = {"config": config_hash, "sha256": digest.hexdigest(), "files": files, "broken": broken}
    # One entry only: safetensors does not keep the order of several.
    return safetensors.torch.save(arrays, metadata={_KEY: json.dumps(about, sort_keys=True)})


class ShardFile:
    """The layout of a shard on disk; arrays are mapped into memory only while rows are taken out of them.

    Raises
    ------
    FileFormatError
        The file is missing, cut short, or not a shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._verified: verified.Stamp | None = None
        about = self._read_header()
        try:
            self.config_hash = str(about["config"])
            self.content_sha256 = str(about["sha256"])
            self.broken = tuple(about["broken"])
            self.count = int(self._places["tokens"][1][0])
        except (KeyError, TypeError, IndexError) as error:
            raise FileFormatError(f"{str(path)!r} is not a shard of tokens: it lacks {error}") from error

    def _read_header(self) -> dict[str, Any]:
        try:
            with open(self.path, "rb") as file:
                start = file.read(8)
                (length,) = struct.unpack("<Q", start)
                self.bytes = self.path.stat().st_size
                text = file.read(min(length, self.bytes))
            header: dict[str, Any] = json.loads(text)
            about: dict[str, Any] = json.loads(header.pop("__metadata__")[_KEY])
            base = 8 + length
            self._places = {
                name: (
                    np.dtype(_TYPES[entry["dtype"]]),
                    tuple(entry["shape"]),
                    base + entry["data_offsets"][0],
                )
                for name, entry in header.items()
            }
            expected = base + max(entry["data_offsets"][1] for entry in header.values())
        except (OSError, ValueError, KeyError, TypeError, struct.error, MemoryError, AttributeError) as error:
            raise FileFormatError(f"{str(self.path)!r} is not a shard of tokens: {error}") from error
        if self.bytes != expected:
            raise FileFormatError(f"the shard {str(self.path)!r} has {self.bytes} bytes instead of {expected}")
        self.sha256 = hashlib.sha256(start + text).hexdigest()
        return about

    @property
    def files(self) -> list[str]:
        """One name an image; read anew each time, so that layouts stay small."""
        before = self.sha256
        names = list(self._read_header()["files"])
        if self.sha256 != before:
            raise FileFormatError(damaged(self.path))
        return names

    def map(self, name: str) -> NDArray[Any]:
        """Map an array into memory, read-only, in its stored type (bfloat16 as uint16).

        The map lives as long as the result: pages that were read are let go with it, so that reading much
        does not fill the memory. Before tokens are read, the shard is verified, unless that was done since it last
        changed. Labels alone are not worth reading a whole shard for; they are verified with their tokens.
        """
        if name != "labels":
            self._verify_once()
        dtype, shape, offset = self._places[name]
        if 0 in shape:
            return np.empty(shape, dtype)
        try:
            return np.asarray(np.memmap(self.path, dtype, "r", offset, shape))
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{str(self.path)!r} is not the shard that it was: {error}") from error

    def _verify_once(self) -> None:
        seen = self._stamp()
        if seen == self._verified:
            return
        # What is noted is the hash of the header, which holds that of the arrays.
        if not verified.is_noted(self.path, seen, self.sha256):
            self.verify()
            return
        self._verified = seen

    def verify(self) -> None:
        """Compare the whole file with the hashes of its header and, in that, of its arrays.

        Raises
        ------
        FileFormatError
            They differ.
        """
        seen, header = self._stamp(), self.sha256
        self._read_header()
        if self.sha256 != header or self._content() != self.content_sha256 or self._stamp() != seen:
            self.sha256 = header
            raise FileFormatError(damaged(self.path))
        verified.note(self.path, seen, header)
        self._verified = seen

    def _stamp(self) -> verified.Stamp:
        try:
            return verified.stamp(self.path)
        except OSError as error:
            raise FileFormatError(f"{str(self.path)!r} is not the shard that it was: {error}") from error

    def _content(self) -> str:
        """Hash the arrays, a block at a time: a map of them would count as memory of the process."""
        digest = hashlib.sha256()
        try:
            with open(self.path, "rb") as file:
                for name in sorted(self._places):
                    dtype, shape, offset = self._places[name]
                    file.seek(offset)
                    left = dtype.itemsize * math.prod(shape)
                    while block := file.read(min(left, BLOCK)):
                        digest.update(block)
                        left -= len(block)
        except OSError as error:
            raise FileFormatError(f"{str(self.path)!r} cannot be read: {error}") from error
        return digest.hexdigest()

    def record(self, first_row: int) -> Shard:
        """Return what a manifest lists if the shard's rows begin at ``first_row``."""
        rows = (first_row, first_row + self.count)
        return Shard(self.path.name, rows, self.bytes, self.sha256, self.broken)


def damaged(path: Path) -> str:
    """Return the message for a file whose checksum differs."""
    what_to_do = "delete it and run the same import or extract again to restore it"
    return f"{str(path)!r} has changed since it was written: {what_to_do}"


def shard_problem(folder: Path, shard: Shard) -> str | None:
    """Say what is wrong with a shard as far as its size tells, or return None."""
    path = folder / shard.file
    if not path.is_file():
        return f"the shard {str(path)!r} is missing"
    if (size := path.stat().st_size) != shard.bytes:
        return f"the shard {str(path)!r} has {size} bytes instead of {shard.bytes}"
    return None


def to_float(values: NDArray[Any]) -> NDArray[Any]:
    """Widen the bits of bfloat16 to float32; other types are returned as they are."""
    if values.dtype != np.uint16:
        return values
    widened: NDArray[Any] = (values.astype(np.uint32) << 16).view(np.float32)
    return widened
