"""Frozen backbones that turn images into tokens, named by one string.

===============================  =========================================================================
``packaged:efficientnet-lite0``  ImageNet EfficientNet-Lite0 out of a package of the Python index
``timm:NAME``                    a timm model with published weights, from the hub or its local cache
``timm:NAME@FILE.safetensors``   the same architecture with weights from a file
``hf:NAME_OR_FOLDER``            a vision model of transformers, from its hub, the cache or a folder
``patches:K``                    no backbone: the raw K x K patches of the image
===============================  =========================================================================
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from convexhead.errors import InputError, choose, require

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Self

State = dict[str, Tensor]


class TokenBatch(NamedTuple):
    """What a backbone returns for ``b`` images.

    Attributes:
        tokens: float32 ``(b, s, d)`` with ``s = h * w``, row by row over the grid.
        prefix: float32 ``(b, n_prefix, d)``, all other tokens, those in front of the patches (class, register)
            before those behind them (detection); ``n_prefix`` is often 0.
        grid: ``(h, w)``.
    """

    tokens: Tensor
    prefix: Tensor
    grid: tuple[int, int]


class Backbone(nn.Module):
    """A frozen feature extractor together with its preprocessing; always in eval mode.

    Attributes:
        spec: the string that opens it.
        layer: index of the inner block whose output is taken, or None for the final map.
        weights_hash: SHA-256 over names, types and values of all weights; empty without weights.
        preprocessing: every setting on which the pixels depend, as plain JSON values.
    """

    spec: str
    layer: int | None
    weights_hash: str
    preprocessing: dict[str, Any]

    def prepare(self, image: Image.Image) -> Tensor:
        """Resize and crop an RGB image to uint8 ``(3, height, width)``. Safe to call from several threads."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> TokenBatch:
        """Extract tokens from a uint8 batch ``(b, 3, height, width)`` of prepared images."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: normalisation statistics and dropout must not depend on the caller."""
        return super().train(False)


def open_backbone(
    spec: str | Backbone,
    *,
    layer: int | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
) -> Backbone:
    """Open a backbone by its specification (see the module's table).

    Args:
        spec: the specification, or a backbone that is open already (which the rest cannot change).
        layer: inner block to take, counted from 0 (a stage for networks that timm divides into stages); None
            takes the final map.
        image_size: side of the square input in pixels; None is the backbone's own. Resizing and cropping keep
            their proportion; a transformers processor that cannot give such squares is refused.
        crop_pct: share of the resized image that the centre crop keeps; None is the backbone's own, 1 keeps
            all, which is better for small images without margins. Of timm only: transformers models crop as
            their processor says.

    Raises:
        InputError: unknown name, impossible layer or size.
        FileFormatError: a weights file that is not safetensors or does not fit the architecture.
        MissingExtraError: timm, or the package with the weights, is not installed.
        HubError: weights are neither in the local cache nor to be had from the hub.
    """
    if isinstance(spec, Backbone):
        if (layer, image_size, crop_pct) != (None, None, None):
            raise InputError("layer, image_size and crop_pct need the name of a backbone, not an open one")
        return spec
    scheme, _, name = spec.partition(":")
    choose("backbone", scheme, ["packaged", "timm", "hf", "patches"])
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size={image_size} must be a positive number of pixels")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise InputError(f"crop_pct={crop_pct} must be above 0 and at most 1")
    # Imported here because Pillow, timm and transformers are optional and slow to import.
    require("PIL", "images")
    settings: dict[str, Any] = {"layer": layer, "image_size": image_size, "crop_pct": crop_pct}
    if scheme == "patches":
        from convexhead.tokens.backbones.patches import open_patches

        return open_patches(name, **settings)
    if scheme == "hf":
        from convexhead.tokens.backbones.hf_backbone import open_hf

        return open_hf(name, **settings)
    from convexhead.tokens.backbones.timm_weights import open_packaged, open_timm

    return open_timm(name, **settings) if scheme == "timm" else open_packaged(name, **settings)


def hash_state(state: State) -> str:
    """Return the SHA-256 over names, types, shapes and values of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
