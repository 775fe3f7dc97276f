"""``patches:K``: no backbone, the raw patches of the image are the tokens."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from convexhead.errors import InputError
from convexhead.tokens.backbones.aspect import KeptAspect, longest_side
from convexhead.tokens.backbones.base import Backbone, ImageSize, TokenBatch


class RawPatches(Backbone):
    """The image cut into ``k x k`` patches, each flattened as (row, column, colour) and scaled to [0, 1].

    Images keep their size unless ``image_size`` is given, a side or
    (height, width), to which they are then resized, or ``kept`` says how they keep their aspect ratio.
    """

    def __init__(self, k: int, image_size: ImageSize, kept: KeptAspect | None = None) -> None:
        super().__init__()
        self.k = k
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.spec = f"patches:{k}"
        self.layer = None
        self.weights_hash = ""
        size = list(image_size) if isinstance(image_size, tuple) else image_size
        self.preprocessing = {"image_size": size, "interpolation": "bicubic"}
        self._kept = kept
        if kept is not None:
            self.preprocessing["keep_aspect"] = True
            self.most_tokens = (kept.longest // k) ** 2

    def prepare(self, image: Image.Image) -> Tensor:
        if self._kept is not None:
            return self._kept.prepare(image)
        if self.image_size is not None and image.size != self.image_size[::-1]:
            image = image.resize(self.image_size[::-1], Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

    def forward(self, images: Tensor) -> TokenBatch:
        b, colours, height, width = images.shape
        k = self.k
        if height % k or width % k:
            raise InputError(
                f"patches:{k} do not tile images of {height}x{width} pixels: set image_size to a multiple of {k}"
            )
        tokens = functional.unfold(images.float() / 255, k, stride=k).transpose(1, 2)
        tokens = tokens.unflatten(2, (colours, k * k)).transpose(2, 3).flatten(2)
        return TokenBatch(tokens, tokens.new_zeros(b, 0, tokens.shape[2]), (height // k, width // k))


def open_patches(
    size: str, *, layer: int | None, image_size: ImageSize, crop_pct: float | None, keep_aspect: bool
) -> RawPatches:
    """Open ``patches:SIZE``."""
    if not size.isdecimal() or int(size) < 1:
        raise InputError(f"'patches:{size}' needs a patch size in pixels, as in 'patches:4'")
    if layer is not None or crop_pct is not None:
        raise InputError(f"'patches:{size}' has no inner layers and crops nothing: omit layer and crop_pct")
    if keep_aspect:
        spec = f"patches:{size}"
        kept = KeptAspect(longest_side(spec, image_size, crop_pct), int(size)).check(spec)
        return RawPatches(int(size), image_size, kept)
    return RawPatches(int(size), image_size)
