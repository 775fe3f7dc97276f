"""Extraction that is comparable with an earlier one: everything that decides tokens and labels is taken from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens.backbones.base import Backbone
from convexhead.tokens.backbones.open import open_backbone
from convexhead.tokens.sources.base import ImageSource, MaskSource, TargetSource
from convexhead.tokens.store.manifest import MANIFEST
from convexhead.tokens.store.origin import TokenOrigin, differences
from convexhead.tokens.store.store import TokenStore

if TYPE_CHECKING:
    from PIL import Image


ASKED = ("image_size", "crop_pct", "void", "class_names")
"""Options whose answers are compared, once the backbone or the images are open."""


def origin_of(path: str | Path) -> TokenOrigin:
    """How the tokens of a store, or those that a run was fitted on, are made.

    Raises
    ------
    FileFormatError
        Neither a store nor a run.
    InputError
        A run that does not know where its tokens came from.
    """
    folder = Path(path).expanduser()
    if (folder / MANIFEST).is_file():
        store = TokenStore.open(folder)
        return store[store.splits[0]].origin()
    if not (folder / "config.json").is_file():
        raise FileFormatError(f"{str(path)!r} is neither a token store nor a trained head: give one of them")
    from convexhead.model import Model  # the tokens of a store are read without it

    origin = Model.load(folder).origin
    if origin is None:
        raise InputError(f"{str(path)!r} does not say how its tokens were made: give the store that it was fitted on")
    return origin


def options_like(origin: TokenOrigin, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `extract`: those of ``origin``, with which what is ``given`` (not None) must agree.

    The place of a weights file and the size of images are compared by what comes of them, once the backbone is open.

    Raises
    ------
    InputError
        Names an option that says something else.
    """
    if "imported" in origin.config["preprocessing"] and not isinstance(given["backbone"], Backbone):
        raise InputError(f"the tokens of `like` were imported ({origin.backbone}): use convexhead store import --like")
    fitted = origin.reduction.options if origin.reduction else {}
    pool = origin.config["token_pool"]
    options = {
        "backbone": origin.backbone,
        "layer": origin.config["layer"],
        "class_channels": origin.config.get("beside", {}).get("class", False),
        "channels": fitted.get("components") or origin.config["channels"],
        "reduce": "pca" if fitted.get("components") else "avgpool",
        "token_pool": tuple(pool) if pool else None,
        "standardize": fitted.get("standardize", False),
        "constant": fitted.get("constant", False),
        "dtype": origin.config["dtype"],
        "keep_aspect": origin.config["preprocessing"].get("keep_aspect", False),
    }
    for name, value in given.items():
        if value is None or name in ASKED or isinstance(value, Backbone):
            continue
        taken = options[name]
        asked, there = (str(v).partition("@")[0] if name == "backbone" else v for v in (value, taken))
        if name == "token_pool":
            asked = (value, value) if isinstance(value, int) else tuple(value)
        if asked != there:
            raise InputError(f"{name} is {there!r} in the tokens of `like`, not {asked!r}: leave {name} out")
    place = {"backbone": given["backbone"]} if given["backbone"] is not None else {}
    return {**options, **{name: given.get(name) for name in ASKED}, **place}


def open_backbone_like(origin: TokenOrigin, options: dict[str, Any]) -> Backbone:
    """Open the backbone so that it does what ``origin`` says.

    Raises
    ------
    InputError
        It does something else: other weights, another preprocessing.
    """
    told: list[str] = []
    for size in _sizes(origin.config["preprocessing"], options):
        backbone = open_backbone(
            options["backbone"], layer=options["layer"], class_channels=options["class_channels"], **size
        )
        made = {
            **origin.config,
            "backbone": backbone.spec.partition("@")[0],
            "weights": backbone.weights_hash,
            "layer": backbone.layer,
            "preprocessing": backbone.preprocessing,
            **({"beside": backbone.channels} if backbone.channels else {}),
        }
        told = differences(origin.config, made)
        if not told:
            return backbone
        if isinstance(options["backbone"], Backbone):
            break
    raise InputError(f"these would not be the same tokens: {'; '.join(told)}")


def _sizes(preprocessing: dict[str, Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Ways to ask for what ``preprocessing`` says: stores keep what came of image size and crop, not the question."""
    given = {name: options[name] for name in ("image_size", "crop_pct")}
    kept = {"keep_aspect": True} if preprocessing.get("keep_aspect") else {}
    if not kept or given["image_size"] is not None:
        yield {**given, **kept}
    if isinstance(options["backbone"], Backbone) or given != {"image_size": None, "crop_pct": None}:
        return
    for name in ("input_size", "image_size", "crop", "resize"):
        size = preprocessing.get(name)
        size = side_or_sides(size)
        if size is not None:
            yield {"image_size": size, "crop_pct": preprocessing.get("crop_pct"), **kept}
            break
    if preprocessing.get("crop_pct") is not None:
        yield {"image_size": None, "crop_pct": preprocessing["crop_pct"]}


def side_or_sides(size: Any) -> Any:
    """The question that a size ``([channels,] height, width)`` answers: the side of a square, or both sides."""
    if not isinstance(size, (list, tuple)):
        return size
    return size[-1] if size[-2] == size[-1] else tuple(size[-2:])


class Renumbered:
    """An image source whose labels are numbered as the classes of a store are."""

    def __init__(self, source: ImageSource, class_names: list[str]) -> None:
        if strangers := [name for name in source.class_names if name not in class_names]:
            raise InputError(
                f"{source.spec!r} has the class {strangers[0]!r}, which `like` does not have "
                f"({', '.join(map(repr, class_names[:8]))}{', …' if len(class_names) > 8 else ''}): leave it out"
            )
        self._source = source
        self._numbers = np.array([class_names.index(name) for name in source.class_names], np.int64)
        self.spec, self.splits = source.spec, source.splits
        self.class_names = self.numbering = list(class_names)

    def labels(self, split: str) -> NDArray[np.int64]:
        labels: NDArray[np.int64] = self._numbers[self._source.labels(split)]
        return labels

    def files(self, split: str) -> list[str]:
        return self._source.files(split)

    def load(self, split: str, index: int) -> Image.Image:
        return self._source.load(split, index)

    def fingerprint(self) -> str:
        """Of the images alone: the numbering stands beside it in the store's settings."""
        return self._source.fingerprint()


def number_like(source: ImageSource, origin: TokenOrigin) -> ImageSource:
    """Return ``source`` with its labels numbered as the classes of ``origin`` are, where that has names of them."""
    class_names = origin.class_names
    if class_names is None or isinstance(source, TargetSource):  # columns are matched by name when they are read
        return source
    if isinstance(source, MaskSource):
        return source.like(class_names, origin.config.get("masks", {}).get("void"))
    return source if class_names == source.class_names else Renumbered(source, class_names)
