"""Thumbnails of the images behind the tokens, as the backbone saw them, small enough to embed."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from convexhead.errors import ConvexHeadError
from convexhead.tokens.sources.base import ImageSource
from convexhead.tokens.sources.open import open_source

if TYPE_CHECKING:
    from PIL import Image

SIDE = 160
"""Largest length in pixels of a thumbnail's longer side."""


def thumbnails(about: Mapping[str, Any], source: str | None = None) -> tuple[dict[str, str], str]:
    """Data URIs of the sample's images by file name, and a sentence about what is missing ("" if nothing).

    Parameters
    ----------
    about : mapping
        Of an `Evidence`.
    source : str or None
        Where the images are now; None: where they were when tokens were extracted.
    """
    tokens, split, files = about["tokens"], about["split"], about["files"]
    spec = source or tokens["source"]
    try:
        opened = open_source(spec)
        rows = {name: i for i, name in enumerate(opened.files(split))}
    except (ConvexHeadError, OSError) as error:
        return {}, f"The images are not shown: {str(error).splitlines()[0]}."
    found = {name: uri for name in files if name in rows and (uri := _thumbnail(opened, split, rows[name], tokens))}
    missing = len(files) - len(found)
    return found, f"{missing} of {len(files)} images are no longer in {spec}." if missing else ""


def _thumbnail(source: ImageSource, split: str, row: int, tokens: Mapping[str, Any]) -> str:
    try:
        image = as_seen(source.load(split, row), tokens["preprocessing"])
    except (ConvexHeadError, OSError):
        return ""
    image.thumbnail((SIDE, SIDE))
    buffer, small = io.BytesIO(), max(image.size) <= 64
    image.save(buffer, format="PNG" if small else "JPEG", **({} if small else {"quality": 80}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def as_seen(image: Image.Image, preprocessing: Mapping[str, Any]) -> Image.Image:
    """The part of ``image`` that the token grid covers, undistorted.

    timm scales the shorter side to ``size / crop_pct`` and cuts the centre, transformers to ``resize`` and cuts
    ``crop``; raw patches take everything. A backbone that squeezes both sides sees everything too.
    """
    share: tuple[float, float] | None = None
    if "crop_pct" in preprocessing:
        _, height, width = preprocessing["input_size"]
        unit = min(image.width / width, image.height / height) * preprocessing["crop_pct"]
        share = (width * unit, height * unit)
    elif preprocessing.get("crop") and isinstance(preprocessing.get("resize"), int):
        unit = min(image.size) / preprocessing["resize"]
        share = (preprocessing["crop"][1] * unit, preprocessing["crop"][0] * unit)
    if share is None:
        return image.convert("RGB")
    w, h = (min(round(part), side) for part, side in zip(share, image.size, strict=True))
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.convert("RGB").crop((left, top, left + w, top + h))
