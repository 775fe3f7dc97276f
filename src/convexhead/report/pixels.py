"""What a report shows of a head with an output for every token: scores of pixels, and images beside their masks."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from convexhead.dense import mean_iou, pixel_accuracy, pixel_scores, predict_masks
from convexhead.mask_files import UNSEEN, palette
from convexhead.tokens.sources.open import open_source
from convexhead.tokens.store.view import SplitView

if TYPE_CHECKING:
    from PIL import Image

SHOWN, SIDE = 6, 240
"""Images that are shown, and the largest length in pixels of their longer sides. Chosen by hand."""


def collect(model: Any, view: SplitView, images: str) -> dict[str, Any]:
    """Score the pixels of a split, and draw images at equal distances in it beside truth and prediction.

    Parameters
    ----------
    model : ConvexHeadClassifier
        With ``pool=None``.
    view : SplitView
        As the model reads it.
    images : str
        Where its images and masks are.

    Returns
    -------
    dict
        JSON values: ``mean_iou`` and ``accuracy`` with their intervals, ``iou`` of each class, ``unseen``,
        ``confusion`` (pixels) and ``pictures``, data URIs.

    Raises
    ------
    InputError
        Images that are not there, or are not those of the store.
    """
    scores = pixel_scores(model, view, images)
    source, rows = open_source(images), np.unique(np.linspace(0, len(view) - 1, SHOWN).astype(int))
    places = {name: i for i, name in enumerate(source.files(view.split))}
    return {
        "mean_iou": scores.mean_iou,
        "mean_iou_interval": scores.interval(mean_iou),
        "accuracy": scores.accuracy,
        "accuracy_interval": scores.interval(pixel_accuracy),
        "iou": [None if np.isnan(iou) else float(iou) for iou in scores.iou],
        "unseen": scores.unseen,
        "images": len(view),
        "confusion": scores.confusions.sum(0).tolist(),
        "pictures": [
            {
                "name": each.name,
                "image": _image(source.load(view.split, places[each.name])),
                "truth": _mask(each.truth),
                "predicted": _mask(each.labels),
            }
            for each in predict_masks(model, view.subset(rows), images)
        ],
    }


def described(pixels: Mapping[str, Any], classes: list[str]) -> dict[str, Any]:
    """What the page says of these ``pixels``: a row for each class, with its colour."""
    confusion, colors = np.asarray(pixels["confusion"]), palette()
    share = confusion.sum(1) / confusion.sum()
    rows = [
        {"name": name, "color": "#" + bytes(colors[k % 255].tolist()).hex(), "iou": pixels["iou"][k],
         "share": float(share[k])}
        for k, name in enumerate(classes)
    ]  # fmt: skip
    return {**pixels, "classes": rows}


def _image(image: Image.Image) -> str:
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _mask(labels: NDArray[np.int16]) -> str:
    """A mask in the colours of its classes; of more than 255 classes some share a colour."""
    from PIL import Image

    step = max(1, -(-max(labels.shape) // SIDE))
    small = labels[::step, ::step]
    image = Image.fromarray(np.where(small < 0, UNSEEN[np.uint8], small % 255).astype(np.uint8))
    image.putpalette(palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
