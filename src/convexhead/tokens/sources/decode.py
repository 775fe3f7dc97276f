"""Decoding image files, the same for every source."""

from __future__ import annotations

import io
import stat
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from convexhead.errors import InputError
from convexhead.tokens.sources.base import BrokenImageError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".webp", ".bmp", ".tif", ".tiff", ".gif"})

MAYBE_DEEP = frozenset({".png", ".tif", ".tiff"})
"""Extensions of files whose grey values may have more than 8 bits."""

ORIENTATION = 0x0112
"""The EXIF tag that says how an image must be turned to be upright."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

BITS, PHOTOMETRIC = 258, 262
"""TIFF tags: bits of a value, and (0) whether small values are white."""


def decode_image(file: Path | IO[bytes], name: str) -> Image.Image:
    """Decode the first frame of an image file as 8-bit RGB, upright as its EXIF orientation says.

    Deep grey images are scaled by the range of their type (see `scale_to_8_bits`); of colours with 16 bits Pillow
    keeps the high byte. Alpha is dropped, as torchvision's loader drops it.

    Raises
    ------
    BrokenImageError
        It cannot be read, whatever the decoder says; the message gives ``name``.
    InputError
        Its values have no known range.
    """
    try:
        if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):
            raise OSError("it is not a file")
        with Image.open(file) as image:
            # Pillow looks for an orientation in XMP data too, and fails on any that are no text.
            if not isinstance(image.info.get("xmp", b""), (str, bytes)):
                del image.info["xmp"]
            # A TIFF image turns itself upright here and drops its tag.
            image.load()
            return _upright(image, _shallow(image, name).convert("RGB"))
    except InputError:
        raise
    # Decoders raise whatever corrupt bytes lead them to: struct.error, SyntaxError, OverflowError, zlib.error, ...
    except Exception as error:
        raise BrokenImageError(f"cannot read the image {name!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is empty or of no format that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _upright(image: Image.Image, pixels: Image.Image) -> Image.Image:
    """Turn ``pixels`` as the orientation of ``image`` says; an EXIF block that cannot be read says nothing."""
    try:
        method = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # as many kinds as there are odd EXIF blocks
        method = None
    return pixels if method is None else pixels.transpose(method)


def _shallow(image: Image.Image, name: str) -> Image.Image:
    """Scale a grey image of more than 8 bits to 8; return others as they are."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode == "F":
        top, known = 1.0, bool(((values >= 0) & (values <= 1)).all())
    else:
        # A file's 12 bits and Pillow's older "I" for 16 of them: the file says how many there are.
        bits = tags.get(BITS, (16,))[0]
        top = 2.0**bits - 1
        sixteen = ("PNG", "PPM") if image.mode == "I" else ("PNG", "PPM", "TIFF", "JPEG2000")
        known = image.format in sixteen
    if not known:
        kind = "floats outside of [0, 1]" if image.mode == "F" else "integers of 32 bits, or signed ones"
        raise InputError(
            f"the image {name!r} has {kind}, whose black and white are unknown: "
            "save the images of this source with 8 or 16 bits, or floats from 0 to 1"
        )
    if tags.get(PHOTOMETRIC) == 0:
        values = top - values
    return Image.fromarray(scale_to_8_bits(values, top))


def scale_to_8_bits(values: NDArray[Any], top: float) -> NDArray[np.uint8]:
    """Map ``0 .. top`` linearly to ``0 .. 255``, rounded.

    >>> scale_to_8_bits(np.array([0, 257, 32768, 65535]), 65535).tolist()
    [0, 1, 128, 255]
    """
    return np.rint(values.astype(np.float64) * (255.0 / top)).astype(np.uint8)


def decoded_anew(content: bytes) -> bytes:
    """Return a mark for the fingerprint of files that earlier versions decoded to white, else nothing.

    A store of such images is refused as another source's; all other fingerprints stay what they were.
    """
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        deep = content[24:26] == b"\x10\x00"  # 16 bits, grey
    elif content[:2] in (b"II", b"MM"):
        try:
            with Image.open(io.BytesIO(content)) as image:
                deep = image.mode == "F" or image.mode.startswith("I")
        except Exception:  # a broken image, which has no pixels
            deep = False
    else:
        deep = False
    return b"scaled by its type's range" if deep else b""
