"""From a range of images to their tokens in the stored type."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convexhead.errors import InputError
from convexhead.tokens.backbones.base import Backbone, TokenBatch
from convexhead.tokens.reduce import pool_channels, pool_grid
from convexhead.tokens.sources.base import BrokenImageError, ImageSource


class Extracted(NamedTuple):
    """Of the images ``rows``, which could be read: ``tokens (k, s, d)``, ``prefix (k, p, d)`` as stored."""

    rows: list[int]
    tokens: Tensor
    prefix: Tensor


@dataclass
class BatchExtractor:
    """Loads images, runs the backbone and the reductions that are free of data.

    Safe to call from several threads.
    """

    source: ImageSource
    backbone: Backbone
    device: torch.device
    channels: int | None
    token_pool: tuple[int, int] | None
    dtype: str
    skip_broken: bool
    unequal: str = "give image_size"
    """What to do about images of unequal size."""

    def __post_init__(self) -> None:
        # Threads would only make a GPU hold several batches at a time.
        self._turn = contextlib.nullcontext() if self.device.type == "cpu" else threading.Lock()

    def config(self) -> dict[str, Any]:
        """Return what determines the stored numbers, as JSON values."""
        numbering = getattr(self.source, "numbering", None)  # of its classes, where it is not the source's own
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
            **({} if numbering is None else {"classes": numbering}),
        }

    def first(self) -> TokenBatch:
        """Extract the first train image that can be read, which tells the shapes.

        Raises
        ------
        InputError
            There is none, or settings that do not fit the tokens.
        """
        for index in range(len(self.source.labels("train"))):
            image = self._prepare("train", index)
            if image is not None:
                return self._forward([image])
        raise InputError(f"no train image of {self.source.spec!r} can be read")

    def extract(self, split: str, items: range, grid: tuple[int, int]) -> Extracted:
        """Return the tokens of the images ``items``.

        Raises
        ------
        BrokenImageError
            An image that cannot be read, unless those are skipped.
        InputError
            The tokens are not on ``grid``, or do not fit the stored type; images that do not fit into
            the device's memory together.
        """
        loaded = [(index, self._prepare(split, index)) for index in items]
        rows = [index for index, image in loaded if image is not None]
        images = [image for image in (image for _, image in loaded) if image is not None]
        if not images:
            return Extracted(rows, torch.empty(0), torch.empty(0))
        last = self.source.files(split)[rows[-1]]
        same_size = len({image.shape for image in images}) == 1
        batch = self._forward(images) if same_size else None
        if batch is None or batch.grid != grid:
            raise InputError(f"the images before {last!r} differ in size: {self.unequal}")
        return Extracted(rows, self._stored(batch.tokens, last), self._stored(batch.prefix, last))

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
        stacked = torch.stack(images)
        try:
            with self._turn:
                tokens, prefix, grid = self.backbone(stacked.to(self.device))
        except torch.cuda.OutOfMemoryError as error:
            raise InputError(f"{len(images)} images do not fit into {self.device}: lower batch_size") from error
        if self.token_pool is not None:
            tokens, grid = pool_grid(tokens, grid, self.token_pool), self.token_pool
        if self.channels is not None:
            tokens = pool_channels(tokens, self.channels)
            prefix = pool_channels(prefix, self.channels) if prefix.shape[1] else tokens[:, :0]
        return TokenBatch(tokens, prefix, grid)

    @torch.inference_mode()
    def _stored(self, values: Tensor, file: str) -> Tensor:
        """Convert to the stored type, refusing what it cannot hold."""
        stored = values.to(getattr(torch, self.dtype)).cpu().contiguous()
        if not stored.isfinite().all():
            if values.isfinite().all():
                raise InputError(f"tokens near {file!r} are too large for {self.dtype}: use dtype='float32'")
            raise InputError(f"the backbone {self.backbone.spec!r} gives NaN or infinite tokens near {file!r}")
        return stored
