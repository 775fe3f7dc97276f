"""From images to a token store: resumable extraction, then the fitted reduction."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

import torch

from convexhead.errors import FileFormatError, InputError, choose
from convexhead.tokens.backbones import Backbone, open_backbone
from convexhead.tokens.fit_reduction import fit_reduction
from convexhead.tokens.job import ExtractionJob, Progress
from convexhead.tokens.manifest import Manifest, write_atomic
from convexhead.tokens.reduce import Reduction
from convexhead.tokens.sources import ImageSource, open_source
from convexhead.tokens.store import TokenStore
from convexhead.tokens.view import READ_ROWS, SplitView


def extract(
    source: str | Path | ImageSource,
    backbone: str | Backbone,
    out: str | Path,
    *,
    layer: int | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    channels: int | None = None,
    reduce: Literal["avgpool", "pca"] = "avgpool",
    token_pool: int | tuple[int, int] | None = None,
    standardize: bool = True,
    constant: bool = False,
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int | None = None,
    shard_size: int = 512,
    skip_broken: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> TokenStore:
    """Run a frozen backbone over all images of a source and keep the tokens in the folder ``out``.

    Given the same arguments again, a run that was stopped at any moment continues at the shard it was in, and
    a finished store is returned as it is. If only the fitted part differs (``standardize``, ``constant``, and
    ``channels`` with ``reduce="pca"``), the reduction alone is fitted again.

    Args:
        source: see `open_source`.
        backbone: see `open_backbone`, as for ``layer``, ``image_size`` and ``crop_pct``.
        out: folder of the store; made if it does not exist.
        channels: channels to keep; None keeps all.
        reduce: how to reduce channels. ``"avgpool"`` averages neighbours before they are written; ``"pca"``
            writes all and keeps the leading principal components of the train tokens when they are read.
        token_pool: token grid to average down to, ``(h, w)`` or one number for a square.
        standardize: give every channel mean 0 and variance 1 over the train tokens when they are read, before
            principal components are taken.
        constant: append a channel of ones when they are read.
        dtype: type in which tokens are written.
        batch_size: images a forward pass; None is 8 on a CPU (one batch a core, small enough for its
            cache), else 64.
        shard_size: images a file, and the most that a crash can lose.
        skip_broken: leave out images that cannot be decoded (the manifest names them) instead of stopping.
        device: a torch device, or ``"auto"`` for a GPU if there is one.
        progress: called after every batch.

    Raises:
        InputError: an argument or an image that cannot be used.
        FileFormatError: ``out`` holds something else, or the store of another source, backbone or setting.
        StoreWriteError: the disk is full or ``out`` cannot be written; finished shards are kept.
        HubError, MissingExtraError: see `open_backbone`.
    """
    choose("reduction", reduce, ["avgpool", "pca"])
    choose("dtype", dtype, ["float16", "float32"])
    for name, value in {"channels": channels, "batch_size": batch_size, "shard_size": shard_size}.items():
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    if reduce == "pca" and channels is None:
        raise InputError("reduce='pca' needs channels, the number of components to keep")

    place = _device(device)
    source = open_source(source)
    backbone = open_backbone(backbone, layer=layer, image_size=image_size, crop_pct=crop_pct)
    job = ExtractionJob(
        source=source,
        backbone=backbone.to(place),
        out=Path(out).expanduser(),
        device=place,
        channels=channels if reduce == "avgpool" else None,
        token_pool=(token_pool, token_pool) if isinstance(token_pool, int) else token_pool,
        dtype=dtype,
        batch_size=batch_size or (8 if place.type == "cpu" else 64),
        shard_size=shard_size,
        skip_broken=skip_broken,
    )
    manifest = job.manifest()
    if reduce == "pca" and channels is not None and channels > manifest.shape[1]:
        raise InputError(f"channels={channels} must be at most the tokens' {manifest.shape[1]} channels")
    if not manifest.complete:
        job.run(manifest, progress)
    _update_reduction(job.out, manifest, standardize, channels if reduce == "pca" else None, constant)
    if not manifest.complete:
        manifest.complete = True
        manifest.save(job.out)
    return TokenStore.open(job.out)


def _update_reduction(
    out: Path, manifest: Manifest, standardize: bool, components: int | None, constant: bool
) -> None:
    """Fit the reduction on the stored train tokens, unless the one on disk is what is asked for."""
    wanted = {"standardize": standardize, "components": components, "constant": constant}
    if manifest.complete:
        # A damaged reduction is fitted again.
        with contextlib.suppress(FileFormatError):
            if Reduction.load(out / manifest.reduction).options == wanted:
                return
    train = SplitView(out, manifest, "train", reduction=None)
    chunks = (train.raw(start, start + READ_ROWS) for start in range(0, len(train), READ_ROWS))
    fitted = fit_reduction(chunks, standardize=standardize, components=components, constant=constant)
    write_atomic(out / manifest.reduction, fitted.to_bytes())


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"the device {name!r} cannot be used: {reason}") from error
    return device
