"""A token store: a folder of shards, read by memory map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import FileFormatError, InputError, choose
from convexhead.tokens.reduce import Reduction
from convexhead.tokens.store.files import sha256_file
from convexhead.tokens.store.manifest import FORMAT, VERSION, Manifest
from convexhead.tokens.store.shards import ShardFile, damaged, shard_problem
from convexhead.tokens.store.view import FloatArray, SplitView


class TokenStore:
    """A complete folder of tokens on disk.

    ``store["train"]`` is a `SplitView`. A store with a single split also answers as that split does
    (``shape``, ``labels``, slices, ...); of several splits one must be named.
    """

    ndim = 3
    dtype = np.dtype(np.float32)

    def __init__(self, folder: Path, manifest: Manifest, reduction: Reduction) -> None:
        self.path = folder
        self.manifest = manifest
        self.reduction = reduction
        self.splits = tuple(manifest.splits)
        self.class_names = list(manifest.class_names)
        self.grid = manifest.grid
        self._views = {split: SplitView(folder, manifest, split, reduction) for split in self.splits}

    @overload
    @classmethod
    def open(cls, path: str | Path, split: None = None) -> TokenStore: ...
    @overload
    @classmethod
    def open(cls, path: str | Path, split: str) -> SplitView: ...
    @classmethod
    def open(cls, path: str | Path, split: str | None = None) -> TokenStore | SplitView:
        """Open a store, or one split of it. Of the shards only the sizes are looked at.

        A shard is read in full and compared with its checksum before its tokens are first used, by whatever reads
        them, and again only after it has changed.

        Raises
        ------
        FileFormatError
            Not a token store, not finished, of a newer format, or with missing, truncated or
            foreign files.
        InputError
            No such split.
        """
        folder = Path(path).expanduser()
        manifest = Manifest.load(folder)
        if not manifest.complete:
            raise FileFormatError(
                f"the token store {str(path)!r} is not finished: run the same import or extract again to resume"
            )
        for each in manifest.splits.values():
            for shard in each.shards:
                if problem := shard_problem(folder, shard):
                    raise FileFormatError(f"{problem}: run the same import or extract again to restore it")
        reduction = Reduction.load(folder / manifest.reduction)
        if sha256_file(folder / manifest.reduction) != manifest.reduction_sha256:
            raise FileFormatError(damaged(folder / manifest.reduction))
        store = cls(folder, manifest, reduction)
        return store if split is None else store[choose("split", split, store.splits)]

    def verify(self) -> None:
        """Read every shard and compare it with its checksums, whether or not that was done before.

        Raises
        ------
        FileFormatError
            Names the first shard that differs.
        """
        for split in self.manifest.splits.values():
            for shard in split.shards:
                layout = ShardFile(self.path / shard.file)
                if layout.sha256 != shard.sha256:
                    raise FileFormatError(damaged(layout.path))
                layout.verify()

    def info(self) -> dict[str, Any]:
        """Return what the store holds and how it was made, as JSON values."""
        manifest, config = self.manifest, self.manifest.config
        files = [shard for split in manifest.splits.values() for shard in split.shards]
        return {
            "path": str(self.path),
            "format": f"{FORMAT} {VERSION}",
            "source": manifest.source,
            "backbone": manifest.backbone,
            "layer": config["layer"],
            "class_channels": config.get("beside", {}).get("class", False),
            "preprocessing": config["preprocessing"],
            "dtype": config["dtype"],
            "masks": config.get("masks"),
            "images": {name: split.count for name, split in manifest.splits.items()},
            "broken": {name: split.broken for name, split in manifest.splits.items()},
            "found": manifest.found,
            "task": self._views[self.splits[0]].task,
            "classes": len(manifest.class_names),
            "grid": list(manifest.grid),
            "tokens": manifest.shape[0],
            "lengths": bool(config.get("lengths", False)),
            "prefix_tokens": manifest.n_prefix,
            "stored_channels": manifest.shape[1],
            "channels": self.reduction.channels,
            "channel_pool": config["channels"],
            "token_pool": config["token_pool"],
            "reduction": self.reduction.options,
            "reduction_sha256": manifest.reduction_sha256,
            "shards": len(files),
            "bytes": sum(shard.bytes for shard in files),
            "config_hash": manifest.config_hash,
        }

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}: {view.shape}" for name, view in self._views.items())
        return f"TokenStore({str(self.path)!r}, {counts})"

    @overload
    def __getitem__(self, key: str) -> SplitView: ...
    @overload
    def __getitem__(self, key: int | slice | Sequence[int] | NDArray[Any]) -> FloatArray: ...
    def __getitem__(self, key: Any) -> SplitView | FloatArray:
        if isinstance(key, str):
            return self._views[choose("split", key, self.splits)]
        return self._only[key]

    def __len__(self) -> int:
        return len(self._only)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self._only.__array__(dtype, copy)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._only.shape

    @property
    def labels(self) -> NDArray[np.int64]:
        return self._only.labels

    @property
    def task(self) -> str:
        return self._only.task

    @property
    def targets(self) -> NDArray[Any]:
        return self._only.targets

    @property
    def files(self) -> list[str]:
        return self._only.files

    def read(self) -> FloatArray:
        return self._only.read()

    def chunks(self, size: int | None = None) -> Iterator[FloatArray]:
        return self._only.chunks(size)

    def raw(self, start: int, stop: int) -> NDArray[Any]:
        return self._only.raw(start, stop)

    @property
    def _only(self) -> SplitView:
        if len(self.splits) > 1:
            raise InputError(
                f"the token store {str(self.path)!r} has the splits {', '.join(self.splits)}: "
                f"choose one, for example store[{self.splits[0]!r}]"
            )
        return self._views[self.splits[0]]
