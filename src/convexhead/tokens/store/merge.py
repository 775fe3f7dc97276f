"""Several stores of the same backbone and settings become one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens.store.census import join_censuses
from convexhead.tokens.store.files import make_folder, write_atomic, writer_lock
from convexhead.tokens.store.fit import Fit, store_reduction
from convexhead.tokens.store.manifest import Manifest, Split, digest_json
from convexhead.tokens.store.shards import ShardFile
from convexhead.tokens.store.store import TokenStore


def merge_stores(paths: Sequence[str | Path], out: str | Path) -> TokenStore:
    """Copy the shards of several stores into a new one and fit the first store's kind of reduction anew.

    The stores must agree in everything but the source of the images, whose splits are joined in the given
    order. File names are kept, so two of them may be equal. Every shard is verified on the way.

    Raises
    ------
    InputError
        Fewer than two stores, stores that do not go together, or the same images twice.
    FileFormatError
        A damaged store, or an ``out`` that is not an empty folder.
    StoreWriteError
        ``out`` cannot be written.
    """
    stores = [TokenStore.open(path) for path in paths]
    if len(stores) < 2:
        raise InputError("merge needs at least two stores")
    manifests = [store.manifest for store in stores]
    _check_alike(stores)
    sources = [manifest.config["source"] for manifest in manifests]
    folder = Path(out).expanduser()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileFormatError(f"{str(folder)!r} is not an empty folder: choose another one for the merged store")
    first = manifests[0]
    names = [name for name in ("train", "val", "test") if any(name in each.splits for each in manifests)]
    merged = Manifest(
        config={**first.config, "source": digest_json({"merged": sources})},
        backbone=first.backbone,
        source=" + ".join(manifest.source for manifest in manifests),
        shape=first.shape,
        grid=first.grid,
        n_prefix=first.n_prefix,
        class_names=first.class_names,
        splits={name: Split() for name in names},
        found=join_censuses([manifest.found for manifest in manifests]),
    )
    make_folder(folder)
    with writer_lock(folder):
        for name, split in merged.splits.items():
            _copy_shards(stores, name, folder, split)
        store_reduction(folder, merged, cast(Fit, stores[0].reduction.options))
        merged.complete = True
        merged.save(folder)
    return TokenStore.open(folder)


def _copy_shards(stores: list[TokenStore], name: str, folder: Path, split: Split) -> None:
    for store in stores:
        for shard in store.manifest.splits.get(name, Split()).shards:
            original = ShardFile(store.path / shard.file)
            original.verify()
            copy = folder / f"{name}-{len(split.shards):05d}.safetensors"
            write_atomic(copy, original.path.read_bytes())
            split.shards.append(ShardFile(copy).record(split.count))


def _check_alike(stores: list[TokenStore]) -> None:
    first = stores[0]

    def facts(store: TokenStore) -> dict[str, object]:
        manifest = store.manifest
        # Shards may be of any size.
        settings = {k: v for k, v in manifest.config.items() if k not in ("source", "shard_size")}
        return {**settings, "tokens": manifest.shape, "grid": manifest.grid, "classes": manifest.class_names}

    for store in stores[1:]:
        ours, theirs = facts(first), facts(store)
        if differing := [key for key in ours if ours[key] != theirs[key]]:
            pair = f"{str(first.path)!r} and {str(store.path)!r}"
            raise InputError(f"{pair} cannot be merged: they differ in {', '.join(differing)}")
    sources = [store.manifest.config["source"] for store in stores]
    if len(set(sources)) < len(sources):
        raise InputError("two of the stores hold the same images: merging them would count those twice")
