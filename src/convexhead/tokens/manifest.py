"""The manifest of a token store, and writes that either happen or do not.

A store is a folder::

    manifest.json              what the tokens are, and which shards there are
    train-00000.safetensors    tokens (n, s, d), labels (n,) int64, prefix (n, n_prefix, d) if there are any
    train-files.json           one name an image
    reduction.safetensors      the fitted map that readers apply

The manifest is replaced after every shard and lists only shards that are on disk, so that a run that was
killed continues where it stopped. A store may be read once ``complete`` is true.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convexhead.errors import ConvexHeadError, FileFormatError

FORMAT = "convexhead-tokens"
VERSION = 1
MANIFEST = "manifest.json"
REDUCTION = "reduction.safetensors"


class StoreWriteError(ConvexHeadError, OSError):
    """A token store cannot be written: full disk, read-only folder, missing permission."""


@dataclass(frozen=True)
class Shard:
    """One file of tokens: the source's images ``items[0] .. items[1]``, without the broken ones among them.

    ``rows`` is the range that they take in the split.
    """

    file: str
    items: tuple[int, int]
    rows: tuple[int, int]
    bytes: int
    sha256: str
    broken: tuple[str, ...] = ()


@dataclass
class Split:
    """The shards of one split, in order."""

    files: str
    shards: list[Shard] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of images."""
        return self.shards[-1].rows[1] if self.shards else 0


@dataclass
class Manifest:
    """Everything about a store that is not an array.

    ``config`` holds what determines the stored numbers (weights, preprocessing, content of the source, ...):
    a run into the same folder must agree with it. ``backbone`` and ``source`` are the specifications as the
    user gave them.
    """

    config: dict[str, Any]
    backbone: str
    source: str
    shape: tuple[int, int]
    grid: tuple[int, int]
    n_prefix: int
    class_names: list[str]
    splits: dict[str, Split]
    reduction: str = REDUCTION
    complete: bool = False

    def save(self, folder: Path) -> None:
        """Replace the manifest of ``folder``.

        Raises:
            StoreWriteError: the folder cannot be written.
        """
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        for name, split in self.splits.items():
            document["splits"][name]["count"] = split.count
        write_atomic(folder / MANIFEST, json.dumps(document, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of ``folder``.

        Raises:
            FileFormatError: no store there, a foreign or damaged manifest, or a newer format version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            problem = (
                "is not a token store (it has no manifest.json)" if folder.is_dir() else "does not exist"
            )
            raise FileFormatError(f"{str(folder)!r} {problem}: make one with `convexhead extract`")
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{str(path)!r} is not readable JSON: {error}") from error
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise FileFormatError(
                f"{str(folder)!r} is not a token store: its manifest.json is something else's"
            )
        if (version := document.pop("version", None)) != VERSION:
            raise FileFormatError(
                f"{str(folder)!r} has store format {version!r}, this convexhead reads {VERSION}: upgrade"
            )
        try:
            return cls._parse(document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(f"{str(path)!r} lacks or garbles an entry: {error}") from error

    @classmethod
    def _parse(cls, document: dict[str, Any]) -> Manifest:
        splits = {}
        for name, split in document.pop("splits").items():
            shards = [
                Shard(
                    file=shard["file"],
                    items=_pair(shard["items"]),
                    rows=_pair(shard["rows"]),
                    bytes=int(shard["bytes"]),
                    sha256=str(shard["sha256"]),
                    broken=tuple(shard["broken"]),
                )
                for shard in split["shards"]
            ]
            splits[name] = Split(split["files"], shards)
        document["shape"], document["grid"] = _pair(document["shape"]), _pair(document["grid"])
        if document["config"]["dtype"] not in {"float16", "float32"}:
            raise ValueError(f"dtype {document['config']['dtype']!r}")
        return cls(splits=splits, **document)


def _pair(values: list[int]) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that at any moment it has its old content or all of its new content.

    Raises:
        StoreWriteError: it cannot be written; the old file, if any, is untouched.
    """
    # A fixed name: what a killed run leaves behind, the next run overwrites.
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise StoreWriteError(
            f"cannot write {str(path)!r}: {reason}; what was finished is kept, run the same again to resume"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system can open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
