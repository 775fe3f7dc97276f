"""Tokens of images as a head reads them, a batch at a time: what `extract` with ``like`` stores, without a store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from convexhead.errors import InputError, require
from convexhead.padding import Padded
from convexhead.runtime.freed_memory import reuse_freed_memory
from convexhead.tokens.backbones.base import Backbone
from convexhead.tokens.batches import BatchExtractor, Extracted
from convexhead.tokens.extract import BATCH
from convexhead.tokens.geometry import Window
from convexhead.tokens.like import open_backbone_like, options_like
from convexhead.tokens.parallel import map_on_cores
from convexhead.tokens.reduce import as_read
from convexhead.tokens.sources.base import ImageSource, check_split
from convexhead.tokens.sources.open import open_source
from convexhead.tokens.store.origin import TokenOrigin


class Batch(NamedTuple):
    """Some images of a split, in order; their ``sizes`` are ``(width, height)``, () where the tokens are stored.

    ``tokens`` are `Padded` where images have different numbers of them. Their ``grids`` are ``(h, w)``; () where no
    image says so.
    """

    split: str
    names: list[str]
    tokens: Any  # Float[NDArray, "b s d"] or Padded
    sizes: Sequence[tuple[int, int]] = ()
    grids: Sequence[tuple[int, int]] = ()


class ImageTokens:
    """The tokens of images, as a head of that ``origin`` reads them. Few batches are in memory at any time.

    Parameters
    ----------
    images : path, str or ImageSource
        A folder with images, however deep; an image file; or what `open_source` opens by a scheme.
    origin : TokenOrigin
        Where the tokens of the head came from: backbone, layer, preprocessing, reduction and precision.
    split : str or None
        Of a source with splits; None: all of them.
    backbone : str, Backbone or None
        The same backbone at another place.
    batch_size : int or None
        Images in a forward pass; None: as `extract` has it.
    skip_broken : bool
        Leave out images that cannot be read.

    Attributes
    ----------
    source : ImageSource
    splits : tuple of str
        Those that are read.
    broken : list of str
        Images that were left out, of the batches so far.

    Raises
    ------
    InputError
        No images, or a backbone that does something else.
    """

    def __init__(
        self,
        images: str | Path | ImageSource,
        origin: TokenOrigin,
        *,
        split: str | None = None,
        backbone: str | Backbone | None = None,
        batch_size: int | None = None,
        skip_broken: bool = False,
        device: torch.device,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        self.source = _open(images, split)
        self.splits = self.source.splits if split is None else (check_split(split, self.source.splits),)
        self.broken: list[str] = []
        self._origin = origin
        self._batch_size = batch_size or BATCH["cpu" if device.type == "cpu" else "gpu"]
        if device.type == "cpu":
            reuse_freed_memory()
        options = options_like(origin, {"backbone": backbone, "image_size": None, "crop_pct": None})
        self._extractor = BatchExtractor(
            source=self.source,
            backbone=open_backbone_like(origin, options).to(device),
            device=device,
            channels=origin.config["channels"],
            token_pool=options["token_pool"],
            dtype=options["dtype"],
            skip_broken=skip_broken,
            unequal="bring them to the size of the images that the head was trained on",
        )

    def __len__(self) -> int:
        return sum(len(self.source.files(split)) for split in self.splits)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the images in order.

        Raises
        ------
        BrokenImageError
            An image that cannot be read, unless those are skipped.
        InputError
            Images whose tokens are not those of the head: of another size, for a backbone that takes any.
        """
        origin, batches = self._origin, list(self._batches())

        def extract(batch: tuple[str, range]) -> Extracted:
            return self._extractor.extract(*batch, origin.grid)

        with contextlib.closing(map_on_cores(extract, batches)) as done:
            for (split, items), found in zip(batches, done, strict=True):
                files = self.source.files(split)
                self.broken += [files[index] for index in sorted(set(items) - set(found.rows))]
                if not found.rows:
                    continue
                if (shape := tuple(found.tokens.shape[1:])) != origin.shape:
                    raise InputError(f"these would not be the same tokens: {shape} an image, the head's {origin.shape}")
                stored, first = found.tokens.float().numpy(), found.prefix[:, :1].float().numpy()
                tokens: Any = as_read(
                    stored, first if origin.class_token else None, origin.grid, origin.token_pool, origin.reduction
                )
                grids = [origin.token_pool or origin.grid] * len(tokens)
                if found.grids is not None and found.lengths is not None:
                    grids = [(h, w) for h, w in found.grids.tolist()]
                    tokens = Padded(tokens, np.arange(tokens.shape[1]) < _there(found.lengths, origin)[:, None])
                yield Batch(split, [files[index] for index in found.rows], tokens, found.sizes, grids)

    def window(self, size: tuple[int, int]) -> Window:
        """What the backbone sees of images of ``size = (width, height)``."""
        return self._extractor.window(size)

    def _batches(self) -> Iterator[tuple[str, range]]:
        for split in self.splits:
            n = len(self.source.files(split))
            for start in range(0, n, self._batch_size):
                yield split, range(n)[start : start + self._batch_size]


def _there(lengths: torch.Tensor, origin: TokenOrigin) -> NDArray[np.int64]:
    """Of each image the tokens that a head reads, the class token among them."""
    there: NDArray[np.int64] = lengths.numpy() + origin.class_token
    return there


def _open(images: str | Path | ImageSource, split: str | None) -> ImageSource:
    if isinstance(images, ImageSource) or not Path(images).expanduser().exists():
        return open_source(images)
    require("PIL", "images")
    from convexhead.tokens.sources.image_folder import LooseImages
    from convexhead.tokens.sources.mask_folder import IMAGES, MaskFolder

    if MaskFolder.is_one(Path(images).expanduser()):
        raise InputError(f"{str(images)!r} holds images and their masks: give a folder {IMAGES!r} in it")
    if split is not None:
        raise InputError(f"split={split!r} is for stores: of a folder of images give {str(Path(images) / split)!r}")
    return LooseImages(images)
