"""A network of timm or transformers in memory, as the backbone that a store was made with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from convexhead.errors import InputError
from convexhead.tokens.backbones.base import Backbone, hash_state


def wrap_network(model: nn.Module, spec: str, layer: int | None, preprocessing: dict[str, Any]) -> Backbone:
    """Give a network the preprocessing and the layer of a backbone. It is copied.

    Parameters
    ----------
    model
        Made by ``timm.create_model``, or a model of transformers.
    spec, layer, preprocessing
        Of the backbone that it should be. That it has the same weights is for the caller to check, by `weights_hash`.

    Raises
    ------
    InputError
        A network of another kind than the backbone.
    """
    scheme = spec.partition(":")[0]
    if scheme in ("timm", "packaged") and hasattr(model, "forward_features"):
        from convexhead.tokens.backbones.timm_backbone import TimmBackbone

        config = {key: tuple(v) if isinstance(v, list) else v for key, v in preprocessing.items()}
        config.pop("class token", None)
        weights = hash_state({name: value.detach().cpu() for name, value in model.state_dict().items()})
        return TimmBackbone(spec, copy.deepcopy(model), layer, config, weights)
    if scheme == "hf" and hasattr(model, "config") and "scale" in preprocessing:
        from convexhead.tokens.backbones.hf_backbone import TransformersBackbone
        from convexhead.tokens.backbones.hf_preprocessing import pixels_of_settings

        own = copy.deepcopy(model).to(torch.float32)
        native = getattr(getattr(own.config, "vision_config", own.config), "image_size", None)
        return TransformersBackbone(spec, own, layer, pixels_of_settings(preprocessing, native))
    raise InputError(
        f"a {type(model).__name__} cannot be taken for the backbone {spec!r}: give its name, or open_backbone(...)"
    )
