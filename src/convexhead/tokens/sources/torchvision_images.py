"""``torchvision:NAME[@ROOT]``: the small data sets that torchvision keeps as arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from convexhead.errors import FileFormatError, HubError, choose
from convexhead.tokens.backbones.hub import check_reachable
from convexhead.tokens.backbones.timm_import import import_torchvision
from convexhead.tokens.sources.image_arrays import ArraySplit, ImageArrays

NAMES = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST")


def open_torchvision(name: str) -> ImageArrays:
    """Open a data set under ``ROOT`` (by default in torch's cache), downloading it where it is missing.

    Raises
    ------
    InputError
        A data set that is not one of `NAMES`.
    FileFormatError
        Its files are damaged.
    HubError
        It is not on disk, and its site cannot be reached or does not give it.
    MissingExtraError
        torchvision is not installed.
    """
    name, _, root = name.partition("@")
    choose("torchvision data set", name, NAMES)
    cls = getattr(import_torchvision().datasets, name)
    folder = Path(root).expanduser() if root else Path(torch.hub.get_dir()).parent / "convexhead-datasets"
    parts = {split: _load(cls, folder, split == "train") for split in ("train", "test")}
    for split, data in parts.items():
        if len(data.data) != len(data.targets):
            raise FileFormatError(
                f"torchvision:{name} in {str(folder)!r} has {len(data.data)} {split} images and {len(data.targets)} "
                "labels: delete the folder to download it again"
            )
    splits = {
        split: ArraySplit(
            np.asarray(data.data),
            np.asarray(data.targets, np.int64),
            [f"{split}-{i}" for i in range(len(data.targets))],
        )
        for split, data in parts.items()
    }
    return ImageArrays(f"torchvision:{name}", splits, [str(each) for each in parts["train"].classes])


def _load(cls: Any, root: Path, train: bool) -> Any:
    try:
        return cls(str(root), train=train, download=False)
    # Not there, or cut short: torchvision says both with this one.
    except RuntimeError:
        address = getattr(cls, "url", None) or cls.mirrors[0]
        check_reachable(
            address,
            f"the images of torchvision:{cls.__name__}",
            f"put them under {str(root)!r} or use another source",
        )
    except Exception as error:  # of pickle, struct, ...: torchvision checks the sums of some files only
        raise FileFormatError(
            f"torchvision:{cls.__name__} in {str(root)!r} is damaged ({type(error).__name__}): delete the folder to "
            "download it again"
        ) from error
    try:
        return cls(str(root), train=train, download=True)
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise HubError(f"cannot download torchvision:{cls.__name__}: {reason}") from error
