"""From images to a token store: resumable extraction in one or several processes, then the reduction."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from convexhead.errors import InputError, choose
from convexhead.runtime.freed_memory import reuse_freed_memory
from convexhead.runtime.ranks import SOFTWARE, Ranks, join_ranks, local_ranks
from convexhead.tokens.arrays.loader import as_loaders
from convexhead.tokens.arrays.run_loaders import run_loaders
from convexhead.tokens.backbones.base import ImageSize, Layer
from convexhead.tokens.backbones.open import open_backbone
from convexhead.tokens.batches import BatchExtractor
from convexhead.tokens.job import ExtractionJob, Task
from convexhead.tokens.like import number_like, open_backbone_like, options_like, origin_of
from convexhead.tokens.progress import ProgressCallback, ProgressMeter
from convexhead.tokens.reduce import Reduction
from convexhead.tokens.sources.base import ImageSource
from convexhead.tokens.sources.open import open_source
from convexhead.tokens.store.files import make_folder, sha256_file, writer_lock
from convexhead.tokens.store.fit import Fit, store_reduction
from convexhead.tokens.store.manifest import DTYPES, MANIFEST, Manifest
from convexhead.tokens.store.origin import TokenOrigin
from convexhead.tokens.store.store import TokenStore

PATIENCE = timedelta(days=30)
"""How long a process waits for the others. They meet at the end of an extraction only, and one that dies ends the wait
at once."""
DEFAULTS = {
    "class_channels": False, "keep_aspect": False, "reduce": "avgpool", "standardize": True, "constant": False,
    "dtype": "float16",
}  # fmt: skip
"""Values that the options have if they are None."""
BATCH = {"cpu": 8, "gpu": 256}
"""Images in a forward pass. Eight make one batch a core, whose activations fit its cache."""


def extract(
    source: str | Path | ImageSource | DataLoader[Any] | Mapping[str, DataLoader[Any]],
    backbone: str | nn.Module | None,
    out: str | Path,
    *,
    like: str | Path | None = None,
    layer: Layer = None,
    class_channels: bool | None = None,
    image_size: ImageSize = None,
    crop_pct: float | None = None,
    keep_aspect: bool | None = None,
    channels: int | None = None,
    reduce: Literal["avgpool", "pca"] | None = None,
    token_pool: int | tuple[int, int] | None = None,
    standardize: bool | None = None,
    constant: bool | None = None,
    dtype: Literal["float16", "bfloat16", "float32"] | None = None,
    batch_size: int | None = None,
    shard_size: int = 512,
    skip_broken: bool = False,
    void: int | None = None,
    class_names: Sequence[str] | str | Path | None = None,
    device: str = "auto",
    progress: ProgressCallback | None = None,
) -> TokenStore:
    """Run a frozen backbone over all images of a source and keep the tokens in the folder ``out``.

    Given the same arguments again, a run that was stopped continues at the shard it was in, and a finished store is
    returned as it is. If only the fitted part differs (``standardize``, ``constant``, and ``channels`` with
    ``reduce="pca"``), the reduction alone is fitted again. Under torchrun every process calls this with the same
    arguments and extracts its share of the shards; the store is the same as that of one process.

    Parameters
    ----------
    source
        See `open_source`. With a module as backbone also a loader (of train, or one of each split) that yields
        ``(images, labels)`` or ``(images, labels, names)``; it is read once, into a temporary file of tokens.
    backbone, layer, class_channels, image_size, crop_pct, keep_aspect
        See `open_backbone`; ``backbone`` is None with ``like``. Several layers weigh alike, see `fit_reduction`.
    out, like
        Folder of the store. A store, or a run that was fitted on one, from which all settings, the fitted reduction
        and the order of the classes are taken; options that say something else are refused.
    channels, reduce, token_pool
        Channels to keep, None keeps all; how: ``"avgpool"`` (None) averages neighbours before they are written,
        ``"pca"`` writes all and keeps the leading principal components of the train tokens when they are read; the
        token grid to average down to, ``(h, w)`` or one number for a square.
    standardize, constant, dtype
        When tokens are read, give every channel mean 0 and variance 1 over the train tokens, before principal
        components are taken (None does), and append a channel of ones (None does not); the type in which tokens are
        written, None is float16.
    batch_size, shard_size, skip_broken
        Images a forward pass (None: 8 on a CPU, else 256), and images a file, the most that a crash can lose; whether
        to leave out images that cannot be decoded (the manifest names them) instead of stopping.
    void, class_names
        Of images with masks, see `open_source`; tokens then have targets, see `SplitView.targets`.
    device, progress
        A torch device, or ``"auto"`` for a GPU if there is one; called after each batch.

    Raises
    ------
    ConvexHeadError
        Arguments or an image that cannot be used, or an ``out`` that holds something else or cannot be written.
    """
    asked = {
        "backbone": backbone, "layer": list(layer) if isinstance(layer, tuple) else layer, "image_size": image_size,
        "class_channels": class_channels, "crop_pct": crop_pct, "keep_aspect": keep_aspect, "channels": channels,
        "reduce": reduce, "dtype": dtype, "token_pool": token_pool, "standardize": standardize, "constant": constant,
        "void": void, "class_names": class_names,
    }  # fmt: skip
    _check(reduce, dtype, {"channels": channels, "batch_size": batch_size, "shard_size": shard_size})

    def plan() -> Plan:
        origin = None if like is None else origin_of(like)
        return _plan(asked, source, Path(out).expanduser(), origin, batch_size, shard_size, device, skip_broken)

    ranks = join_ranks(PATIENCE)
    with ranks.all_or_none():
        plan_of_all = ranks.agree(plan, _facts)
        _extract_together(plan_of_all, ranks, progress)
    return TokenStore.open(plan_of_all.job.out)


class Plan(NamedTuple):
    """An extraction, the settings that its bytes depend on, and the reduction to fit or to take as it is."""

    job: ExtractionJob
    config: dict[str, Any]
    fit: Fit | Reduction


def _plan(
    asked: dict[str, Any],
    source: Any,
    out: Path,
    origin: TokenOrigin | None,
    batch_size: int | None,
    shard_size: int,
    device: str,
    skip_broken: bool,
) -> Plan:
    if (loaders := as_loaders(source)) is not None:
        if isinstance(asked["backbone"], (str, type(None))):
            raise InputError("a DataLoader yields what a module takes: give the module as backbone, or import_arrays")
        source, network = run_loaders(loaders, open_backbone(asked["backbone"]), _device(device))
        asked = asked | {"backbone": network}
    options = _options(asked, origin)
    extractor = _extractor(source, options, origin, _device(device), skip_broken)
    size = batch_size or BATCH["cpu" if extractor.device.type == "cpu" else "gpu"]
    job = ExtractionJob(extractor, out, size, shard_size, origin)
    return Plan(job, job.config(), _wanted_reduction(options, origin, extractor.backbone.channels.get("groups")))


def _check(reduce: str | None, dtype: str | None, counts: dict[str, int | None]) -> None:
    if reduce is not None:
        choose("reduction", reduce, ["avgpool", "pca"])
    if dtype is not None:
        choose("dtype", dtype, DTYPES)
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be at least 1")


def _options(asked: dict[str, Any], origin: TokenOrigin | None) -> dict[str, Any]:
    """What is asked for, where nothing is asked completed by what the tokens shall be like or by the defaults."""
    if origin is not None:
        options = options_like(origin, asked)
    elif asked["backbone"] is None:
        raise InputError("a backbone is needed, or like: a store or a run to take it from")
    else:
        options = {name: DEFAULTS.get(name) if value is None else value for name, value in asked.items()}
    if options["reduce"] == "pca" and options["channels"] is None:
        raise InputError("reduce='pca' needs channels, the number of components to keep")
    return options


def _extractor(
    source: str | Path | ImageSource,
    options: dict[str, Any],
    origin: TokenOrigin | None,
    device: torch.device,
    skip_broken: bool,
) -> BatchExtractor:
    if device.type == "cpu":
        reuse_freed_memory()
    images = open_source(source, void=options["void"], class_names=options["class_names"])
    pool = options["token_pool"]
    channels = None if options["reduce"] == "pca" else options["channels"]
    if origin is None:
        sizes = {name: options[name] for name in ("layer", "class_channels", "image_size", "crop_pct", "keep_aspect")}
        network = open_backbone(options["backbone"], **sizes)
        if network.channels and channels is not None:
            raise InputError(f"channels={channels} would average channels of different layers: use reduce='pca' too")
    else:
        images = number_like(images, origin)
        network = open_backbone_like(origin, options)
        channels = origin.config["channels"]  # an experiment may reduce channels that were pooled before
    return BatchExtractor(
        source=images,
        backbone=network.to(device),
        device=device,
        channels=channels,
        token_pool=(pool, pool) if isinstance(pool, int) else pool,
        dtype=options["dtype"],
        skip_broken=skip_broken,
    )


def _wanted_reduction(options: dict[str, Any], origin: TokenOrigin | None, groups: list[int] | None) -> Fit | Reduction:
    if origin is not None and origin.reduction is not None:
        return origin.reduction
    fit: Fit = {
        "standardize": options["standardize"],
        "components": options["channels"] if options["reduce"] == "pca" else None,
        "constant": options["constant"],
    }
    return fit if groups is None else {**fit, "groups": groups}


def _facts(plan: Plan) -> dict[str, Any]:
    """What all processes of an extraction must have alike."""
    fit = plan.fit
    wanted = {"reduction": f"sha256:{fit.identity}"} if isinstance(fit, Reduction) else fit
    return {"run": "extract", **SOFTWARE, **plan.config, **wanted}


def _extract_together(plan: Plan, ranks: Ranks, progress: ProgressCallback | None) -> None:
    job, config, fit = plan
    with contextlib.ExitStack() as held:

        def begin() -> tuple[Manifest, list[Task]]:
            job.check_target(config)
            if (job.out / MANIFEST).exists():
                # A store that is as it should be may lie on a read-only disk.
                manifest = job.manifest(config)
                if manifest.complete and not job.missing(manifest) and _is_fitted(job.out, manifest, fit):
                    return manifest, []
            make_folder(job.out)
            held.enter_context(writer_lock(job.out))
            manifest = job.manifest(config)
            components = None if isinstance(fit, Reduction) else fit["components"]
            if components is not None and components > manifest.shape[1]:
                raise InputError(f"channels={components} must be at most the tokens' {manifest.shape[1]} channels")
            return manifest, job.missing(manifest)

        manifest, missing = ranks.first_does(begin)
        mine = missing[ranks.rank :: ranks.size]
        meter = ProgressMeter(progress, sum(len(task.items) for task in mine), ranks.size)
        job.write(mine, manifest, meter)
        ranks.first_does(lambda: _finish(job, manifest, bool(missing), fit))


def _is_fitted(folder: Path, manifest: Manifest, fit: Fit | Reduction) -> bool:
    """Return whether the reduction on disk is whole and what is asked for: a way to fit one, or that very one."""
    path = folder / manifest.reduction
    if sha256_file(path) != manifest.reduction_sha256:
        return False
    there = Reduction.load(path)
    return there.identity == fit.identity if isinstance(fit, Reduction) else there.options == fit


def _finish(job: ExtractionJob, manifest: Manifest, new_shards: bool, fit: Fit | Reduction) -> None:
    """List new shards, fit the reduction unless the one on disk is what is asked for, and say: complete."""
    if manifest.complete and not new_shards and _is_fitted(job.out, manifest, fit):
        return
    job.list_shards(manifest)
    store_reduction(job.out, manifest, fit)
    manifest.complete = True
    manifest.save(job.out)


def _device(name: str) -> torch.device:
    if name == "auto":
        gpu = f"cuda:{local_ranks()[0] % max(torch.cuda.device_count(), 1)}"
        return torch.device(gpu if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"the device {name!r} cannot be used: {reason}") from error
    return device
