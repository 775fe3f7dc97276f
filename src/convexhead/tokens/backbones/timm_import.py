"""Importing torchvision and timm whether or not torchvision's compiled operators fit the installed torch."""

from __future__ import annotations

from types import ModuleType

import torch

from convexhead.errors import require

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_declared: list[torch.library.Library] = []
"""Library objects of our declarations. They are kept alive, since torch withdraws declarations with them."""


def import_torchvision() -> ModuleType:
    """Import torchvision, whether or not its compiled operators load.

    On import torchvision describes two of its compiled operators to torch, which fails if they could not be
    loaded, for example for a CUDA build of torchvision beside a CPU build of torch. Only then are the two
    declared, without an implementation: no backbone uses either. A matching pair is left as it is.

    Raises
    ------
    MissingExtraError
        torchvision is not installed.
    """
    try:
        return require("torchvision", "images")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(operator + _SCHEMA)
        _declared.append(library)
    return require("torchvision", "images")


def import_timm() -> ModuleType:
    """Import timm after `import_torchvision`.

    Raises
    ------
    MissingExtraError
        timm or torchvision is not installed.
    """
    import_torchvision()
    return require("timm", "images")
