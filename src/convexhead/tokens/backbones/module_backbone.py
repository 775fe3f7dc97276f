"""A network of the user's own, with the transform that makes its input."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from convexhead.errors import InputError
from convexhead.tokens.backbones.base import TokenBatch, hash_state
from convexhead.tokens.backbones.layout import NetworkBackbone

Transform = Callable[[Image.Image], Tensor]
SIZES = (320, 256), (48, 64)
"""Width and height of the images of noise on which a transform is tried: one is cut, one is enlarged."""


class ModuleBackbone(NetworkBackbone):
    """A module that turns images into features ``(b, d, h, w)``, ``(b, h, w, d)``, ``(b, s, d)`` or ``(b, d)``.

    The module is copied, put into eval mode and called by one thread at a time. What its features are is measured, and
    features that a second call does not repeat are refused.

    Parameters
    ----------
    model
        The network.
    transform
        Makes an RGB image a float tensor ``(c, height, width)``. None: of a `DataLoader`, whose batches are ready.
    name
        What model and transform are called; None: the class of the model.

    Raises
    ------
    InputError
        A module that cannot be copied, or a transform that gives no such tensor or another one at each call.
    """

    def __init__(self, model: nn.Module, transform: Transform | None, name: str | None) -> None:
        try:
            model = copy.deepcopy(model)
        except Exception as error:  # of any network's own code
            raise InputError(
                f"the module {type(model).__name__} cannot be copied ({error}): give one that copy.deepcopy takes"
            ) from error
        super().__init__(f"module:{name or type(model).__name__}", None, model)
        self.name = name
        self.requires_grad_(False).train(False)
        self.weights_hash = hash_state({key: value.detach().cpu() for key, value in model.state_dict().items()})
        self.preprocessing = {} if transform is None else {"transform": _measured(transform)}
        self.transform = transform
        self._turn = threading.Lock()
        self._threads = torch.get_num_threads()

    def prepare(self, image: Image.Image) -> Tensor:
        """Apply the transform."""
        if self.transform is None:
            raise InputError(
                f"{self.spec!r} needs a transform, which makes its input of an RGB image: "
                "open_backbone(model, transform=...)"
            )
        return _tensor(self.transform, image)

    def forward(self, images: Tensor) -> TokenBatch:
        with self._turn:
            before = torch.get_num_threads()
            torch.set_num_threads(self._threads)
            try:
                return self.layout(images).batch(self.features(images))
            finally:
                torch.set_num_threads(before)

    def features(self, x: Tensor) -> Any:
        features = self.model(x)
        return features.unsqueeze(1) if isinstance(features, Tensor) and features.ndim == 2 else features


def _tensor(transform: Transform, image: Image.Image) -> Tensor:
    tensor = transform(image)
    if not isinstance(tensor, Tensor) or tensor.ndim != 3 or not tensor.is_floating_point():
        found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise InputError(f"transform must give a float tensor (c, height, width), not {found}")
    return tensor


def _measured(transform: Transform) -> str:
    """Return a text that two transforms share only if they do the same to images of noise.

    Raises
    ------
    InputError
        It fails, or does something else at each call.
    """
    digest = hashlib.sha256()
    for width, height in SIZES:
        noise = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        image = Image.fromarray(noise.numpy())
        try:
            first, again = _tensor(transform, image.copy()), _tensor(transform, image.copy())
        except InputError:
            raise
        except Exception as error:  # of the user's own code
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(f"transform fails on an RGB image of {width}x{height} pixels: {reason}") from error
        if not torch.equal(first, again):
            raise InputError("transform gives another tensor at each call: give one without random steps")
        digest.update(f"{tuple(first.shape)}{first.dtype}".encode())
        digest.update(first.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256 of noise {digest.hexdigest()[:16]}"
