"""``hf:NAME_OR_FOLDER``: vision backbones through the transformers library."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from convexhead.errors import FileFormatError, HubError, InputError, require
from convexhead.tokens.backbones import Backbone, TokenBatch, hash_state, sequence_grid
from convexhead.tokens.hf_preprocessing import read_preprocessing, resize_and_crop
from convexhead.tokens.hub import cached_file, check_reachable
from convexhead.tokens.timm_import import import_torchvision

# Parameters that put tokens in front of those of the patches.
_PREFIX_NAMES = ("cls_token", "distillation_token", "register_tokens")


class TransformersBackbone(Backbone):
    """A transformers model: its last hidden state, or the hidden state after an inner block."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        spec: str,
        model: nn.Module,
        layer: int | None,
        processor: dict[str, Any],
        image_size: int | None,
    ) -> None:
        """Freeze ``model``; ``processor`` is the configuration of its image processor."""
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.model = model
        self.weights_hash = hash_state(model.state_dict())
        self.preprocessing = read_preprocessing(spec, processor, image_size)
        self.n_prefix = sum(
            parameter.shape[1] for name, parameter in model.named_parameters() if name.endswith(_PREFIX_NAMES)
        )
        for name in ("mean", "std"):
            value = torch.tensor(self.preprocessing[name]).reshape(3, 1, 1) / self.preprocessing["scale"]
            self.register_buffer(name, value, persistent=False)
        self.requires_grad_(False).train(False)
        self._try()

    def prepare(self, image: Image.Image) -> Tensor:
        return resize_and_crop(image, self.preprocessing)

    def forward(self, images: Tensor) -> TokenBatch:
        x = (images.float() - self.mean) / self.std
        output = self._run(x, output_hidden_states=self.layer is not None)
        # hidden_states[0] is the embedding, before any block.
        features = output.last_hidden_state if self.layer is None else output.hidden_states[self.layer + 1]
        if features.ndim == 4:
            grid = (features.shape[2], features.shape[3])
            features = features.flatten(2).transpose(1, 2)
            return TokenBatch(features.float(), features.new_zeros(len(x), 0, features.shape[2]), grid)
        tokens, prefix = features[:, self.n_prefix :], features[:, : self.n_prefix]
        return TokenBatch(tokens.float(), prefix.float(), self._grid(x, tokens.shape[1]))

    def _run(self, x: Tensor, **options: Any) -> Any:
        # Positions are interpolated to other image sizes only by models that are asked to.
        if "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters:
            options["interpolate_pos_encoding"] = True
        return self.model(pixel_values=x, **options)

    def _grid(self, x: Tensor, s: int) -> tuple[int, int]:
        patch = getattr(self.model.config, "patch_size", None)
        if isinstance(patch, int):
            h, w = x.shape[2] // patch, x.shape[3] // patch
            if h * w == s:
                return h, w
        return sequence_grid(s)

    def _try(self) -> None:
        """Run one empty image, so that an impossible layer or image size is refused before any work."""
        size = self.preprocessing["crop"] or self.preprocessing["resize"]
        h, w = (size, size) if isinstance(size, int) else size or (224, 224)
        try:
            with torch.inference_mode():
                if self.layer is not None:
                    output = self._run(torch.zeros(1, 3, h, w), output_hidden_states=True)
                    n_layers = len(output.hidden_states) - 1
                    if not 0 <= self.layer < n_layers:
                        raise InputError(f"layer={self.layer}: the layers of {self.spec!r} are 0 .. {n_layers - 1}")
                self(torch.zeros(1, 3, h, w, dtype=torch.uint8))
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
            if isinstance(error, InputError):
                raise
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{self.spec!r} gives no tokens for images of {h}x{w} pixels: {reason}") from error


def open_hf(name: str, *, layer: int | None, image_size: int | None, crop_pct: float | None) -> TransformersBackbone:
    """Open ``hf:NAME`` or ``hf:FOLDER``.

    Raises:
        InputError: no vision model, or an impossible layer or size.
        FileFormatError: a folder that is no transformers model.
        HubError: neither a folder nor in the local cache, and the hub cannot be reached or does not have it.
        MissingExtraError: transformers is not installed.
    """
    spec = f"hf:{name}"
    if crop_pct is not None:
        raise InputError(f"{spec!r} crops as its image processor says: omit crop_pct")
    local = Path(name).expanduser()
    here = local.is_dir() or cached_file(name, "config.json") is not None
    if not here:
        endpoint = require("huggingface_hub", "sources").constants.ENDPOINT
        check_reachable(endpoint, f"the files of {spec!r}", "give a folder made by save_pretrained: hf:FOLDER")
    import_torchvision()
    transformers = require("transformers", "sources")
    where = str(local) if local.is_dir() else name
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(where, local_files_only=here).to_dict()
        model = transformers.AutoModel.from_pretrained(where, local_files_only=here, dtype=torch.float32)
    except Exception as error:  # of several libraries: missing files, foreign configurations, network
        reason = " ".join(str(error).split())[:300]
        kind = FileFormatError if local.is_dir() else HubError
        raise kind(f"cannot load {spec!r} as a vision model: {reason}") from error
    return TransformersBackbone(spec, model, layer, processor, image_size)
