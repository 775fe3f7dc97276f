"""Images that are arrays: ``npz:FILE`` and ``sklearn:digits``."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convexhead.errors import FileFormatError, InputError, choose
from convexhead.tokens.sources.base import SPLITS, check_split
from convexhead.tokens.sources.decode import scale_to_8_bits
from convexhead.tokens.sources.naming import encode_labels

DIGITS_TEST_SHARE = 0.3
DIGITS_SPLIT_SEED = 0


@dataclass(frozen=True)
class ArraySplit:
    """Images uint8 of shape ``(n, h, w)`` or ``(n, h, w, 3)``, labels int64 ``(n,)``, one name an image."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    files: list[str]


class ImageArrays:
    """Labelled images held in memory as arrays."""

    def __init__(self, spec: str, splits: dict[str, ArraySplit], class_names: list[str]) -> None:
        self.spec = spec
        self.splits = tuple(splits)
        self.class_names = class_names
        self.left_out: dict[str, list[str]] = {}
        self._splits = splits

    def _split(self, name: str) -> ArraySplit:
        return self._splits[check_split(name, self.splits)]

    def labels(self, split: str) -> NDArray[np.int64]:
        return self._split(split).labels

    def files(self, split: str) -> list[str]:
        return self._split(split).files

    def load(self, split: str, index: int) -> Image.Image:
        return Image.fromarray(self._split(split).images[index]).convert("RGB")

    def fingerprint(self) -> str:
        """Hash all images, labels and names."""
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for name, split in self._splits.items():
            digest.update(f"{name}{split.images.shape}{split.files}".encode())
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(np.ascontiguousarray(split.labels).data)
        return digest.hexdigest()


def open_npz(file: str) -> ImageArrays:
    """Open ``npz:FILE``.

    Images are ``(n, h, w)``, ``(n, h, w, 1)`` or ``(n, h, w, 3)``, of type uint8, uint16, bool, or float with all
    values of the file in [0, 1]; each type's range becomes 0 to 255. Labels are integers or strings, ``(n,)``.
    Optional ``class_names`` says what the integers ``0 .. c-1`` mean; otherwise the distinct labels are the names.

    Raises
    ------
    InputError
        Missing file, or arrays that do not fit together.
    FileFormatError
        Not an npz file, or without the expected arrays.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {file!r}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays: dict[str, NDArray[Any]] = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise FileFormatError(f"{file!r} is not an npz file of plain arrays: {error}") from error

    keys = {"train": ("images", "labels")} if "images" in arrays else {}
    keys = keys or {s: (f"{s}_images", f"{s}_labels") for s in SPLITS if f"{s}_images" in arrays}
    missing = [key for pair in keys.values() for key in pair if key not in arrays]
    if "train" not in keys or missing:
        wanted = missing[0] if missing else "images (or train_images)"
        raise FileFormatError(f"{file!r} has no array {wanted}: it holds {', '.join(sorted(arrays)) or 'nothing'}")

    used = {key for pair in keys.values() for key in pair}
    if unused := sorted(key for key in arrays if key not in used and key.endswith(("images", "labels"))):
        raise InputError(
            f"{file!r}: the array {unused[0]} belongs to no split that is read ({', '.join(keys)}): splits are named "
            f"{', '.join(SPLITS)}, each with SPLIT_images and SPLIT_labels"
        )
    for image_key, label_key in keys.values():
        _check_arrays(file, image_key, arrays[image_key], label_key, arrays[label_key])
    columns = {split: arrays[label_key].reshape(-1) for split, (_, label_key) in keys.items()}
    names = [str(name) for name in arrays["class_names"]] if "class_names" in arrays else None
    labels, class_names = encode_labels(file, columns, names)
    splits = {}
    for split, (image_key, _) in keys.items():
        images = _to_8_bits(arrays[image_key])
        images = images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images
        splits[split] = ArraySplit(images, labels[split], [f"{split}-{i}" for i in range(len(images))])
    source = ImageArrays(f"npz:{file}", splits, class_names)
    source.left_out = {"arrays of another name": sorted(set(arrays) - used - {"class_names"})}
    return source


def _check_arrays(file: str, image_key: str, images: NDArray[Any], label_key: str, labels: NDArray[Any]) -> None:
    grey, colour = images.ndim == 3, images.ndim == 4 and images.shape[-1] in (1, 3)
    if not (grey or colour) or 0 in images.shape:
        first = images.ndim == 4 and images.shape[1] in (1, 3)
        hint = "; channels come last: images.transpose(0, 2, 3, 1)" if first else ""
        raise InputError(
            f"{file!r}: {image_key} must be uint8 of shape (n, h, w) or (n, h, w, 3), not {images.dtype} "
            f"{images.shape}{hint}"
        )
    if colour and images.shape[1] in (1, 3):
        raise InputError(
            f"{file!r}: {image_key} of shape {images.shape} may have its channels first or last: give larger images, "
            "or grey ones of shape (n, h, w)"
        )
    _check_range(file, image_key, images)
    if labels.shape not in ((len(images),), (len(images), 1)):
        raise InputError(f"{file!r}: {len(images)} {image_key} but {label_key} has shape {labels.shape}")
    if labels.dtype.kind not in "iuUS":
        raise InputError(f"{file!r}: {label_key} must be integers or strings, not {labels.dtype}")


def _check_range(file: str, key: str, images: NDArray[Any]) -> None:
    """Refuse images whose type does not say what is black and what is white."""
    if images.dtype.kind == "f":
        if not (images.min() >= 0 and images.max() <= 1):
            raise InputError(
                f"{file!r}: {key} has floats outside of [0, 1], whose black and white are unknown: scale all images "
                "to [0, 1], or give uint8"
            )
    elif images.dtype.newbyteorder("=") not in (np.uint8, np.uint16, np.bool_):
        raise InputError(
            f"{file!r}: {key} must be uint8, uint16, bool or float in [0, 1], not {images.dtype}, whose black and "
            "white are unknown: if they are 0 and 255, store images.astype('uint8')"
        )


def _to_8_bits(images: NDArray[Any]) -> NDArray[np.uint8]:
    if images.dtype == np.uint8:
        return images
    top = float(np.iinfo(images.dtype).max) if images.dtype.kind == "u" else 1.0
    # Image by image: scaled floats need several times the memory.
    return np.stack([scale_to_8_bits(image, top) for image in images])


def open_sklearn(name: str) -> ImageArrays:
    """Open ``sklearn:digits``: 8x8 grey digits, values 0..16 scaled to 0..255, stratified 70/30 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    choose("scikit-learn image set", name, ["digits"])
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    rows = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_TEST_SHARE, random_state=DIGITS_SPLIT_SEED, stratify=labels
    )
    splits = {
        split: ArraySplit(images[index], labels[index], [f"digit-{i:04d}" for i in index])
        for split, index in zip(("train", "test"), map(np.sort, rows), strict=True)
    }
    return ImageArrays("sklearn:digits", splits, [str(c) for c in range(10)])
