"""The preprocessing of a transformers image processor, on bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convexhead.errors import InputError


def read_preprocessing(spec: str, processor: dict[str, Any], image_size: int | None) -> dict[str, Any]:
    """Return ``resize`` (shorter side or ``[h, w]``), ``crop``, ``resample``, ``mean``, ``std``, ``scale``.

    The network sees ``(byte * scale - mean) / std``. An ``image_size`` scales the resizing along.
    """
    size, crop = processor.get("size") or {}, processor.get("crop_size") or {}
    resize = size.get("shortest_edge") or ([size["height"], size["width"]] if "height" in size else None)
    resize = resize if processor.get("do_resize", True) else None
    box = [crop["height"], crop["width"]] if processor.get("do_center_crop") and crop else None
    if resize is None and size and processor.get("do_resize", True):
        raise InputError(f"{spec!r} resizes images by {', '.join(size)}, which is not supported")
    if image_size is not None:
        if isinstance(resize, int):
            resize = round(resize * image_size / min(box)) if box else image_size
        else:
            resize = [image_size, image_size]
        box = [image_size, image_size] if box or isinstance(resize, int) else None
    normalise = processor.get("do_normalize", True)
    return {
        "resize": resize,
        "crop": box,
        "resample": int(processor.get("resample", Image.Resampling.BILINEAR)),
        "mean": list(processor["image_mean"]) if normalise else [0.0] * 3,
        "std": list(processor["image_std"]) if normalise else [1.0] * 3,
        "scale": float(processor["rescale_factor"]) if processor.get("do_rescale", True) else 1.0,
    }


def resize_and_crop(image: Image.Image, preprocessing: dict[str, Any]) -> Tensor:
    """Resize the shorter side or both sides and crop the centre; returns uint8 ``(3, height, width)``."""
    resize, crop = preprocessing["resize"], preprocessing["crop"]
    resample = Image.Resampling(preprocessing["resample"])
    image = image.convert("RGB")
    if isinstance(resize, int):
        short = min(image.size)
        w, h = (int(resize * side / short) for side in image.size)
        image = image.resize((w, h), resample)
    elif resize is not None:
        image = image.resize((resize[1], resize[0]), resample)
    if crop is not None:
        top, left = (image.height - crop[0]) // 2, (image.width - crop[1]) // 2
        image = image.crop((left, top, left + crop[1], top + crop[0]))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
