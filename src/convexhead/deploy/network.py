"""A trained head on its backbone: one network from images to outputs.

    images ──backbone──▶ tokens ──as they were stored──▶ ──as the head reads them──▶ head ──▶ outputs (b, c)

Stored tokens were averaged and rounded by the extraction; a head reads them averaged again, with a class token in
front or not, and through its reduction. The network does the same, so its outputs are those of the run.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from PIL import Image
from torch import Tensor, nn

from convexhead.errors import InputError
from convexhead.estimator_base import HeadEstimator
from convexhead.model import Model
from convexhead.modules import ChannelReduction
from convexhead.tokens.backbones.base import Backbone
from convexhead.tokens.backbones.wrap import wrap_network
from convexhead.tokens.like import open_backbone_like, options_like
from convexhead.tokens.reduce import pool_channels, pool_grid
from convexhead.tokens.store.origin import TokenOrigin

Trained = Model | HeadEstimator | str | Path


class TokenModel(nn.Module):
    """A head with all that it reads stored tokens through: ``(b, s, d)`` as a store holds them ``-> (b, c)``.

    Where the head reads the class token, that is token 0. A head that was fitted on arrays takes such arrays.

    Attributes
    ----------
    head : HeadModule
    class_names : list of str or None
        The name of each output.
    """

    def __init__(self, model: Model, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.head = model.to_module(dtype)
        self.class_names = model.class_names or (None if model.classes is None else [str(c) for c in model.classes])
        self.reduction = None if model.reduction is None else ChannelReduction(model.reduction)
        origin = model.origin
        self.front = int(origin is not None and origin.class_token)
        self.pooled = None if origin is None or origin.token_pool is None else (origin.grid, origin.token_pool)

    def forward(self, tokens: Float[Tensor, "b s d"], *mask: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.read(tokens), *mask)
        return outputs

    def read(self, tokens: Float[Tensor, "b s d"]) -> Float[Tensor, "b t e"]:
        """Stored tokens as the head takes them."""
        if self.pooled is not None:
            front, patches = tokens[:, : self.front], tokens[:, self.front :]
            tokens = torch.cat([front.float(), pool_grid(patches.float(), *self.pooled)], dim=1)
        return tokens if self.reduction is None else self.reduction(tokens)


class ImageModel(nn.Module):
    """A backbone and a head: prepared images ``(b, 3, h, w)`` to outputs ``(b, c)``, ``(b, s, c)`` with pool "none".

    Attributes
    ----------
    backbone : Backbone
        Frozen, in eval mode; its ``model`` is the network itself.
    tokens : TokenModel
        The head and its reduction.
    class_names : list of str or None
        The name of each output.
    preprocessing : dict
        What `prepare` does.
    """

    def __init__(self, backbone: Backbone, model: Model, origin: TokenOrigin, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokens = TokenModel(model, dtype)
        self.class_names, self.preprocessing = self.tokens.class_names, backbone.preprocessing
        self._channels, self._stored = origin.config["channels"], getattr(torch, origin.config["dtype"])
        pool = origin.config["token_pool"]
        self._pool = None if pool is None else (int(pool[0]), int(pool[1]))
        self._grid, self._class_token = origin.grid, origin.class_token

    def prepare(self, image: Image.Image) -> Tensor:
        """Resize and crop an RGB image ``(3, h, w)`` as the backbone does."""
        return self.backbone.prepare(image)

    def forward(self, images: Shaped[Tensor, "b 3 h w"]) -> Tensor:
        outputs: Tensor = self.tokens(self.stored(images))
        return outputs

    def read(self, images: Shaped[Tensor, "b 3 h w"]) -> Float[Tensor, "b s d"]:
        """The tokens of prepared images as the head reads them."""
        tokens: Tensor = self.tokens.read(self.stored(images))
        return tokens

    def stored(self, images: Shaped[Tensor, "b 3 h w"]) -> Float[Tensor, "b s d"]:
        """The tokens of prepared images as a store holds them, the class token in front if it is read."""
        tokens, prefix, grid = self.backbone(images)
        if self._pool is not None:
            tokens, grid = pool_grid(tokens, grid, self._pool), self._pool
        if grid != self._grid:
            raise InputError(f"these images give tokens on the grid {grid}, the head's were on {self._grid}")
        if self._class_token:
            tokens = torch.cat([prefix[:, :1], tokens], dim=1)
        if self._channels is not None:
            tokens = pool_channels(tokens, self._channels)
        return self._rounded(tokens)

    def _rounded(self, tokens: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """Tokens as a store holds them. Gradients pass as if nothing was rounded."""
        if self._stored == torch.float32:
            return tokens
        values = tokens.detach()
        return tokens + (values.to(self._stored).float() - values)


def attach(
    backbone: str | Backbone | nn.Module | None,
    model: Trained,
    *,
    dtype: torch.dtype = torch.float32,
) -> ImageModel:
    """Put a trained head on its backbone.

    Parameters
    ----------
    backbone : str, Backbone, nn.Module or None
        The one that the head was fitted on: its name as of `open_backbone`, an open one, a network of timm or
        transformers with the same weights, or None, which opens it by the name that the run knows.
    model : Model, fitted estimator or path
        A head that was fitted on a token store, or the folder of its run.
    dtype : torch.dtype
        Of the head's weights.

    Raises
    ------
    InputError
        A head that was fitted on arrays; another backbone, other weights or another preprocessing than the head's.

    Examples
    --------
    ``net = ch.attach("timm:vit_small_patch14_dinov2@weights.safetensors", "run")``, then
    ``net(net.prepare(image)[None])`` are the outputs, and ``net.class_names`` says what they mean.
    """
    model = as_model(model)
    origin = model.origin
    if origin is not None and origin.config.get("grids"):
        raise InputError(
            "this head reads images at their own aspect ratio, each with tokens of its own: a network takes images of "
            "one size, so use convexhead predict"
        )
    if origin is None:
        raise InputError(
            "this head was fitted on arrays, which do not say how tokens are made of images: fit it on a token store"
        )
    if isinstance(backbone, nn.Module) and not isinstance(backbone, Backbone):
        backbone = wrap_network(backbone, origin.backbone, origin.config["layer"], origin.config["preprocessing"])
    options = options_like(origin, {"backbone": backbone, "image_size": None, "crop_pct": None})
    return ImageModel(open_backbone_like(origin, options), model, origin, dtype).eval()


def as_model(model: Trained) -> Model:
    """What was trained, of an estimator or a folder too."""
    if isinstance(model, (str, Path)):
        return Model.load(model)
    return model if isinstance(model, Model) else model.model_
