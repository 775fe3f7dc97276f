"""Resizing and cropping as a network, as Pillow does it, for images of any size.

Pillow resizes each axis by a matrix. Output pixel ``o`` looks at ``c = (o + ½) t`` of the input, where ``t`` is the
ratio of the sizes, and takes the pixels ``x`` with ``⌊c − r + ½⌋ ≤ x < ⌊c + r + ½⌋`` with weights

    φ((x + ½ − c) / max(t, 1)),    r = support(φ) · max(t, 1),

that are scaled to sum 1 and rounded to 22 bits. After each axis pixels are rounded to bytes. All of this are products
of whole numbers below 2⁵³, which float64 does exactly in any order. Rows come first here. Newer versions of Pillow
begin with the columns of some images that are higher than wide, which changes some bytes by one or two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from convexhead.errors import InputError
from convexhead.tokens.backbones.base import Backbone
from convexhead.tokens.backbones.hf_preprocessing import test_image

ONE = float(2**22)
"""Pillow's weights are whole numbers in units of its inverse."""
TRIED = ((32, 32), (96, 96), (131, 59), (250, 600), (333, 300))
"""Width and height of the images on which a guess is compared with the backbone's own preprocessing."""
AGREE = 2
"""Largest difference of a byte: the order of the axes changes some 1% of the bytes of smooth images by 1 or 2."""


class Settings(NamedTuple):
    """How an image is resized and cropped.

    Attributes
    ----------
    resize
        The shorter side, or both sides ``(h, w)``.
    crop
        ``(h, w)`` of the middle.
    filter
        ``"bilinear"`` or ``"bicubic"``.
    rounds
        Whether half a pixel of margin is rounded to the even number; else down.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    filter: str
    rounds: bool


class Pixels(nn.Module):
    """Images of any size, as bytes, to those that a backbone sees."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, images: UInt8[Tensor, "b 3 H W"]) -> UInt8[Tensor, "b 3 h w"]:
        sides = [torch.arange(side, dtype=torch.float64, device=images.device) for side in images.shape[2:]]
        resized = self._resized(*(side[-1] + 1 for side in sides))
        down, across = (
            self._weights(side, size, crop) for side, size, crop in zip(sides, resized, self.settings.crop, strict=True)
        )
        return _to_bytes(down @ _to_bytes(images.double() @ across.mT)).to(torch.uint8)

    def _resized(self, height: Tensor, width: Tensor) -> tuple[Tensor, ...]:
        """The size of the whole image after resizing."""
        resize = self.settings.resize
        if isinstance(resize, tuple):
            return tuple(torch.full_like(height, side) for side in resize)
        short = torch.minimum(height, width)
        return tuple((resize * side / short).floor() for side in (height, width))

    def _weights(self, x: Float[Tensor, " n"], resized: Tensor, crop: int) -> Float[Tensor, "crop n"]:
        """Pillow's matrix for one axis, of the rows that the crop leaves."""
        margin = (resized - crop) / 2
        first = margin.round() if self.settings.rounds else margin.floor()
        n = x[-1] + 1
        ratio = n / resized
        wide = ratio.clamp(min=1.0)
        support = FILTERS[self.settings.filter][0] * wide
        place = torch.arange(crop, dtype=torch.float64, device=x.device).unsqueeze(1)
        centre = (place + first + 0.5) * ratio
        low = (centre - support + 0.5).floor()
        high = (centre + support + 0.5).floor()
        weights = FILTERS[self.settings.filter][1]((x - centre + 0.5) * (1.0 / wide))
        weights = torch.where((x >= low) & (x < high), weights, 0.0)
        weights = weights / weights.sum(1, keepdim=True) * ONE
        return torch.where(weights < 0, (weights - 0.5).ceil(), (weights + 0.5).floor())


def _to_bytes(sums: Tensor) -> Tensor:
    return ((sums + ONE / 2) / ONE).floor().clamp(0.0, 255.0)


def _bilinear(x: Tensor) -> Tensor:
    return (1.0 - x.abs()).clamp(min=0.0)


def _bicubic(x: Tensor) -> Tensor:
    a, x = -0.5, x.abs()
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))


FILTERS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "bilinear": (1.0, _bilinear),
    "bicubic": (2.0, _bicubic),
}


def pixels_of(backbone: Backbone) -> Pixels:
    """The preprocessing of a backbone, as a network.

    What the backbone's settings seem to say is compared with what it does, on images of several sizes. Only settings
    that give the same bytes, up to `AGREE`, are taken.

    Raises
    ------
    InputError
        None do: it does not only resize, crop the middle and normalise.
    """
    images = [test_image(*size) for size in TRIED]
    expected = _prepared(backbone, images)
    for settings in _guesses(backbone.preprocessing, expected[0].shape) if expected else ():
        pixels = Pixels(settings)
        if all(_agree(pixels(_bytes(image))[0], wanted) for image, wanted in zip(images, expected, strict=True)):
            return pixels
    raise InputError(
        f"the preprocessing of {backbone.spec!r} cannot be written into a file: it does not only resize and crop the "
        "middle; use --prepared, and give the file images that are prepared already"
    )


def _prepared(backbone: Backbone, images: list[Image.Image]) -> list[Tensor]:
    """What the backbone makes of images; nothing where that is not bytes of one size."""
    try:
        prepared = [backbone.prepare(image) for image in images]
    except InputError:
        return []
    alike = len({image.shape for image in prepared}) == 1 and prepared[0].dtype == torch.uint8
    return prepared if alike else []


def _agree(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and int((found.int() - wanted.int()).abs().max()) <= AGREE


def _guesses(told: dict[str, Any], shape: torch.Size) -> Iterator[Settings]:
    """Settings that the words of a backbone's preprocessing may mean: those of timm, of transformers, and ours."""
    crop = (shape[1], shape[2])
    sizes: list[int | tuple[int, int]] = [crop]
    if told.get("crop_pct"):
        sizes.insert(0, math.floor(crop[0] / told["crop_pct"]))
    resize = told.get("resize")
    if resize is not None:
        sizes.insert(0, resize if isinstance(resize, int) else (resize[0], resize[1]))
    if crop[0] == crop[1]:
        sizes.append(crop[0])
    named = {int(Image.Resampling.BILINEAR): "bilinear", int(Image.Resampling.BICUBIC): "bicubic"}
    word = told.get("interpolation") or named.get(told.get("resample", -1))
    for size, rounds in itertools.product(sizes, (True, False)):
        if word in FILTERS:
            yield Settings(size, crop, str(word), rounds)


def _bytes(image: Image.Image) -> UInt8[Tensor, "1 3 H W"]:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
