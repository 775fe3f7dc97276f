"""Decoding image files and naming classes, the same for every source."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from convexhead.errors import InputError
from convexhead.tokens.sources import BrokenImageError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})


def decode_image(file: Path | IO[bytes], name: str) -> Image.Image:
    """Decode an image file as RGB, upright as its EXIF orientation says.

    Raises:
        BrokenImageError: it cannot be read; the message gives ``name``.
    """
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenImageError(f"cannot read the image {name!r}: {error}") from error


def natural_sort(names: Iterable[str]) -> list[str]:
    """Sort names with their numbers compared as numbers.

    >>> natural_sort(["img10", "img2", "a"])
    ['a', 'img2', 'img10']
    """

    def key(name: str) -> tuple[list[tuple[int, str]], str]:
        # Odd parts of the split are digits; the pair keeps numbers and text comparable at any position.
        parts = re.split(r"([0-9]+)", name)
        return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)], name

    return sorted(names, key=key)


def name_classes(columns: dict[str, list[str]]) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """Turn labels into indices of class names: the distinct labels of all splits in natural order."""
    class_names = natural_sort({label for column in columns.values() for label in column})
    index = {name: i for i, name in enumerate(class_names)}
    labels = {split: np.asarray([index[label] for label in column], np.int64) for split, column in columns.items()}
    return labels, class_names


def check_class_indices(what: str, columns: dict[str, NDArray[np.int64]], n_classes: int) -> None:
    """Refuse labels that are not integers ``0 .. n_classes - 1``.

    Raises:
        InputError: names the split.
    """
    for split, column in columns.items():
        if column.dtype.kind not in "iu" or column.min() < 0 or column.max() >= n_classes:
            raise InputError(f"{what}: {split} labels must be integers below {n_classes} (class_names)")
