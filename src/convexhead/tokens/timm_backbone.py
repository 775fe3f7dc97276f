"""Backbones out of timm: CNNs, ViTs, Mixers, Swin, ..., cut after their last block or an inner one."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from convexhead.errors import InputError
from convexhead.tokens.backbones import Backbone, TokenBatch, sequence_grid
from convexhead.tokens.fold import fold_batch_norm
from convexhead.tokens.timm_import import import_timm

if TYPE_CHECKING:
    from typing_extensions import Self

FOLDED = 1e-4
"""Relative change of the tokens that folding may make: rounding in float32 is some 1e-6."""


class TimmBackbone(Backbone):
    """A timm model without its classifier, cut after its last block or after an inner one."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: str, model: nn.Module, layer: int | None, config: dict[str, Any], weights: str) -> None:
        """Freeze ``model``, whose data configuration is ``config`` and whose weights hash to ``weights``."""
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.weights_hash = weights
        self.preprocessing = {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}
        # Up to timm's last step, which makes floats: bytes are four times cheaper to queue and to move.
        self._transform = import_timm().data.create_transform(**config, use_prefetcher=True)
        self.model = model
        for name in ("mean", "std"):
            value = torch.tensor(config[name]).reshape(3, 1, 1) * 255
            self.register_buffer(name, value, persistent=False)
        self.requires_grad_(False).train(False)
        self.to("cpu")
        self._try(config["input_size"])
        self._fold(config["input_size"])

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As torch does it, in the order of channels in which convolutions are fast there."""
        super().to(*args, **kwargs)
        self.model.to(memory_format=self._memory_format())  # type: ignore[call-overload]
        return self

    def _memory_format(self) -> torch.memory_format:
        """On a CPU channels last is up to twice as fast; on a GPU depthwise convolutions in float32 are slow so."""
        return torch.channels_last if self.mean.device.type == "cpu" else torch.contiguous_format

    def prepare(self, image: Image.Image) -> Tensor:
        tensor: Tensor = self._transform(image)
        return tensor

    def forward(self, images: Tensor) -> TokenBatch:
        x = ((images.float() - self.mean) / self.std).contiguous(memory_format=self._memory_format())
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
        return sequence_grid(s)

    @torch.no_grad()  # not in inference mode: a GPU's convolutions refuse weights that were made there
    def _fold(self, input_size: tuple[int, int, int]) -> None:
        """Fold batch normalisations where the tokens of a test image stay the same to rounding."""
        image = torch.randint(256, (1, *input_size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        model, before = self.model, self(image).tokens
        self.model = fold_batch_norm(model)
        self.to("cpu")  # the new weights too
        if self.model is not model and not (self(image).tokens - before).norm() <= FOLDED * before.norm():
            self.model = model

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
                        raise InputError(f"layer={self.layer}: the layers of {self.spec!r} are 0 .. {n_layers - 1}")
                self(torch.zeros(1, *input_size, dtype=torch.uint8))
        except (AssertionError, RuntimeError, IndexError, TypeError) as error:
            raise InputError(f"{self.spec!r} cannot take images of {size} pixels: {error}") from error
