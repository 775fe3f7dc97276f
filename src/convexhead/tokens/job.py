"""The shards of one extraction: which there are, which are missing, and writing those."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens.batches import BatchExtractor, Extracted
from convexhead.tokens.parallel import map_on_cores
from convexhead.tokens.progress import ProgressMeter
from convexhead.tokens.sources.base import MaskSource, TargetSource
from convexhead.tokens.store.census import take_census
from convexhead.tokens.store.files import LOCK, write_atomic
from convexhead.tokens.store.manifest import MANIFEST, REDUCTION, Manifest, Split, digest_json
from convexhead.tokens.store.origin import TokenOrigin
from convexhead.tokens.store.shards import ShardFile, encode_shard


class Task(NamedTuple):
    """One shard: its number within the split, and the range of the source's images."""

    split: str
    number: int
    items: range

    @property
    def file(self) -> str:
        return f"{self.split}-{self.number:05d}.safetensors"


@dataclass
class ExtractionJob:
    """What is to be extracted, where to, in which portions, and what the tokens must be comparable with."""

    extractor: BatchExtractor
    out: Path
    batch_size: int
    shard_size: int
    like: TokenOrigin | None = None

    def config(self) -> dict[str, Any]:
        """Return what determines the stored bytes, as JSON values."""
        return {**self.extractor.config(), "shard_size": self.shard_size}

    def check_target(self, config: dict[str, Any]) -> None:
        """Refuse a folder that holds anything but a store, before anything is written into it.

        Shards of the same configuration whose manifest was lost are welcome.

        Raises
        ------
        FileFormatError
            ``out`` is a file, or holds other things.
        """
        if self.out.is_file():
            raise FileFormatError(f"{str(self.out)!r} is a file: choose a folder for the tokens")
        if not self.out.is_dir() or (self.out / MANIFEST).exists():
            return
        for path in sorted(self.out.iterdir()):
            if path.name in (LOCK, REDUCTION) or path.suffix == ".tmp":
                continue
            with contextlib.suppress(FileFormatError):
                if ShardFile(path).config_hash == digest_json(config):
                    continue
            raise FileFormatError(
                f"{str(self.out)!r} holds {path.name!r} but no tokens: choose a new or an empty folder"
            )

    def manifest(self, config: dict[str, Any]) -> Manifest:
        """Return the manifest of the store in ``out``, begun if there is none.

        Raises
        ------
        FileFormatError
            ``out`` was made with another configuration.
        StoreWriteError
            ``out`` cannot be written.
        """
        if (self.out / MANIFEST).exists():
            manifest = Manifest.load(self.out)
            before = manifest.config
            changes = [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in config.items() if v != before.get(k)]
            if changes:
                raise FileFormatError(
                    f"{str(self.out)!r} holds the tokens of another run ({'; '.join(changes)}): "
                    "choose another folder, or delete this one"
                )
            if not manifest.found:  # it is as old as the backbones whose layout was not measured
                self._check_layout(manifest)
            return manifest
        # One image shows what is wrong before anything is written.
        batch = self.extractor.first()
        source = self.extractor.source
        manifest = Manifest(
            config=config,
            backbone=self.extractor.backbone.spec,
            source=source.spec,
            shape=(batch.tokens.shape[1], batch.tokens.shape[2]),
            grid=batch.grid,
            n_prefix=batch.prefix.shape[1],
            class_names=source.class_names,
            splits={split: Split() for split in source.splits},
            found=take_census(source),
        )
        if self.like is not None and (told := self.like.differences(manifest)):
            raise InputError(f"these would not be the same tokens: {'; '.join(told)}")
        manifest.save(self.out)
        return manifest

    def _check_layout(self, manifest: Manifest) -> None:
        """Refuse a store whose tokens were laid out otherwise, as of some backbones before layouts were measured.

        Raises
        ------
        FileFormatError
            Other prefix tokens, another grid or another number of channels.
        """
        tokens, prefix, grid = self.extractor.first()
        before = (manifest.grid, manifest.n_prefix, manifest.shape)
        now = (grid, prefix.shape[1], tuple(tokens.shape[1:]))
        if before != now:
            raise FileFormatError(
                f"{str(self.out)!r} holds tokens of this backbone that an earlier version put on the grid {before[0]} "
                f"with {before[1]} prefix tokens, shape {before[2]}; they are {now[0]}, {now[1]} and {now[2]}: "
                "extract into another folder, or delete this one"
            )

    def tasks(self) -> list[Task]:
        """Return all shards of the finished store, in order."""
        source = self.extractor.source
        return [
            Task(split, number, range(n)[start : start + self.shard_size])
            for split, n in ((split, len(source.files(split))) for split in source.splits)
            for number, start in enumerate(range(0, n, self.shard_size))
        ]

    def missing(self, manifest: Manifest) -> list[Task]:
        """Return the shards that are not in the folder as this configuration wrote them."""
        listed = {shard.file: shard.sha256 for split in manifest.splits.values() for shard in split.shards}
        missing = []
        for task in self.tasks():
            try:
                shard = ShardFile(self.out / task.file)
            except FileFormatError:
                missing.append(task)
                continue
            if listed.get(task.file, shard.sha256) != shard.sha256 or shard.config_hash != manifest.config_hash:
                missing.append(task)
        return missing

    def write(self, tasks: list[Task], manifest: Manifest, meter: ProgressMeter) -> None:
        """Write shards, one file after the other, while all cores extract.

        Raises
        ------
        InputError
            A broken image (unless they are skipped), images of unequal size, or tokens that do
            not fit the stored type.
        StoreWriteError
            The disk is full or read-only; the shards written so far stay valid.
        """
        # Batches never reach into another shard: the same images then share a forward pass in every run, and
        # a resumed store equals an undisturbed one.
        batches = ((task.split, items) for task in tasks for items in self._batches(task))
        extract = self.extractor.extract
        with contextlib.closing(map_on_cores(lambda batch: extract(*batch, manifest.grid), batches)) as done:
            for task in tasks:
                write_atomic(self.out / task.file, self._shard(task, manifest, done, meter))

    def _batches(self, task: Task) -> list[range]:
        starts = range(0, len(task.items), self.batch_size)
        return [task.items[start : start + self.batch_size] for start in starts]

    def _shard(self, task: Task, manifest: Manifest, done: Iterator[Extracted], meter: ProgressMeter) -> bytes:
        """Collect the batches of a shard and return the content of its file."""
        (s, d), dtype = manifest.shape, getattr(torch, self.extractor.dtype)
        tokens = torch.empty(len(task.items), s, d, dtype=dtype)
        prefix = torch.empty(len(task.items), manifest.n_prefix, d, dtype=dtype)
        rows: list[int] = []
        parts: list[Extracted] = []
        for items in self._batches(task):
            part = next(done)
            parts.append(part._replace(tokens=torch.empty(0), prefix=torch.empty(0)))
            if part.rows:
                tokens[len(rows) : len(rows) + len(part.rows)] = part.tokens
                prefix[len(rows) : len(rows) + len(part.rows)] = part.prefix
            rows += part.rows
            meter.add(task.split, len(items))
        source = self.extractor.source
        files = source.files(task.split)
        arrays = {"tokens": tokens[: len(rows)]}
        if isinstance(source, MaskSource):
            s, c = manifest.shape[0], len(source.class_names)
            arrays["targets"] = torch.cat([torch.empty(0, s, c), *(p.targets for p in parts if p.targets is not None)])
            arrays["weights"] = torch.cat([torch.empty(0, s), *(p.weights for p in parts if p.weights is not None)])
        elif isinstance(source, TargetSource):
            arrays["targets"] = torch.from_numpy(source.targets(task.split)[rows])
        else:
            arrays["labels"] = torch.from_numpy(source.labels(task.split)[rows])
        if self.extractor.ragged:
            arrays["lengths"] = torch.cat([torch.empty(0).long(), *(p.lengths for p in parts if p.lengths is not None)])
        if self.extractor.keeps_aspect:
            none = torch.empty(0, 2).long()
            arrays["grids"] = torch.cat([none, *(p.grids for p in parts if p.grids is not None)])
        if manifest.n_prefix:
            arrays["prefix"] = prefix[: len(rows)]
        broken = [files[index] for index in sorted(set(task.items) - set(rows))]
        return encode_shard(arrays, manifest.config_hash, [files[index] for index in rows], broken)

    def list_shards(self, manifest: Manifest) -> None:
        """Enter the shards in the folder, which must all be there, into the manifest.

        Raises
        ------
        InputError
            A source that changed meanwhile, or a split without a single image that can be read.
        FileFormatError
            Shards that do not account for every image of the source.
        """
        source = self.extractor.source
        changed = getattr(source, "changed", None)
        if changed is not None and (change := changed()):
            raise InputError(
                f"{source.spec!r} changed while its images were read: {change}. Extract into a new folder when "
                "nothing changes it any more"
            )
        manifest.splits = {split: Split() for split in manifest.splits}
        for task in self.tasks():
            split = manifest.splits[task.split]
            split.shards.append(ShardFile(self.out / task.file).record(split.count))
        for name, split in manifest.splits.items():
            if not split.count:
                raise InputError(f"no {name} image of {source.spec!r} can be read")
            found = len(source.files(name))
            if split.count + len(split.broken) != found:
                raise FileFormatError(
                    f"the {name} shards in {str(self.out)!r} account for {split.count + len(split.broken)} of {found} "
                    "images: delete the folder and extract again"
                )
