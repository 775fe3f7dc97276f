"""What a head with an output for every token says of the pixels of images, as masks that any program opens.

    from convexhead.mask_files import write_masks

    write_masks("run", "photos", "masks")

Images pass through the backbone, the preprocessing and the reduction of the run, a batch at a time. Probabilities of
tokens are interpolated as in `convexhead.dense`. ``masks/labels/NAME.png`` has the size of its image and holds numbers
of classes; ``masks/classes.txt`` names them, one a line from 0 on. The largest number of the file's type marks pixels
that the backbone does not see. So ``masks/labels`` beside the folder of images are images with masks again.
"""

from __future__ import annotations

import colorsys
import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convexhead import inputs
from convexhead.dense import likeliest
from convexhead.errors import InputError
from convexhead.estimators import ConvexHeadClassifier
from convexhead.persistence import load
from convexhead.runtime.progress import Notify, silent
from convexhead.targets import is_multilabel
from convexhead.tokens.backbones.base import Backbone
from convexhead.tokens.sources.base import ImageSource
from convexhead.tokens.store.files import make_folder, write_atomic
from convexhead.tokens.store.manifest import MANIFEST
from convexhead.tokens.stream import ImageTokens

LABELS, NAMES = "labels", "classes.txt"
UNSEEN = {np.uint8: 255, np.uint16: 65535}
"""The number of pixels that the backbone does not see, of either type of mask."""


@dataclass(frozen=True)
class Masks:
    """What was written.

    Attributes
    ----------
    out : Path
        The folder.
    classes : list of str
        Of the numbers 0, 1, …
    unseen : int
        The number of pixels that the backbone does not see.
    count : int
        Masks.
    broken : list of str
        Images that were left out, because they cannot be read.
    left_out : dict
        Names of files that are no images, by reason.
    """

    out: Path
    classes: list[str]
    unseen: int
    count: int
    broken: list[str]
    left_out: dict[str, list[str]]


def write_masks(
    run: str | Path | ConvexHeadClassifier,
    images: str | Path | ImageSource,
    out: str | Path,
    *,
    split: str | None = None,
    backbone: str | Backbone | None = None,
    batch_size: int | None = None,
    skip_broken: bool = False,
    device: str = "auto",
    notify: Notify = silent,
) -> Masks:
    """Write a mask of the likeliest classes for every image.

    Parameters
    ----------
    run : path or fitted estimator
        A classifier with ``pool=None`` that was trained on a store of tokens.
    images : path, str or ImageSource
        A folder with images, however deep; an image file; or a source as of `convexhead.tokens.open_source`.
    out : path
        A new or an empty folder.
    split, backbone, batch_size, skip_broken, device, notify
        As of `convexhead.predict.predict`.

    Raises
    ------
    InputError
        Another kind of head, a store, images that cannot be read, or a folder that is not empty.
    """
    head = load(run) if isinstance(run, (str, Path)) else run
    model, folder = head.model_, Path(out).expanduser()
    if not isinstance(head, ConvexHeadClassifier) or head.pool is not None or is_multilabel(model.spec):
        raise InputError("masks are of classifiers with pool=None and one class a token")
    if model.origin is None:
        raise InputError(
            "this head was fitted on arrays, which do not say how tokens are made of images: fit on a store"
        )
    if not isinstance(images, ImageSource) and (Path(images).expanduser() / MANIFEST).is_file():
        raise InputError(f"{str(images)!r} is a token store, which does not keep pixels: give the images")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{str(out)!r} is not an empty folder: choose another one for the masks")
    tokens = ImageTokens(
        images, model.origin, split=split, backbone=backbone, batch_size=batch_size, skip_broken=skip_broken,
        device=inputs.pick_device(device),
    )  # fmt: skip
    files = _files(tokens)
    classes = [str(name) for name in (head.class_names_ or head.classes_)]
    kind = np.uint8 if len(classes) <= UNSEEN[np.uint8] else np.uint16
    make_folder(folder)
    write_atomic(folder / NAMES, "".join(f"{name}\n" for name in classes).encode(errors="surrogateescape"))
    done = 0
    notify("predicting", 0, len(tokens))
    for batch in tokens:
        outputs = zip(batch.names, head.predict_proba(batch.tokens), batch.sizes, batch.grids, strict=True)
        for name, p, size, (h, w) in outputs:
            labels = likeliest(p[: h * w], (h, w), tokens.window(size), size)
            file = folder / LABELS / files[batch.split, name]
            make_folder(file.parent)
            write_atomic(file, png(np.where(labels < 0, UNSEEN[kind], labels).astype(kind)))
        done += len(batch.names)
        notify("predicting", done, len(tokens))
    left_out = dict(getattr(tokens.source, "left_out", {}))
    return Masks(folder, classes, UNSEEN[kind], done, tokens.broken, left_out)


def _files(tokens: ImageTokens) -> dict[tuple[str, str], PurePosixPath]:
    """Where in the folder of masks that of each image of each split goes."""
    several, found = len(tokens.splits) > 1, dict[PurePosixPath, str]()
    files = {}
    for split in tokens.splits:
        for name in tokens.source.files(split):
            file = PurePosixPath(split if several else "", name.lstrip("/")).with_suffix(".png")
            if ".." in file.parts:
                raise InputError(f"the image {name!r} has a name that leads out of the folder of masks: rename it")
            if file in found:
                raise InputError(f"{found[file]!r} and {name!r} would share the mask {str(file)!r}: rename one")
            files[split, name], found[file] = file, name
    return files


def png(labels: NDArray[Any]) -> bytes:
    """A mask ``(H, W)`` of type uint8 or uint16 as a PNG file; in 8 bits with colours for people."""
    from PIL import Image

    image = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        image.putpalette(palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def palette() -> NDArray[np.uint8]:
    """A colour ``(256, 3)`` for each number of a mask: neighbours differ much, and 255 is black."""
    golden = (5**0.5 - 1) / 2
    colors = [colorsys.hsv_to_rgb(k * golden % 1, (0.75, 0.45)[k % 2], (0.95, 0.7, 0.5)[k % 3]) for k in range(255)]
    return np.rint(255 * np.array([*colors, (0, 0, 0)])).astype(np.uint8)
