"""What every image source is: labelled images in splits, each under a name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import InputError, choose

if TYPE_CHECKING:
    from PIL import Image

SPLITS = ("train", "val", "test")
"""The names that a split can have, in the order in which splits are listed. ``train`` is always there."""

MULTI_LABEL, REGRESSION = TASKS = ("multi-label", "regression")
"""What is known of an image other than its class: which of several classes it has, or numbers."""

SPLIT_NAMES = {"train": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}
"""Names by which folders and data sets call their splits."""


class BrokenImageError(InputError):
    """An image file that cannot be decoded; the message names the file."""


@runtime_checkable
class ImageSource(Protocol):
    """Labelled images in one or more splits.

    ``spec`` is the string that opens the source, ``splits`` the names of its splits (``"train"`` first) and
    ``class_names`` the name of every label, in label order and shared by all splits. A source may also have
    ``left_out``, the names of what it found but does not read, by reason (see `convexhead.tokens.store.census`), and
    ``changed()``, which names what changed since its fingerprint was taken, or returns None.
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

        Raises
        ------
        BrokenImageError
            The image cannot be decoded.
        """

    def fingerprint(self) -> str:
        """Return a hexadecimal SHA-256 that changes whenever an image, a name or a label changes."""


@runtime_checkable
class MaskSource(ImageSource, Protocol):
    """Images with a label for every pixel instead of one an image: ``labels`` refuses, and says so.

    ``void`` is the number in the files of pixels that do not count, or None.
    """

    void: int | None

    def mask(self, split: str, index: int) -> NDArray[np.int16]:
        """Return the classes of the pixels of one image, ``(height, width)``; −1 for those that do not count."""

    def pixels(self, split: str) -> NDArray[np.int64]:
        """Return the numbers of pixels of every class, then of those that do not count, ``(c + 1,)``."""

    def like(self, class_names: list[str], void: int | None) -> MaskSource:
        """Return the source with these classes, and this void where it has none of its own.

        Raises
        ------
        InputError
            It has other classes.
        """


@runtime_checkable
class TargetSource(ImageSource, Protocol):
    """Images with several classes each, or with numbers, instead of one class: ``labels`` refuses, and says so.

    ``task`` is one of `TASKS`, and ``class_names`` are the names of the targets' columns.
    """

    task: str

    def targets(self, split: str) -> NDArray[np.float64]:
        """Return the targets ``(n, c)`` of a split: in [0, 1] for several classes, else any numbers."""


def match_splits(what: str, names: Iterable[str]) -> dict[str, str]:
    """Map splits to the names that stand for them in a source, in the order of `SPLITS`.

    Raises
    ------
    InputError
        Two names of one split.
    """
    found: dict[str, str] = {}
    for name in names:
        split = SPLIT_NAMES.get(name)
        if split in found:
            raise InputError(f"{what} has both {found[split]!r} and {name!r}: which of them is {split}? Rename one")
        if split is not None:
            found[split] = name
    return {split: found[split] for split in SPLITS if split in found}


def check_split(split: str, splits: Sequence[str]) -> str:
    """Return ``split`` if the source has it, else raise `InputError`."""
    return choose("split", split, splits)
