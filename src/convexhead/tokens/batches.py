"""From a range of images to their tokens in the stored type."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convexhead.errors import InputError
from convexhead.tokens.backbones.base import Backbone, TokenBatch
from convexhead.tokens.geometry import Window, measure_window, patch_targets
from convexhead.tokens.reduce import pool_channels, pool_grid
from convexhead.tokens.sources.base import BrokenImageError, ImageSource, MaskSource, TargetSource


class Extracted(NamedTuple):
    """Of the images ``rows``, which could be read: ``tokens (k, s, d)``, ``prefix (k, p, d)`` as stored.

    Their ``sizes`` are ``(width, height)``. With masks also ``targets (k, s, c)`` and ``weights (k, s)`` of tokens,
    see `patch_targets`. Where images have different numbers of tokens ``lengths (k,)``, and zeros behind them; where
    they lie on grids of their own also ``grids (k, 2)``.
    """

    rows: list[int]
    tokens: Tensor
    prefix: Tensor
    targets: Tensor | None = None
    weights: Tensor | None = None
    sizes: Sequence[tuple[int, int]] = ()
    lengths: Tensor | None = None
    grids: Tensor | None = None


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
        if self.keeps_aspect and self.token_pool is not None:
            raise InputError("token_pool averages over one grid, and keep_aspect has one for each image: leave one out")
        self._windows: dict[tuple[int, int], Window] = {}
        self._turn = contextlib.nullcontext() if self.device.type == "cpu" else threading.Lock()

    @property
    def ragged(self) -> bool:
        """Whether images have different numbers of tokens."""
        return self.keeps_aspect or bool(getattr(self.source, "ragged", False))

    @property
    def keeps_aspect(self) -> bool:
        """Whether each image lies on a grid of its own."""
        return self.backbone.most_tokens is not None

    def config(self) -> dict[str, Any]:
        """Return what determines the stored numbers, as JSON values."""
        numbering = getattr(self.source, "numbering", None)  # of its classes, where it is not the source's own
        return {
            # A weights file may move: its content is in `weights`.
            "backbone": self.backbone.spec.partition("@")[0],
            "weights": self.backbone.weights_hash,
            "layer": self.backbone.layer,
            "preprocessing": self.backbone.preprocessing,
            **({"beside": self.backbone.channels} if self.backbone.channels else {}),
            "source": self.source.fingerprint(),
            "channels": self.channels,
            "token_pool": list(self.token_pool) if self.token_pool else None,
            "dtype": self.dtype,
            **({} if numbering is None else {"classes": numbering}),
            **({"masks": {"void": self.source.void}} if isinstance(self.source, MaskSource) else {}),
            **({"task": self.source.task} if isinstance(self.source, TargetSource) else {}),
            **({"lengths": True} if self.ragged else {}),
            **({"grids": True} if self.keeps_aspect else {}),
        }

    def first(self) -> TokenBatch:
        """Extract the first train image that can be read, which tells the shapes.

        Raises
        ------
        InputError
            There is none, or settings that do not fit the tokens.
        """
        for index in range(len(self.source.files("train"))):
            image = self._load("train", index)
            if image is not None:
                if isinstance(self.source, MaskSource):
                    self.window(image.size)
                batch = self._forward([self.backbone.prepare(image)])[0]
                if self.backbone.most_tokens is None:
                    return batch
                room, d = self.backbone.most_tokens, batch.tokens.shape[2]
                return TokenBatch(batch.tokens.new_zeros(1, room, d), batch.prefix, (room, 1))
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
        rows, images, sizes = [], [], []
        for index in items:
            if (image := self._load(split, index)) is not None:
                rows.append(index)
                images.append(self.backbone.prepare(image))
                sizes.append(image.size)
        if not images:
            return Extracted(rows, torch.empty(0), torch.empty(0))
        if self.keeps_aspect:
            return self._on_own_grids(split, rows, images, sizes)
        last = self.source.files(split)[rows[-1]]
        same_size = len({image.shape for image in images}) == 1
        batch, fine = self._forward(images) if same_size else (None, grid)
        if batch is None or batch.grid != grid:
            raise InputError(f"the images before {last!r} differ in size: {self.unequal}")
        tokens, prefix = self._stored(batch.tokens, last), self._stored(batch.prefix, last)
        if self.ragged:
            lengths: Any = self.source
            return Extracted(rows, tokens, prefix, lengths=torch.from_numpy(lengths.lengths(split)[rows]))
        if not isinstance(self.source, MaskSource):
            return Extracted(rows, tokens, prefix, sizes=sizes)
        made = [self._targets(split, *each, fine) for each in zip(rows, sizes, strict=True)]
        targets, weights = (torch.stack(part) for part in zip(*made, strict=True))
        return Extracted(rows, tokens, prefix, targets, weights, sizes)

    def _on_own_grids(
        self, split: str, rows: list[int], images: list[Tensor], sizes: list[tuple[int, int]]
    ) -> Extracted:
        """The same where each image lies on a grid of its own: those of a shape share a forward pass."""
        shapes, room = [tuple(image.shape) for image in images], self.backbone.most_tokens
        assert room is not None
        found: list[Any] = [None] * len(images)
        for shape in dict.fromkeys(shapes):
            which = [i for i, other in enumerate(shapes) if other == shape]
            batch, _ = self._forward([images[i] for i in which])
            for i, tokens, prefix in zip(which, batch.tokens, batch.prefix, strict=True):
                found[i] = _padded(tokens, room), prefix, torch.tensor(batch.grid)
        tokens, prefix, grids = (torch.stack(part) for part in zip(*found, strict=True))
        last = self.source.files(split)[rows[-1]]
        stored = Extracted(rows, self._stored(tokens, last), self._stored(prefix, last), sizes=sizes)
        stored = stored._replace(lengths=grids.prod(1), grids=grids)
        if not isinstance(self.source, MaskSource):
            return stored
        made = [
            [_padded(part, room) for part in self._targets(split, index, size, tuple(grid))]
            for index, size, grid in zip(rows, sizes, grids.tolist(), strict=True)
        ]
        targets, weights = (torch.stack(part) for part in zip(*made, strict=True))
        return stored._replace(targets=targets, weights=weights)

    def _targets(self, split: str, index: int, size: tuple[int, int], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """`patch_targets` of an image of ``size = (width, height)`` whose tokens lie on ``grid`` before pooling."""
        source: Any = self.source
        mask = source.mask(split, index)
        if mask.shape[::-1] != size:
            name = source.files(split)[index]
            raise InputError(f"the mask of {name!r} has {mask.shape[::-1]} pixels, the image {size}")
        return patch_targets(mask, self.window(size), grid, len(source.class_names), self.token_pool)

    def window(self, size: tuple[int, int]) -> Window:
        """What prepared images show of images of ``size = (width, height)``."""
        if size not in self._windows:
            self._windows[size] = measure_window(self.backbone.prepare, size)
        return self._windows[size]

    def _load(self, split: str, index: int) -> Any:
        """Load one image; None for a broken one where those are skipped."""
        try:
            return self.source.load(split, index)
        except BrokenImageError:
            if not self.skip_broken:
                raise
            return None

    @torch.inference_mode()
    def _forward(self, images: list[Tensor]) -> tuple[TokenBatch, tuple[int, int]]:
        """Tokens as they are stored but for the type, and the grid that they lay on before they were pooled."""
        stacked = torch.stack(images)
        try:
            with self._turn:
                tokens, prefix, grid = self.backbone(stacked.to(self.device))
        except torch.cuda.OutOfMemoryError as error:
            raise InputError(f"{len(images)} images do not fit into {self.device}: lower batch_size") from error
        fine = grid
        if self.token_pool is not None:
            tokens, grid = pool_grid(tokens, grid, self.token_pool), self.token_pool
        if self.channels is not None:
            tokens = pool_channels(tokens, self.channels)
            prefix = pool_channels(prefix, self.channels) if prefix.shape[1] else tokens[:, :0]
        return TokenBatch(tokens, prefix, grid), fine

    @torch.inference_mode()
    def _stored(self, values: Tensor, file: str) -> Tensor:
        """Convert to the stored type, refusing what it cannot hold."""
        stored = values.to(getattr(torch, self.dtype)).cpu().contiguous()
        if not stored.isfinite().all():
            if values.isfinite().all():
                raise InputError(f"tokens near {file!r} are too large for {self.dtype}: use dtype='float32'")
            raise InputError(f"the backbone {self.backbone.spec!r} gives NaN or infinite tokens near {file!r}")
        return stored


def _padded(values: Tensor, room: int) -> Tensor:
    """``values (s_i, …)`` with zeros behind them, ``(room, …)``."""
    if len(values) > room:
        raise InputError(f"an image has {len(values)} tokens, more than the {room} of a square one")
    return torch.cat([values, values.new_zeros(room - len(values), *values.shape[1:])])
