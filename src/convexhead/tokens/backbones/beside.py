"""Several layers of one backbone, and perhaps its class token, as channels beside each other.

    token t = [layer 4 of t | layer 8 of t | …],    with the class token  [… | class token of layer 8]

The class token has no place in the image: its channels are the same in all tokens of an image, which then have no other
class token. Tokens of layers with a finer grid are averaged down to the coarsest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from convexhead.errors import InputError
from convexhead.tokens.backbones.base import Backbone, TokenBatch
from convexhead.tokens.reduce import pool_grid

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Self


class BesideBackbone(Backbone):
    """What several ``parts`` give for the same image, side by side in the channels.

    Each part runs by itself, up to its layer.

    Parameters
    ----------
    parts
        The same network, opened at each of the layers.
    class_channels
        Whether the class token of the last part is put beside them.

    Raises
    ------
    InputError
        A layer twice, grids that do not divide each other, or no class token.
    """

    def __init__(self, parts: Sequence[Backbone], class_channels: bool) -> None:
        super().__init__()
        first = parts[0]
        layers = [cast("int | None", part.layer) for part in parts]
        if twice := [layer for layer in layers if layers.count(layer) > 1]:
            raise InputError(f"layer={layers} names {'the last map' if twice[0] is None else twice[0]} twice")
        self.spec, self.weights_hash, self.preprocessing = first.spec, first.weights_hash, first.preprocessing
        self.layer = layers if len(layers) > 1 else layers[0]
        if first.most_tokens is not None:
            self.most_tokens = min(part.most_tokens for part in parts if part.most_tokens is not None)
        self.parts, self._class = nn.ModuleList(parts), class_channels
        if class_channels and first.preprocessing.get("class token", True) is False:
            raise InputError(f"the tokens that {self.spec!r} puts in front are registers: leave class_channels out")
        self.channels = {"groups": self._measured_groups(), "class": class_channels}

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As each part does it."""
        for part in self.parts:
            part.to(*args, **kwargs)
        return self

    def prepare(self, image: Image.Image) -> Tensor:
        prepared: Tensor = self.parts[0].prepare(image)  # type: ignore[operator]
        return prepared

    def forward(self, images: Tensor) -> TokenBatch:
        batches: list[TokenBatch] = [part(images) for part in self.parts]
        h, w = (min(batch.grid[axis] for batch in batches) for axis in (0, 1))
        grids = [batch.grid for batch in batches]
        if any(a % h or b % w for a, b in grids):
            raise InputError(f"layer={self.layer}: the grids {grids} do not divide each other: choose other layers")
        tokens = [
            batch.tokens if batch.grid == (h, w) else pool_grid(batch.tokens, batch.grid, (h, w)) for batch in batches
        ]
        prefix = torch.cat([batch.prefix for batch in batches], 2)
        if self._class:
            tokens.append(batches[-1].prefix[:, :1].expand(-1, h * w, -1))
            prefix = tokens[0].new_empty(len(images), 0, sum(each.shape[2] for each in tokens))
        return TokenBatch(torch.cat(tokens, 2), prefix, (h, w))

    @torch.inference_mode()
    def _measured_groups(self) -> list[int]:
        """The number of channels of each part, and of the class token."""
        from PIL import Image

        batches = [part(self.prepare(Image.new("RGB", (256, 256)))[None]) for part in self.parts]
        groups = [batch.tokens.shape[2] for batch in batches]
        if not self._class:
            return groups
        if not batches[-1].prefix.shape[1]:
            raise InputError(f"{self.spec!r} has no class token: leave class_channels out")
        return [*groups, batches[-1].prefix.shape[2]]
