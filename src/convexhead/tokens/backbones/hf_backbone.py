"""``hf:NAME_OR_FOLDER``: vision backbones through the transformers library."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from convexhead.errors import FileFormatError, HubError, InputError, require
from convexhead.tokens.backbones.aspect import longest_side
from convexhead.tokens.backbones.base import ImageSize, TokenBatch, hash_state
from convexhead.tokens.backbones.hf_preprocessing import Pixels, choose_pixels, kept_pixels
from convexhead.tokens.backbones.hub import cached_file, check_reachable
from convexhead.tokens.backbones.layout import NetworkBackbone
from convexhead.tokens.backbones.timm_import import import_torchvision

# Models whose list of hidden states begins after the first block instead of before it.
_WITHOUT_EMBEDDING = ("mobilenet_v1", "mobilenet_v2")


class TransformersBackbone(NetworkBackbone):
    """A transformers model: its last hidden state, or the hidden state after an inner block."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: str, model: nn.Module, layer: int | None, pixels: Pixels) -> None:
        """Freeze the vision part of ``model``; ``pixels`` is what its image processor does."""
        super().__init__(spec, layer, _vision_part(spec, model))
        self._config: Any = self.model.config
        self._options = _options(spec, self.model)
        self.weights_hash = hash_state(self.model.state_dict())
        self.preprocessing = pixels.settings
        self._pixels = pixels
        for name in ("mean", "std"):
            self.register_buffer(name, getattr(pixels, name), persistent=False)
        self.requires_grad_(False).train(False)
        self._try()
        if (kept := pixels.kept) is not None:
            self.most_tokens = (kept.longest // kept.patch) ** 2
            for size in ((kept.longest, kept.longest), kept.size(2, 1), kept.size(1, 2)):
                self(torch.zeros(1, 3, *size))

    def prepare(self, image: Image.Image) -> Tensor:
        """Return the image's bytes, or the floats of the image processor where that is used itself."""
        return self._pixels.prepare(image)

    def forward(self, images: Tensor) -> TokenBatch:
        x = images if images.is_floating_point() else (images.float() - self.mean) / self.std
        layout, kept = self.layout(x), self._pixels.kept
        if kept is not None and layout.grid != (grid := (x.shape[2] // kept.patch, x.shape[3] // kept.patch)):
            raise InputError(
                f"{self.spec!r} gives {layout.grid[0]}x{layout.grid[1]} tokens for images of {x.shape[2]}x{x.shape[3]} "
                f"pixels, which have {grid[0]}x{grid[1]} patches: leave keep_aspect out"
            )
        return layout.batch(self.features(x))

    def features(self, x: Tensor) -> Any:
        if self.layer is None:
            return _last(self._run(x))
        # The embedding comes before the first block.
        return self._hidden(x)[self.layer + (self._config.model_type not in _WITHOUT_EMBEDDING)]

    def _hidden(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden: tuple[Tensor, ...] = self._run(x, output_hidden_states=True).hidden_states
        return hidden

    def _run(self, x: Tensor, **options: Any) -> Any:
        options |= self._options
        if self._config.model_type == "vit_mae":
            # It sorts the patches by noise before it masks the last of them: keep their order.
            n = (x.shape[2] // self._config.patch_size) * (x.shape[3] // self._config.patch_size)
            options["noise"] = torch.arange(n, device=x.device, dtype=x.dtype).expand(len(x), n)
        return self.model(pixel_values=x, **options)

    def _try(self) -> None:
        """Refuse an impossible layer, image size or network before any work."""
        h, w = self._pixels.size
        x = torch.zeros(1, 3, h, w)
        if self.layer is not None:
            try:
                with torch.inference_mode():
                    n_layers = len(self._hidden(x)) - (self._config.model_type not in _WITHOUT_EMBEDDING)
            except Exception as error:  # of any network's own code
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise InputError(
                    f"{self.spec!r} does not give its inner layers for images of {h}x{w} pixels ({reason}): "
                    "leave layer out or choose another image_size"
                ) from error
            if not 0 <= self.layer < n_layers:
                raise InputError(f"layer={self.layer}: the layers of {self.spec!r} are 0 .. {n_layers - 1}")
        self.layout(x)


def _last(output: Any) -> Any:
    """Return the final features of a model's output: transformers' backbones for detectors give a list of maps."""
    if (last := getattr(output, "last_hidden_state", None)) is not None:
        return last
    if maps := getattr(output, "feature_maps", None):
        return maps[-1]
    raise InputError("gives no last hidden state")


def _vision_part(spec: str, model: Any) -> nn.Module:
    """Return the tower of a model of several that sees the images; a model of one is its own."""
    for name in ("vision_config", "image_config"):
        config = getattr(model.config, name, None)
        if config is None:
            continue
        for module in model.modules():
            if module is not model and type(getattr(module, "config", None)) is type(config):
                part: nn.Module = module
                return part
        raise InputError(f"{spec!r} has no part that sees images alone: choose a vision model")
    return model


def _options(spec: str, model: Any) -> dict[str, Any]:
    """Return the arguments beside the images with which a vision model is called."""
    accepted = inspect.signature(model.forward).parameters
    if "pixel_values" not in accepted:
        raise InputError(
            f"{spec!r} is no vision model that takes one image as pixels ({type(model).__name__} takes "
            f"{', '.join(list(accepted)[:3])}): choose another backbone"
        )
    if model.config.model_type == "vit_mae":
        model.config.mask_ratio = 0.0
    # Positions are interpolated to other image sizes only by models that are asked to.
    return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}


def open_hf(
    name: str, *, layer: int | None, image_size: ImageSize, crop_pct: float | None, keep_aspect: bool
) -> TransformersBackbone:
    """Open ``hf:NAME`` or ``hf:FOLDER``.

    Raises
    ------
    InputError
        No vision model, tokens that are on no grid, or an impossible layer or size.
    FileFormatError
        A folder that is no transformers model.
    HubError
        Neither a folder nor in the local cache, and the hub cannot be reached or does not have it.
    MissingExtraError
        transformers is not installed.
    """
    spec = f"hf:{name}"
    if crop_pct is not None:
        raise InputError(f"{spec!r} crops as its image processor says: omit crop_pct")
    longest = longest_side(spec, image_size, crop_pct) if keep_aspect else None
    if isinstance(image_size, tuple):
        raise InputError(f"{spec!r} takes squares: give one number as image_size")
    local = Path(name).expanduser()
    here = local.is_dir() or cached_file(name, "config.json") is not None
    if not here:
        endpoint = require("huggingface_hub", "sources").constants.ENDPOINT
        check_reachable(endpoint, f"the files of {spec!r}", "give a folder made by save_pretrained: hf:FOLDER")
    import_torchvision()
    transformers = require("transformers", "sources")
    where = str(local) if local.is_dir() else name
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(where, local_files_only=here)
        model = transformers.AutoModel.from_pretrained(where, local_files_only=here, dtype=torch.float32)
    except Exception as error:  # of several libraries: missing files, foreign configurations, network
        reason = " ".join(str(error).split())[:300]
        kind = FileFormatError if local.is_dir() else HubError
        raise kind(f"cannot load {spec!r} as a vision model: {reason}") from error
    vision = getattr(model.config, "vision_config", model.config)
    if longest is None:
        pixels = choose_pixels(spec, processor, image_size, getattr(vision, "image_size", None))
    elif isinstance(patch := getattr(vision, "patch_size", None), int):
        pixels = kept_pixels(spec, processor, longest, patch)
    else:
        raise InputError(f"transformers does not say how many pixels a token of {spec!r} is: leave keep_aspect out")
    return TransformersBackbone(spec, model, layer, pixels)
