"""``hf:NAME_OR_FOLDER``: labelled images through the ``datasets`` library."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convexhead.errors import FileFormatError, HubError, InputError, choose, require
from convexhead.tokens.decode import decode_image, name_classes
from convexhead.tokens.hub import unreachable
from convexhead.tokens.sources import SPLITS, BrokenImageError, check_split

SPLIT_NAMES = {"train": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}
OPTIONS = ("image", "label", "config")


class HubImages:
    """The image and label columns of a data set; images stay encoded until they are asked for."""

    def __init__(self, spec: str, parts: dict[str, Any], image: str, label: str) -> None:
        self.spec = spec
        self.splits = tuple(parts)
        features = parts["train"].features
        columns = {split: list(data[label]) for split, data in parts.items()}
        names = getattr(features[label], "names", None)
        if names:
            self.class_names = [str(name) for name in names]
            self._labels = {split: np.asarray(column, np.int64) for split, column in columns.items()}
            if any(len(column) and column.min() < 0 for column in self._labels.values()):
                raise InputError(f"{spec!r} has images without a label in the column {label!r}")
        else:
            self._labels, self.class_names = name_classes({s: [str(v) for v in c] for s, c in columns.items()})
        self._files = {s: [f"{s}-{row}" for row in range(len(column))] for s, column in self._labels.items()}
        encoded = require("datasets", "sources").Image(decode=False)
        self._images = {split: data.select_columns(image).cast_column(image, encoded) for split, data in parts.items()}
        self._column = image

    def labels(self, split: str) -> NDArray[np.int64]:
        return self._labels[check_split(split, self.splits)]

    def files(self, split: str) -> list[str]:
        """Return ``SPLIT-ROW`` of every image: data sets need not have file names."""
        return self._files[check_split(split, self.splits)]

    def load(self, split: str, index: int) -> Image.Image:
        name = f"{self.spec} {split}-{index}"
        return decode_image(io.BytesIO(self._read(split, index, name)), name)

    def fingerprint(self) -> str:
        """Hash all images, labels and class names."""
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for split in self.splits:
            digest.update(f"{split}{self._labels[split].tolist()}".encode())
            for index in range(len(self._labels[split])):
                digest.update(hashlib.sha256(self._read(split, index, f"{split}-{index}")).digest())
        return digest.hexdigest()

    def _read(self, split: str, index: int, name: str) -> bytes:
        cell = self._images[split][index][self._column]
        if cell and cell["bytes"] is not None:
            return bytes(cell["bytes"])
        try:
            return Path(cell["path"]).read_bytes()
        except (OSError, TypeError, KeyError) as error:
            raise BrokenImageError(f"cannot read the image {name!r}: {error}") from error


def open_hf(name: str) -> HubImages:
    """Open ``hf:NAME`` or ``hf:FOLDER``, with options after a question mark (see `HubImages` and the table).

    Raises:
        InputError: unknown options or columns, or no train split.
        FileFormatError: a folder that ``datasets`` cannot read as images with labels.
        HubError: neither a folder nor in the local cache, and the hub cannot be reached or does not have it.
        MissingExtraError: ``datasets`` is not installed.
    """
    datasets = require("datasets", "sources")
    path, _, query = name.partition("?")
    options = dict(parse_qsl(query))
    for option in options:
        choose("option of hf:", option, OPTIONS)
    data = _load(datasets, path, options.get("config"))
    parts = {SPLIT_NAMES[split]: data[split] for split in data if split in SPLIT_NAMES}
    if "train" not in parts:
        raise InputError(f"'hf:{path}' has the splits {', '.join(map(str, data))} but no train split")
    features = parts["train"].features
    images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = labels or [column for column in features if column in ("label", "labels")]
    image = _column(path, "image", images, options, features)
    label = _column(path, "label", labels, options, features)
    return HubImages(f"hf:{name}", {split: parts[split] for split in SPLITS if split in parts}, image, label)


def _column(path: str, kind: str, found: list[str], options: dict[str, str], features: Any) -> str:
    """Return the column that is asked for, or the only one of its kind."""
    if kind in options:
        return choose(f"column of 'hf:{path}'", options[kind], features)
    if len(found) == 1:
        return found[0]
    several = f"the {kind} columns {', '.join(found)}" if found else f"no {kind} column"
    raise InputError(f"'hf:{path}' has {several}: choose one of {', '.join(features)} with 'hf:{path}?{kind}=COLUMN'")


def _load(datasets: Any, path: str, config: str | None) -> Any:
    local = Path(path).expanduser()
    if local.is_dir():
        try:
            return datasets.load_dataset(str(local), config)
        except Exception as error:  # every builder has errors of its own
            raise FileFormatError(f"{path!r} is not a folder that datasets can read: {_reason(error)}") from error
    endpoint = datasets.config.HF_ENDPOINT
    offline = unreachable(endpoint)
    if offline and not (Path(datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___")).is_dir():
        raise HubError(
            f"the images of 'hf:{path}' are not in the local cache and {endpoint} cannot be "
            f"reached ({offline}): connect, or give a folder of parquet files or images"
        )
    before = datasets.config.HF_HUB_OFFLINE
    try:
        # The library would ask the hub for most of a minute before it looks into its cache.
        datasets.config.HF_HUB_OFFLINE = bool(offline) or before
        return datasets.load_dataset(path, config)
    except Exception as error:  # of many libraries: network, parsing, missing repositories
        raise HubError(f"cannot load 'hf:{path}': {_reason(error)}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
