"""Images at their own aspect ratio: each is scaled to whole patches, and lies on a grid of its own.

The longer side becomes ``longest`` pixels. The other one becomes the nearest whole number of patches, so an image is
stretched by at most half a patch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from convexhead.errors import InputError

if TYPE_CHECKING:
    from PIL import Image


class KeptAspect(NamedTuple):
    """How images are scaled: the longer side in pixels, that of a patch, and the name of an interpolation."""

    longest: int
    patch: int
    interpolation: str = "bicubic"

    def check(self, spec: str) -> KeptAspect:
        """Return it where the longer side is a whole number of patches.

        Raises
        ------
        InputError
            It is not; the message names the sides nearby that are.
        """
        below, rest = divmod(self.longest, self.patch)
        if rest:
            near = f"{below * self.patch} or {(below + 1) * self.patch}" if below else str(self.patch)
            raise InputError(
                f"image_size={self.longest} is no multiple of the {self.patch} pixels of a token of {spec!r}: "
                f"with keep_aspect use {near}"
            )
        return self

    def size(self, width: int, height: int) -> tuple[int, int]:
        """``(height, width)`` of the prepared image."""
        patches = self.longest / max(width, height) / self.patch
        return max(1, round(height * patches)) * self.patch, max(1, round(width * patches)) * self.patch

    def prepare(self, image: Image.Image) -> Tensor:
        """Scale an RGB image to uint8 ``(3, height, width)``."""
        from PIL import Image as images

        size = self.size(*image.size)[::-1]
        if image.size != size:
            image = image.resize(size, images.Resampling[self.interpolation.upper()])
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def longest_side(spec: str, image_size: object, crop_pct: float | None) -> int:
    """The longer side of images that keep their aspect ratio.

    Raises
    ------
    InputError
        No single side, or a crop.
    """
    if not isinstance(image_size, int):
        raise InputError(f"keep_aspect needs image_size, the longer side in pixels of what {spec!r} reads: one number")
    if crop_pct is not None:
        raise InputError("keep_aspect shows whole images: leave crop_pct out")
    return image_size
