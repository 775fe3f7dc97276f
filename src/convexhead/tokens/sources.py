"""Image sources: where labelled images come from, named by one string.

==================  ==========================================================================
``PATH``            a folder of class folders, or of ``train/``, ``val/``, ``test/`` with class folders inside
``npz:FILE``        arrays ``images`` and ``labels``, or ``train_images``, ``train_labels``, ``test_...``
``sklearn:digits``  scikit-learn's 1,797 handwritten digits, split 70/30
==================  ==========================================================================
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import InputError, choose, require

if TYPE_CHECKING:
    from PIL import Image

SPLITS = ("train", "val", "test")
"""The names that a split can have, in the order in which splits are listed. ``train`` is always there."""


class BrokenImageError(InputError):
    """An image file that cannot be decoded; the message names the file."""


@runtime_checkable
class ImageSource(Protocol):
    """Labelled images in one or more splits.

    ``spec`` is the string that opens the source, ``splits`` the names of its splits (``"train"`` first) and
    ``class_names`` the name of every label, in label order and shared by all splits.
    """

    spec: str
    splits: tuple[str, ...]
    class_names: list[str]

    def labels(self, split: str) -> NDArray[np.int64]:
        """Return the labels of a split: int64, shape ``(n,)``, indices into ``class_names``."""

    def files(self, split: str) -> list[str]:
        """Return one name an image, unique within the split, in the order of the labels."""

    def load(self, split: str, index: int) -> Image.Image:
        """Return one image in RGB mode. Safe to call from several threads.

        Raises:
            BrokenImageError: the image cannot be decoded.
        """

    def fingerprint(self) -> str:
        """Return a hexadecimal SHA-256 that changes whenever an image, a name or a label changes."""


def open_source(spec: str | Path | ImageSource) -> ImageSource:
    """Open an image source by its specification (see the module's table).

    Raises:
        InputError: unknown scheme, missing path, or contents that cannot be used.
        FileFormatError: a file that is not what its scheme says.
    """
    if isinstance(spec, ImageSource):
        return spec
    require("PIL", "images")
    # Imported here because both modules build on this one, and Pillow is optional.
    from convexhead.tokens.image_arrays import open_npz, open_sklearn
    from convexhead.tokens.image_folder import ImageFolder

    if Path(spec).expanduser().exists():
        return ImageFolder(spec)
    scheme, separator, rest = str(spec).partition(":")
    # A single letter before the colon is a Windows drive.
    if not separator or not re.fullmatch(r"[a-z][a-z0-9+-]+", scheme):
        raise InputError(
            f"there is no folder {str(spec)!r}: give a folder of class folders, npz:FILE or sklearn:digits"
        )
    openers = {"npz": open_npz, "sklearn": open_sklearn}
    return openers[choose("image source", scheme, openers)](rest)


def check_split(split: str, splits: Sequence[str]) -> str:
    """Return ``split`` if the source has it, else raise `InputError`."""
    return choose("split", split, splits)
