"""Backbones out of timm: CNNs, ViTs, Mixers, Swin, ..., cut after their last block or an inner one."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from convexhead.errors import InputError
from convexhead.tokens.backbones.aspect import KeptAspect
from convexhead.tokens.backbones.base import TokenBatch
from convexhead.tokens.backbones.fold import fold_batch_norm
from convexhead.tokens.backbones.layout import NetworkBackbone
from convexhead.tokens.backbones.timm_import import import_timm

if TYPE_CHECKING:
    from typing_extensions import Self

FOLDED = 1e-4
"""Relative change of the tokens that folding may make: rounding in float32 is some 1e-6."""


def has_registers_alone(model: nn.Module) -> bool:
    """Whether the tokens in front of the patches are registers, and none of them is a class token."""
    registers = getattr(model, "num_reg_tokens", 0) or 0
    return int(getattr(model, "num_prefix_tokens", 0)) == registers > 0


class TimmBackbone(NetworkBackbone):
    """A timm model without its classifier, cut after its last block or after an inner one."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        spec: str,
        model: nn.Module,
        layer: int | None,
        config: dict[str, Any],
        weights: str,
        *,
        keep_aspect: bool = False,
    ) -> None:
        """Freeze ``model``, whose data configuration is ``config`` and whose weights hash to ``weights``.

        With ``keep_aspect`` the height of the configuration's input is the longer side of an image.
        """
        if config["input_size"][0] != 3:
            raise InputError(f"{spec!r} takes images of {config['input_size'][0]} channels, not RGB: choose another")
        super().__init__(spec, layer, model)
        self.weights_hash = weights
        self.preprocessing = {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}
        self._kept = self._kept_aspect(config) if keep_aspect else None
        if has_registers_alone(model):
            self.preprocessing["class token"] = False
        # Up to timm's last step, which makes floats: bytes are four times cheaper to queue and to move.
        self._transform = import_timm().data.create_transform(**config, use_prefetcher=True)
        for name in ("mean", "std"):
            value = torch.tensor(config[name]).reshape(3, 1, 1) * 255
            self.register_buffer(name, value, persistent=False)
        self.requires_grad_(False).train(False)
        self.to("cpu")
        self._try(config["input_size"])
        if self._kept is not None:
            self._try_shapes(self._kept)
        self._fold(config["input_size"])

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As torch does it, in the order of channels in which convolutions are fast there."""
        super().to(*args, **kwargs)
        self.model.to(memory_format=self._memory_format())  # type: ignore[call-overload]
        return self

    def _memory_format(self) -> torch.memory_format:
        """On a CPU channels last is up to twice as fast; on a GPU depthwise convolutions in float32 are slow so."""
        return torch.channels_last if self.mean.device.type == "cpu" else torch.contiguous_format

    def _kept_aspect(self, config: dict[str, Any]) -> KeptAspect:
        """How images are scaled to whole tokens of the last map, those of inner blocks among them."""
        reductions = [info["reduction"] for info in getattr(self.model, "feature_info", None) or []]
        if not reductions:
            raise InputError(f"timm does not say how many pixels a token of {self.spec!r} is: leave keep_aspect out")
        self.preprocessing["keep_aspect"] = True
        for name in ("crop_pct", "crop_mode"):
            self.preprocessing.pop(name, None)
        return KeptAspect(config["input_size"][1], max(reductions), config["interpolation"]).check(self.spec)

    def _try_shapes(self, kept: KeptAspect) -> None:
        """Refuse a network that does not take images of any shape, and count the most tokens."""
        h, w = self.layout(torch.zeros(1, 3, kept.longest, kept.longest)).grid
        self.most_tokens = h * w
        self.layout(torch.zeros(1, 3, *kept.size(2, 1)))

    def prepare(self, image: Image.Image) -> Tensor:
        if self._kept is not None:
            return self._kept.prepare(image)
        tensor: Tensor = self._transform(image)
        return tensor

    def forward(self, images: Tensor) -> TokenBatch:
        x = ((images.float() - self.mean) / self.std).contiguous(memory_format=self._memory_format())
        layout = self.layout(x)
        if self.layer is None:
            return layout.batch(self.features(x))
        features, prefix = self._inner(x, self.layer)
        batch = layout.batch(features)
        return batch if prefix is None else batch._replace(prefix=prefix.float())

    def features(self, x: Tensor) -> Any:
        return self.model.forward_features(x) if self.layer is None else self._inner(x, self.layer)[0]  # type: ignore[operator]

    def _inner(self, x: Tensor, layer: int) -> tuple[Any, Tensor | None]:
        """Return the output of one block, before any closing normalisation, and its prefix tokens if timm says."""
        options = {"return_prefix_tokens": True} if self._accepts("return_prefix_tokens") else {}
        (output,) = self._intermediates(x, indices=[layer + self._has_stem()], stop_early=True, **options)
        return output if isinstance(output, tuple) else (output, None)

    def _intermediates(self, x: Tensor, **options: Any) -> list[Any]:
        if self._has_stem():
            options["extra_blocks"] = True
        outputs: list[Any] = self.model.forward_intermediates(x, intermediates_only=True, **options)  # type: ignore[operator]
        return outputs

    def _has_stem(self) -> bool:
        """Whether timm gives every block, not only the last of a resolution; it then counts the stem as 0."""
        return self._accepts("extra_blocks")

    def _accepts(self, option: str) -> bool:
        return option in inspect.signature(self.model.forward_intermediates).parameters  # type: ignore[arg-type]

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
        """Refuse an impossible layer, image size or network before any work."""
        size = "x".join(map(str, input_size[1:]))
        if self.layer is not None and not hasattr(self.model, "forward_intermediates"):
            raise InputError(f"timm does not give the inner layers of {self.spec!r}: leave layer out")
        x = torch.zeros(1, *input_size).contiguous(memory_format=self._memory_format())
        if self.layer is not None:
            try:
                with torch.no_grad():
                    n_layers = len(self._intermediates(x)) - self._has_stem()
            except Exception as error:  # of any network's own code
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise InputError(
                    f"timm does not give the inner layers of {self.spec!r} for images of {size} pixels ({reason}): "
                    "leave layer out or choose another image_size"
                ) from error
            if not 0 <= self.layer < n_layers:
                raise InputError(f"layer={self.layer}: the layers of {self.spec!r} are 0 .. {n_layers - 1}")
        self.layout(x)
