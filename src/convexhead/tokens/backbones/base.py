"""What every backbone is: a frozen network that turns images into tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Self

State = dict[str, Tensor]
ImageSize = int | tuple[int, int] | None
"""Side of a square input in pixels, or ``(height, width)``; None is the backbone's own."""


Layer = int | None | Sequence[int | None]
"""An inner block, None for the last map, or several of these."""


class TokenBatch(NamedTuple):
    """What a backbone returns for ``b`` images.

    Attributes
    ----------
    tokens
        float32 ``(b, s, d)`` with ``s = h * w``, row by row over the grid.
    prefix
        float32 ``(b, n_prefix, d)``, all other tokens, those in front of the patches (class, register)
        before those behind them (detection); ``n_prefix`` is often 0.
    grid
        ``(h, w)``.
    """

    tokens: Tensor
    prefix: Tensor
    grid: tuple[int, int]


class Backbone(nn.Module):
    """A frozen feature extractor together with its preprocessing; always in eval mode.

    Attributes
    ----------
    spec
        The string that opens it.
    layer
        Index of the inner block whose output is taken, or None for the final map; a list of several.
    channels
        Of several layers side by side, or with the class token: ``groups``, the number of channels of each, and
        ``class``, whether the last group is the class token's. Else empty.
    weights_hash
        SHA-256 over names, types and values of all weights; empty without weights.
    most_tokens
        Where images keep their aspect ratio, and lie on grids of their own, the most tokens that one can have;
        None where all lie on one grid.
    preprocessing
        Every setting on which the pixels depend, as plain JSON values.
    """

    spec: str
    layer: Layer
    weights_hash: str
    preprocessing: dict[str, Any]
    most_tokens: int | None = None
    channels: dict[str, Any] = {}  # noqa: RUF012 (never changed in place)

    def prepare(self, image: Image.Image) -> Tensor:
        """Resize and crop an RGB image to uint8 ``(3, height, width)``. Safe to call from several threads."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> TokenBatch:
        """Extract tokens from a uint8 batch ``(b, 3, height, width)`` of prepared images."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: normalisation statistics and dropout must not depend on the caller."""
        return super().train(False)


def layers_in_words(layer: Layer, class_channels: bool) -> str:
    """Which layers, for people: ``block 4``, ``block 4 and last map with class token``; empty of the last map alone.

    >>> layers_in_words([4, None], True)
    'block 4 and last map with class token'
    """
    several = list(layer) if isinstance(layer, Sequence) else [layer]
    words = " and ".join("last map" if each is None else f"block {each}" for each in several)
    if class_channels:
        return f"{words} with class token"
    return "" if layer is None else words


def hash_state(state: State) -> str:
    """Return the SHA-256 over names, types, shapes and values of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
