"""Frozen backbones that turn images into tokens, named by one string.

===============================  =========================================================================
``packaged:efficientnet-lite0``  ImageNet EfficientNet-Lite0 out of a package of the Python index
``timm:NAME``                    a timm model with published weights, from the hub or its local cache
``timm:NAME@FILE``               the same architecture with weights from a file, .safetensors or .pth
``hf:NAME_OR_FOLDER``            a vision model of transformers, from its hub, the cache or a folder
``patches:K``                    no backbone: the raw K x K patches of the image
===============================  =========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from convexhead.errors import InputError, choose, require
from convexhead.tokens.backbones.base import Backbone, ImageSize, Layer
from convexhead.tokens.backbones.beside import BesideBackbone


def open_backbone(
    spec: str | nn.Module,
    *,
    transform: Callable[[Any], Tensor] | None = None,
    name: str | None = None,
    layer: Layer = None,
    class_channels: bool = False,
    image_size: ImageSize = None,
    crop_pct: float | None = None,
    keep_aspect: bool = False,
) -> Backbone:
    """Open a backbone by its specification (see the module's table).

    Parameters
    ----------
    spec
        The specification; or a module of your own, which `ModuleBackbone` describes; or a backbone that is open
        already, which the rest cannot change.
    transform, name
        Of a module: makes its input ``(c, height, width)`` of an RGB image; what both are called.
    layer, class_channels
        Inner block, counted from 0 (a stage where timm divides a network into stages); None takes the final map.
        Several, such as ``[4, None]``, stand side by side in the channels, perhaps with the class token.
    image_size
        Side of the square input in pixels, or (height, width); None is the backbone's own. Resizing and cropping keep
        their proportion; a transformers processor that cannot give such squares is refused.
    crop_pct
        Share of the resized image that the centre crop keeps; None is the backbone's own, 1 keeps all, which is better
        for small images without margins. Of timm only: transformers models crop as their processor says.
    keep_aspect
        Scale images to ``image_size`` pixels of their longer side, so that each has a grid of tokens of its own.

    Raises
    ------
    InputError
        Unknown name, impossible layer or size.
    FileFormatError
        A weights file of another format, that holds more than data, or that does not fit the architecture.
    MissingExtraError
        timm, or the package with the weights, is not installed.
    HubError
        Weights are neither in the local cache nor to be had from the hub.
    """
    given = (layer, image_size, crop_pct, class_channels, keep_aspect) != (None, None, None, False, False)
    if isinstance(spec, nn.Module) and not isinstance(spec, Backbone):
        if given:
            raise InputError("layer, image_size and crop_pct are for named backbones: module and transform decide them")
        require("PIL", "images")
        from convexhead.tokens.backbones.module_backbone import ModuleBackbone

        return ModuleBackbone(spec, transform, name)
    if transform is not None or (name is not None and isinstance(spec, str)):
        raise InputError("transform and name go with a module of your own as backbone: leave them out")
    if isinstance(spec, Backbone):
        if given:
            raise InputError("layer, image_size and crop_pct need the name of a backbone, not an open one")
        return spec
    if class_channels or isinstance(layer, Sequence):
        at = partial(open_backbone, spec, image_size=image_size, crop_pct=crop_pct, keep_aspect=keep_aspect)
        return _beside([at(layer=k) for k in (layer if isinstance(layer, Sequence) else [layer])], class_channels)
    scheme, _, rest = spec.partition(":")
    if scheme == "module":
        raise InputError(f"{spec!r} was a module of your own: in Python give it and its transform, or an open backbone")
    choose("backbone", scheme, ["packaged", "timm", "hf", "patches"])
    image_size = _checked(image_size, crop_pct)
    # Imported here because Pillow, timm and transformers are optional and slow to import.
    require("PIL", "images")
    settings: Any = {"layer": layer, "image_size": image_size, "crop_pct": crop_pct, "keep_aspect": keep_aspect}
    if scheme == "patches":
        from convexhead.tokens.backbones.patches import open_patches

        return open_patches(rest, **settings)
    if scheme == "hf":
        from convexhead.tokens.backbones.hf_backbone import open_hf

        return open_hf(rest, **settings)
    from convexhead.tokens.backbones.timm_weights import open_packaged, open_timm

    return open_timm(rest, **settings) if scheme == "timm" else open_packaged(rest, **settings)


def _beside(parts: Sequence[Backbone], class_channels: bool) -> Backbone:
    """Several layers side by side, or one layer, perhaps with its class token."""
    if not parts:
        raise InputError("layer=[] names no layer: give one or more, or None for the last map")
    return parts[0] if len(parts) == 1 and not class_channels else BesideBackbone(parts, class_channels)


def _checked(image_size: ImageSize, crop_pct: float | None) -> ImageSize:
    """The size, one number for a square, once it and the crop are found to be possible."""
    if isinstance(image_size, (tuple, list)):
        height, width = image_size
        image_size = (height, width) if height != width else height
    if image_size is not None and np.min(image_size) < 1:
        raise InputError(f"image_size={image_size} must be a positive number of pixels")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise InputError(f"crop_pct={crop_pct} must be above 0 and at most 1")
    return image_size
