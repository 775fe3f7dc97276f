"""The pixels of a transformers image processor: our own on bytes where they are its own, else the processor's.

Resizing and cropping bytes is several times faster, and four times less to move, than the processor's floats. But
processors differ in more than their settings say. So test images go through both when a backbone is opened. Where
any pixel differs by more than `AGREE` after normalisation, the processor itself prepares every image.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convexhead.errors import InputError
from convexhead.tokens.backbones.aspect import KeptAspect

AGREE = 0.05
"""Greatest difference of normalised pixels: two byte levels, as between two libraries' interpolations, are 0.04."""
TEST_SIZES = ((96, 96), (131, 59), (250, 600))
"""Width and height of the test images: a square one, and small and large ones beyond any usual aspect."""


class Pixels(NamedTuple):
    """How an image becomes what the network sees.

    Attributes
    ----------
    prepare
        From an RGB image to uint8 ``(3, h, w)``, or to float32 that is normalised already.
    mean, std
        ``(3, 1, 1)``; the network sees ``(byte - mean) / std``.
    settings
        Everything on which the pixels depend, as plain JSON values.
    size
        ``(h, w)`` of a prepared square image.
    kept
        How images keep their aspect ratio, or None.
    """

    prepare: Callable[[Image.Image], Tensor]
    mean: Tensor
    std: Tensor
    settings: dict[str, Any]
    size: tuple[int, int]
    kept: KeptAspect | None = None


def choose_pixels(spec: str, processor: Any, image_size: int | None, native: Any) -> Pixels:
    """Return our own preprocessing if it agrees with the processor on the test images, else the processor's.

    An ``image_size`` scales the resizing along: of our own settings where these agree without it, else of the
    processor's ``size`` and ``crop_size``, which must then give squares of that size.

    Raises
    ------
    InputError
        The processor gives no single RGB image, or not of ``image_size``.
    """
    config = processor.to_dict()
    images = [test_image(w, h) for w, h in TEST_SIZES]
    if (settings := _agreed(spec, processor, images, image_size)) is not None:
        return pixels_of_settings(settings, native)

    options = _scaled(spec, config, image_size) if image_size is not None else {}
    for image in images:
        shape = tuple(_processed(spec, processor, image, options).shape)
        if image_size is not None and shape != (3, image_size, image_size):
            raise InputError(
                f"the image processor of {spec!r} makes {shape[1]}x{shape[2]} pixels where image_size={image_size} "
                "is asked for: omit image_size"
            )
    prepared = _processed(spec, processor, _square(native), options)
    settings = {"processor": json.loads(json.dumps(config, sort_keys=True, default=str)), "image_size": image_size}
    one = torch.ones(3, 1, 1)
    size = (prepared.shape[1], prepared.shape[2])
    return Pixels(lambda image: _processed(spec, processor, image, options), 0 * one, one, settings, size)


def kept_pixels(spec: str, processor: Any, longest: int, patch: int) -> Pixels:
    """Return preprocessing that keeps the aspect ratio of images, and resamples and normalises as the processor does.

    Raises
    ------
    InputError
        The processor does something else too, or ``longest`` is no whole number of patches.
    """
    settings = _agreed(spec, processor, [test_image(w, h) for w, h in TEST_SIZES], None)
    if settings is None:
        raise InputError(
            f"the image processor of {spec!r} does more than resize, crop and normalise: leave keep_aspect out"
        )
    resample = Image.Resampling(settings["resample"])
    kept = KeptAspect(longest, patch, resample.name.lower()).check(spec)
    mean, std = _on_bytes(settings)
    settings = {name: settings[name] for name in ("resample", "mean", "std", "scale")}
    return Pixels(
        kept.prepare, mean, std, {**settings, "image_size": longest, "keep_aspect": True}, (longest, longest), kept
    )


def _agreed(spec: str, processor: Any, images: list[Image.Image], image_size: int | None) -> dict[str, Any] | None:
    """Return our own settings for ``image_size`` where those of no size agree with the processor on test images."""
    config = processor.to_dict()
    expected = [_processed(spec, processor, image, {}) for image in images]
    try:
        settings = read_preprocessing(spec, config, None)
        agree = all(_agree(settings, *pair) for pair in zip(images, expected, strict=True))
        return read_preprocessing(spec, config, image_size) if agree else None
    except (InputError, KeyError, TypeError, ValueError):  # settings that ours do not have
        return None


def pixels_of_settings(settings: dict[str, Any], native: Any) -> Pixels:
    """Return our own preprocessing, for a network whose own images are ``native`` pixels a side."""
    prepared = resize_and_crop(_square(native), settings)
    mean, std = _on_bytes(settings)
    size = (prepared.shape[1], prepared.shape[2])
    return Pixels(lambda image: resize_and_crop(image, settings), mean, std, settings, size)


def _square(native: Any) -> Image.Image:
    side = native if isinstance(native, int) else 224
    return test_image(side, side)


def test_image(width: int, height: int) -> Image.Image:
    """Return waves of several lengths in three unequal colours, which show scaling, cropping and their order."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / a + phase) * np.cos(y / b) for a, b, phase in ((9, 14, 0.0), (23, 11, 1.0), (6, 31, 2.0))]
    colours = np.stack(waves, axis=2) * [70, 50, 60] + [150, 90, 120]
    return Image.fromarray(colours.astype(np.uint8))


def _processed(spec: str, processor: Any, image: Image.Image, options: dict[str, Any]) -> Tensor:
    """Return the processor's float32 ``(3, h, w)`` of one image.

    Raises
    ------
    InputError
        It gives something else, such as flattened patches, tiles or several crops.
    """
    try:
        values = processor(images=image.convert("RGB"), return_tensors="pt", **options)["pixel_values"]
    except Exception as error:  # of any processor's own code
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(
            f"the image processor of {spec!r} fails on an image of {image.width}x{image.height} pixels ({reason}): "
            "choose another backbone"
        ) from error
    if not isinstance(values, Tensor) or values.ndim != 4 or values.shape[:2] != (1, 3):
        what = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"the image processor of {spec!r} gives {what} for one image, not its pixels (1, 3, height, width), as "
            "processors that cut images into patches or tiles do: choose another backbone"
        )
    return values[0].float()


def _agree(settings: dict[str, Any], image: Image.Image, expected: Tensor) -> bool:
    mean, std = _on_bytes(settings)
    got = (resize_and_crop(image, settings) - mean) / std
    return got.shape == expected.shape and bool((got - expected).abs().max() <= AGREE)


def _on_bytes(settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(settings[name]).reshape(3, 1, 1) / settings["scale"] for name in ("mean", "std"))
    return mean, std


def _scaled(spec: str, config: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Return the arguments with which a processor makes squares of another size."""
    size, crop = config.get("size") or {}, config.get("crop_size") or {}
    square = {"height": image_size, "width": image_size}
    if not config.get("do_resize", True) or not set(size) <= {"shortest_edge", "height", "width"}:
        raise InputError(f"the image processor of {spec!r} resizes to no size of its own: omit image_size")
    if "shortest_edge" not in size:
        return {"size": square} | ({"crop_size": square} if crop else {})
    if not (config.get("do_center_crop") and crop):
        return {"size": {"shortest_edge": image_size}}
    edge = round(size["shortest_edge"] * image_size / min(crop.values()))
    return {"size": {"shortest_edge": edge}, "crop_size": square}


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
