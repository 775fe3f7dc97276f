"""Resizing as a network is Pillow's, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image

from convexhead.deploy.pixels import Pixels, Settings, pixels_of
from convexhead.errors import InputError
from convexhead.tokens import open_backbone
from convexhead.tokens.backbones.hf_preprocessing import resize_and_crop


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def as_bytes(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (131, 59), (333, 300), (64, 48), (7, 5), (224, 224)])
@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("resize", "crop"), [(64, (56, 56)), ((40, 64), (40, 64)), (48, (48, 48)), ((9, 9), (5, 4))])
def test_bytes_are_pillows(size, name, resize, crop):
    image = noise(*size)
    asked = {"resize": resize, "crop": crop, "resample": Image.Resampling[name.upper()]}
    found = Pixels(Settings(resize, crop, name, rounds=False))(as_bytes(image))
    assert torch.equal(found[0], resize_and_crop(image, asked))


def test_batches_are_of_single_images():
    pixels = Pixels(Settings(20, (16, 16), "bicubic", rounds=True))
    images = torch.cat([as_bytes(noise(30, 40)), as_bytes(noise(30, 40)).flip(0, 2)])
    assert torch.equal(pixels(images)[1:], pixels(images[1:]))


def test_what_is_no_resizing_is_refused():
    backbone = open_backbone("patches:2", image_size=8)
    assert pixels_of(backbone).settings.resize == (8, 8)
    plain = backbone.prepare
    backbone.prepare = lambda image: plain(image).flip(2)
    with pytest.raises(InputError, match="--prepared"):
        pixels_of(backbone)
    with pytest.raises(InputError, match="--prepared"):
        pixels_of(open_backbone("patches:2"))
