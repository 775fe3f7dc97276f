"""One extraction: from a source and a backbone to the shards of a store."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens.backbones import Backbone, TokenBatch
from convexhead.tokens.manifest import MANIFEST, Manifest, Shard, Split, StoreWriteError, write_atomic
from convexhead.tokens.parallel import map_on_cores
from convexhead.tokens.reduce import pool_channels, pool_grid
from convexhead.tokens.sources import BrokenImageError, ImageSource
from convexhead.tokens.store import shard_problem

Progress = Callable[[str, int, int], None]
"""Called as ``progress(split, images_done, images_in_split)``."""


class _Extracted(NamedTuple):
    """A batch in the stored type: ``tokens (k, s, d)`` and ``prefix (k, p, d)`` of the images ``rows``."""

    rows: list[int]
    tokens: NDArray[Any]
    prefix: NDArray[Any]


@dataclass
class ExtractionJob:
    """What `extract` was asked for, except for the fitted reduction; see there for the arguments."""

    source: ImageSource
    backbone: Backbone
    out: Path
    device: torch.device
    channels: int | None
    token_pool: tuple[int, int] | None
    dtype: str
    batch_size: int
    shard_size: int
    skip_broken: bool

    def __post_init__(self) -> None:
        self._gpu = contextlib.nullcontext() if self.device.type == "cpu" else threading.Lock()

    def config(self) -> dict[str, Any]:
        """Return what determines the stored numbers, as JSON values."""
        return {
            # A weights file may move: its content is in `weights`.
            "backbone": self.backbone.spec.partition("@")[0],
            "weights": self.backbone.weights_hash,
            "layer": self.backbone.layer,
            "preprocessing": self.backbone.preprocessing,
            "source": self.source.fingerprint(),
            "channels": self.channels,
            "token_pool": list(self.token_pool) if self.token_pool else None,
            "dtype": self.dtype,
            "shard_size": self.shard_size,
        }

    def manifest(self) -> Manifest:
        """Return the manifest to work on: that of the store in ``out``, less lost shards, or a new one.

        Raises:
            FileFormatError: ``out`` holds something else or was made with another configuration.
            StoreWriteError: ``out`` cannot be written.
        """
        config = self.config()
        if not (self.out / MANIFEST).exists():
            return self._new_manifest(config)
        manifest = Manifest.load(self.out)
        before = manifest.config
        changes = [
            f"{key} was {before.get(key)!r}, now {config[key]!r}"
            for key in config
            if config[key] != before.get(key)
        ]
        if changes:
            raise FileFormatError(
                f"{str(self.out)!r} holds the tokens of another run ({'; '.join(changes)}): "
                "choose another folder, or delete this one"
            )
        for split in manifest.splits.values():
            sound = [shard for shard in split.shards if shard_problem(self.out, shard) is None]
            if len(sound) < len(split.shards):
                split.shards, manifest.complete = sound, False
        return manifest

    def _new_manifest(self, config: dict[str, Any]) -> Manifest:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            others = [path.name for path in self.out.iterdir() if path.name != MANIFEST + ".tmp"]
        except FileExistsError as error:
            raise FileFormatError(f"{str(self.out)!r} is a file: choose a folder for the tokens") from error
        except OSError as error:
            raise StoreWriteError(f"cannot make the folder {str(self.out)!r}: {error.strerror}") from error
        if others:
            raise FileFormatError(
                f"{str(self.out)!r} holds {others[0]!r} but no tokens: choose a new or an empty folder"
            )
        # One image tells the shapes, and shows what is wrong before anything is written.
        batch = self._forward([self._first_image()])
        manifest = Manifest(
            config=config,
            backbone=self.backbone.spec,
            source=self.source.spec,
            shape=(batch.tokens.shape[1], batch.tokens.shape[2]),
            grid=batch.grid,
            n_prefix=batch.prefix.shape[1],
            class_names=self.source.class_names,
            splits={split: Split(f"{split}-files.json") for split in self.source.splits},
        )
        manifest.save(self.out)
        return manifest

    def _first_image(self) -> Tensor:
        for index in range(len(self.source.labels("train"))):
            image = self._prepare("train", index)
            if image is not None:
                return image
        raise InputError(f"no train image of {self.source.spec!r} can be read")

    def _prepare(self, split: str, index: int) -> Tensor | None:
        """Load and resize one image; None for a broken one where those are skipped."""
        try:
            return self.backbone.prepare(self.source.load(split, index))
        except BrokenImageError:
            if not self.skip_broken:
                raise
            return None

    @torch.inference_mode()
    def _forward(self, images: list[Tensor]) -> TokenBatch:
        """Run the backbone and the reductions that are free of data."""
        # Threads would only make a GPU hold several batches at a time.
        with self._gpu:
            tokens, prefix, grid = self.backbone(torch.stack(images).to(self.device))
        if self.token_pool is not None:
            tokens, grid = pool_grid(tokens, grid, self.token_pool), self.token_pool
        if self.channels is not None:
            tokens = pool_channels(tokens, self.channels)
            prefix = pool_channels(prefix, self.channels) if prefix.shape[1] else tokens[:, :0]
        return TokenBatch(tokens, prefix, grid)

    def run(self, manifest: Manifest, progress: Progress | None) -> None:
        """Write the shards that the manifest lacks, then the file names.

        Raises:
            InputError: a broken image (unless they are skipped), images of unequal size, or tokens that do
                not fit the stored type.
            StoreWriteError: the disk is full or read-only; the shards written so far stay valid.
        """
        todo = [
            (split, range(n)[start : start + self.shard_size])
            for split, n in ((split, len(self.source.labels(split))) for split in self.source.splits)
            for start in range(0, n, self.shard_size)
            if start not in {shard.items[0] for shard in manifest.splits[split].shards}
        ]
        # Batches never reach into another shard: the same images then share a forward pass in every run, and
        # a resumed store equals an undisturbed one.
        batches = ((split, items) for split, shard in todo for items in self._batches(shard))
        with contextlib.closing(map_on_cores(lambda batch: self._extract(manifest, *batch), batches)) as done:
            for split, items in todo:
                shard = self._write_shard(manifest, split, items, done, progress)
                _insert(manifest.splits[split], shard)
                manifest.save(self.out)
        for name, entry in manifest.splits.items():
            broken = {file for shard in entry.shards for file in shard.broken}
            names = [file for file in self.source.files(name) if file not in broken]
            if not names:
                raise InputError(f"no {name} image of {self.source.spec!r} can be read")
            write_atomic(self.out / entry.files, json.dumps(names, indent=0).encode())

    def _batches(self, shard: range) -> list[range]:
        return [shard[start : start + self.batch_size] for start in range(0, len(shard), self.batch_size)]

    def _extract(self, manifest: Manifest, split: str, items: range) -> _Extracted:
        """Load a batch of images and return its tokens in the stored type."""
        loaded = [(index, self._prepare(split, index)) for index in items]
        rows = [index for index, image in loaded if image is not None]
        images = [image for _, image in loaded if image is not None]
        s, d = manifest.shape
        if not images:
            return _Extracted(rows, *(np.empty((0, k, d), self.dtype) for k in (s, manifest.n_prefix)))
        last = self.source.files(split)[rows[-1]]
        unequal = InputError(f"the images before {last!r} differ in size: give image_size")
        if len({image.shape for image in images}) > 1:
            raise unequal
        batch = self._forward(images)
        if batch.grid != manifest.grid:
            raise unequal
        return _Extracted(rows, self._stored(batch.tokens, last), self._stored(batch.prefix, last))

    def _write_shard(
        self,
        manifest: Manifest,
        split: str,
        items: range,
        done: Iterator[_Extracted],
        progress: Progress | None,
    ) -> Shard:
        files, labels = self.source.files(split), self.source.labels(split)
        parts: list[_Extracted] = []
        for batch in self._batches(items):
            parts.append(next(done))
            if progress is not None:
                progress(split, batch.stop, len(files))
        rows = [index for part in parts for index in part.rows]
        arrays = {"tokens": np.concatenate([part.tokens for part in parts]), "labels": labels[rows]}
        if manifest.n_prefix:
            arrays["prefix"] = np.concatenate([part.prefix for part in parts])
        content = safetensors.numpy.save(arrays)
        file = f"{split}-{items.start // self.shard_size:05d}.safetensors"
        write_atomic(self.out / file, content)
        return Shard(
            file=file,
            items=(items.start, items.stop),
            rows=(0, len(rows)),
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            broken=tuple(files[index] for index in sorted(set(items) - set(rows))),
        )

    def _stored(self, values: Tensor, file: str) -> NDArray[Any]:
        """Convert to the stored type, refusing what it cannot hold."""
        stored: NDArray[Any] = values.to(getattr(torch, self.dtype)).cpu().numpy()
        if not np.isfinite(stored).all():
            if values.isfinite().all():
                raise InputError(f"tokens near {file!r} are too large for {self.dtype}: use dtype='float32'")
            raise InputError(
                f"the backbone {self.backbone.spec!r} gives NaN or infinite tokens near {file!r}"
            )
        return stored


def _insert(split: Split, shard: Shard) -> None:
    """Put a shard in its place and number the rows anew."""
    shards = sorted([*split.shards, shard], key=lambda each: each.items)
    split.shards, stop = [], 0
    for each in shards:
        start, stop = stop, stop + each.rows[1] - each.rows[0]
        split.shards.append(replace(each, rows=(start, stop)))
