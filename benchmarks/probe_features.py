"""Features for `optimiser_noise.py`: mean tokens of four layers of two backbones, and patches of road scenes.

    python benchmarks/probe_features.py FOLDER [--cifar100 IMAGES] [--vit WEIGHTS] [--camvid IMAGES]

writes ``FOLDER/DATASET/FEATURES.npz`` with ``X_train (n, d)``, ``y_train (n,)`` and the same of val and test. Files
that are there already stay.

========  ============================================================================================================
digits    scikit-learn's 1,797: their 64 pixels; EfficientNet-Lite0's block 4 at 80 pixels
cifar100  80 train and 20 test images of each class, as ``convexhead cifar100 --scale 10k`` chooses and splits them:
          blocks 4, 5, 6 and last map of EfficientNet-Lite0 at 224 pixels; with WEIGHTS (of timm's
          vit_small_patch14_dinov2) blocks 6, 8, 10 and last map of a ViT-S/14 at 112 pixels, without its class token
camvid    tokens of 32 x 32 pixels, each with the class of most of its pixels, of every fourth train image; block 4 and
          last map of EfficientNet-Lite0 at 288 x 384 pixels; ``test_groups`` are the images
========  ============================================================================================================

All layers of a backbone come from one pass over the images. Where the source has no val split, every fifth train image
of each class is held out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from camvid import NAMES
from convexhead.experiments.splits import Subset
from convexhead.tokens import extract, open_backbone, open_source
from convexhead.tokens.sources.base import ImageSource

LITE0 = "packaged:efficientnet-lite0"
VIT = "timm:vit_small_patch14_dinov2"
BATCH = 8
EVERY = 4
"""One of so many train images of CamVid is used: frames of a drive follow each other."""
Array = NDArray[np.float32]


def mean_tokens(source: ImageSource, split: str, backbone: torch.nn.Module, layers: Sequence[int]) -> list[Array]:
    """``(n, d)`` of each of the ``layers`` and of the last map."""
    found: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]
    n = len(source.files(split))
    for start in range(0, n, BATCH):
        images = [backbone.prepare(source.load(split, i)) for i in range(start, min(start + BATCH, n))]
        with torch.inference_mode():
            for kept, each in zip(found, _maps(backbone, torch.stack(images), layers), strict=True):
                kept.append(each)
    return [torch.cat(kept).numpy() for kept in found]


def _maps(backbone: torch.nn.Module, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """The mean token of each image, one ``(b, d)`` a layer."""
    x = (images.float() - backbone.mean) / backbone.std
    prefix = getattr(backbone.model, "num_prefix_tokens", 0)
    if prefix:
        last, inner = backbone.model.forward_intermediates(x, indices=list(layers))
        return [each.mean((2, 3)) for each in inner] + [last[:, prefix:].mean(1)]
    # A network of convolutions counts its stem as 0 among the blocks.
    last, inner = backbone.model.forward_intermediates(x, indices=[k + 1 for k in layers], extra_blocks=True)
    return [each.mean((2, 3)) for each in [*inner, last]]


def held_out(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to train on and to choose by, as `convexhead.experiments.splits.hold_out` draws them."""
    kept, held = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return np.sort(kept), np.sort(held)


def write(path: Path, train: Array, y: NDArray[np.int64], test: Array, y_test: NDArray[np.int64]) -> None:
    """One file, a fifth of ``train`` held out."""
    kept, held = held_out(y)
    _save(path, X_train=train[kept], y_train=y[kept], X_val=train[held], y_val=y[held], X_test=test, y_test=y_test)


def _save(path: Path, **arrays: NDArray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)
    print(path, {name: values.shape for name, values in arrays.items()}, flush=True)


def write_layers(
    source: ImageSource, spec: str, layers: Sequence[int], paths: Sequence[Path], size: int | None = None
) -> None:
    """A file for each of the layers and for the last map; ``paths`` may leave some of the last ones out."""
    if all(path.exists() for path in paths):
        return
    backbone = open_backbone(spec, image_size=size, crop_pct=1.0)
    train, test = (mean_tokens(source, split, backbone, layers) for split in ("train", "test"))
    for path, X, X_test in zip(paths, train, test, strict=False):
        write(path, X, source.labels("train"), X_test, source.labels("test"))


def write_patches(images: str, folder: Path) -> None:
    """CamVid's tokens, each with one class; those that are void for the most part are left out."""
    names = ("lite0-block4", "lite0-last")
    if all((folder / f"{name}.npz").exists() for name in names):
        return
    store = extract(
        images, LITE0, folder / "tokens", layer=[4, None], image_size=(288, 384), crop_pct=1.0, void=11,
        class_names=NAMES,
    )  # fmt: skip
    parts = {}
    for split, every in (("train", EVERY), ("val", 1), ("test", 1)):
        view = store[split].subset(np.arange(0, len(store[split]), every))
        clear = view.weights > 0.5
        tokens = np.concatenate([view.raw(i, i + 20) for i in range(0, len(view), 20)])
        parts[split] = tokens[clear].astype(np.float32), view.targets.argmax(2)[clear], np.nonzero(clear)[0]
    widths = store.manifest.config["beside"]["groups"]
    for name, start, width in zip(names, np.cumsum([0, *widths]), widths, strict=False):
        arrays = {f"X_{split}": X[:, start : start + width] for split, (X, _, _) in parts.items()}
        labels = {f"y_{split}": y for split, (_, y, _) in parts.items()}
        _save(folder / f"{name}.npz", **arrays, **labels, test_groups=parts["test"][2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cifar100", help="a folder of images, or torchvision:CIFAR100")
    parser.add_argument("--vit", help="a file of weights")
    parser.add_argument("--camvid", help="a folder with train, val and test")
    args = parser.parse_args()
    folder = args.folder

    digits, pixels = open_source("sklearn:digits"), load_digits().data.astype(np.float32)
    rows = [[int(name.rpartition("-")[2]) for name in digits.files(split)] for split in ("train", "test")]
    if not (folder / "digits" / "pixels.npz").exists():
        train, test = (pixels[each] for each in rows)
        write(folder / "digits" / "pixels.npz", train, digits.labels("train"), test, digits.labels("test"))
    write_layers(digits, LITE0, [4], [folder / "digits" / "lite0-block4.npz"], size=80)

    if args.camvid:
        write_patches(args.camvid, folder / "camvid")
    if args.cifar100:
        source = open_source(args.cifar100)
        images = Subset(source, classes=None, per_class={"train": 80, "test": 20}, seed=0)
        place = folder / "cifar100"
        lite0 = [place / f"lite0-{name}.npz" for name in ("block4", "block5", "block6", "last")]
        write_layers(images, LITE0, (4, 5, 6), lite0)
        if args.vit:
            vit = [place / f"vits14-{name}.npz" for name in ("block6", "block8", "block10", "last")]
            write_layers(images, f"{VIT}@{args.vit}", (6, 8, 10), vit, size=112)


if __name__ == "__main__":
    main()
