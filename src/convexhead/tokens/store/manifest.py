"""The manifest of a token store.

A store is a folder::

    manifest.json              what the tokens are, and which shards there are
    train-00000.safetensors    one shard, see `convexhead.tokens.store.shards`
    reduction.safetensors      the fitted map that readers apply
    writer.lock                only while somebody writes

The manifest is written when an extraction begins and again when it is done. In between, the shards that lie
in the folder are the only record of progress. A store may be read once ``complete`` is true.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convexhead.errors import FileFormatError
from convexhead.tokens.store.files import write_atomic
from convexhead.tokens.store.shards import Shard, damaged

FORMAT = "convexhead-tokens"
VERSION = 1
MANIFEST = "manifest.json"
REDUCTION = "reduction.safetensors"
DTYPES = ("float16", "bfloat16", "float32")


@dataclass
class Split:
    """The shards of one split, in order."""

    shards: list[Shard] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of images."""
        return self.shards[-1].rows[1] if self.shards else 0

    @property
    def broken(self) -> list[str]:
        """Names of the images that could not be read and were left out."""
        return [name for shard in self.shards for name in shard.broken]


@dataclass
class Manifest:
    """Everything about a store that is not an array.

    ``config`` holds what determines the stored numbers (weights, preprocessing, content of the source, ...):
    a run into the same folder must agree with it. ``backbone`` and ``source`` are the specifications as the
    user gave them. ``found`` is the census of the source, see `convexhead.tokens.store.census`; stores of earlier
    versions have none.
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
    reduction_sha256: str = ""
    complete: bool = False
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def config_hash(self) -> str:
        """SHA-256 of ``config``: equal for two stores if and only if they hold the same tokens."""
        return digest_json(self.config)

    def save(self, folder: Path) -> None:
        """Replace the manifest of ``folder``.

        Raises
        ------
        StoreWriteError
            The folder cannot be written.
        """
        document = {"format": FORMAT, "version": VERSION, "config_hash": self.config_hash, **asdict(self)}
        for name, split in self.splits.items():
            document["splits"][name]["count"] = split.count
        document["checksum"] = digest_json(document)
        write_atomic(folder / MANIFEST, json.dumps(document, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of ``folder``.

        Raises
        ------
        FileFormatError
            No store there, a foreign or damaged manifest, or a newer format version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            problem = "is not a token store (it has no manifest.json)" if folder.is_dir() else "does not exist"
            raise FileFormatError(f"{str(folder)!r} {problem}: make one with `convexhead extract`")
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{str(path)!r} is not readable JSON: {error}") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise FileFormatError(f"{str(folder)!r} is not a token store: its manifest.json belongs to something else")
        if (version := document.get("version")) != VERSION:
            raise FileFormatError(
                f"{str(folder)!r} has store format {version!r}, this convexhead reads {VERSION}: upgrade"
            )
        if document.pop("checksum", None) != digest_json(document):
            raise FileFormatError(damaged(path))
        try:
            return cls._parse(document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(f"{str(path)!r} has a missing or damaged entry: {error}") from error

    @classmethod
    def _parse(cls, document: dict[str, Any]) -> Manifest:
        entries = {k: v for k, v in document.items() if k not in ("format", "version", "config_hash")}
        splits = {}
        for name, split in entries.pop("splits").items():
            shards = [
                Shard(**{**shard, "rows": _pair(shard["rows"]), "broken": tuple(shard["broken"])})
                for shard in split["shards"]
            ]
            splits[name] = Split(shards)
        entries["shape"], entries["grid"] = _pair(entries["shape"]), _pair(entries["grid"])
        if entries["config"]["dtype"] not in DTYPES:
            raise ValueError(f"dtype {entries['config']['dtype']!r}")
        return cls(splits=splits, **entries)


def digest_json(document: dict[str, Any]) -> str:
    """Hash JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _pair(values: list[int]) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)
