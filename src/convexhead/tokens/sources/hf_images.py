"""``hf:NAME_OR_FOLDER``: labelled images through the ``datasets`` library."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convexhead.errors import FileFormatError, HubError, InputError, choose, require
from convexhead.tokens.backbones.hub import unreachable
from convexhead.tokens.sources.base import BrokenImageError, check_split, match_splits
from convexhead.tokens.sources.decode import decode_image, decoded_anew
from convexhead.tokens.sources.naming import label_name, name_classes

OPTIONS = ("image", "label", "config")


class HubImages:
    """The image and label columns of a data set; images stay encoded until they are asked for."""

    def __init__(self, spec: str, parts: dict[str, Any], image: str, label: str) -> None:
        self.spec = spec
        self.splits = tuple(parts)
        self.left_out: dict[str, list[str]] = {}
        self._labels, self.class_names = _read_labels(spec, parts, label)
        self._files = {s: [f"{s}-{row}" for row in range(len(column))] for s, column in self._labels.items()}
        encoded = require("datasets", "sources").Image(decode=False)
        try:
            self._images = {s: data.select_columns(image).cast_column(image, encoded) for s, data in parts.items()}
        except Exception as error:  # of pyarrow, for columns of another kind
            raise InputError(f"the column {image!r} of {spec!r} holds no images: {_reason(error)}") from error
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
                try:
                    content = self._read(split, index, f"{split}-{index}")
                except BrokenImageError:  # loading it says so, and may be asked to leave it out
                    content = b""
                digest.update(hashlib.sha256(content + decoded_anew(content)).digest())
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

    Raises
    ------
    InputError
        Unknown options or columns, or no train split.
    FileFormatError
        A folder that ``datasets`` cannot read as images with labels.
    HubError
        Neither a folder nor in the local cache, and the hub cannot be reached or does not have it.
    MissingExtraError
        ``datasets`` is not installed.
    """
    datasets = require("datasets", "sources")
    path, _, query = name.partition("?")
    options = dict(parse_qsl(query))
    for option in options:
        choose("option of hf:", option, OPTIONS)
    data = _load(datasets, path, options.get("config"))
    names = match_splits(f"'hf:{path}'", map(str, data))
    parts = {split: data[name] for split, name in names.items()}
    if "train" not in parts:
        raise InputError(f"'hf:{path}' has the splits {', '.join(map(str, data))} but no train split")
    features = parts["train"].features
    images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = labels or [column for column in features if column in ("label", "labels")]
    image = _column(path, "image", images, options, features)
    label = _column(path, "label", labels, options, features)
    for split, part in parts.items():
        if missing := [column for column in (image, label) if column not in part.features]:
            raise InputError(f"the {split} split of 'hf:{path}' has no column {missing[0]!r}")
    _check_files(path, label, getattr(parts["train"].features[label], "names", None))
    source = HubImages(f"hf:{name}", parts, image, label)
    if others := [str(split) for split in data if split not in names.values()]:
        source.left_out["splits of another name"] = others
    return source


def _read_labels(spec: str, parts: dict[str, Any], label: str) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """Read the labels of all splits as indices of class names; splits with other names are matched by name."""
    own = {split: getattr(data.features[label], "names", None) for split, data in parts.items()}
    columns = {}
    for split, data in parts.items():
        names, values = own[split], list(data[label])
        for row, value in enumerate(values):
            where = f"{spec!r}: {split}-{row}"
            # -1 is how data sets mark the labels that they keep to themselves.
            if names and (value is None or not 0 <= value < len(names)):
                raise InputError(f"{where} has no label in the column {label!r}: images without a label are refused")
            values[row] = str(names[value]) if names else label_name(value, where)
        columns[split] = values
    names = own["train"]
    if not names:
        return name_classes(columns)
    index = {str(name): i for i, name in enumerate(names)}
    if len(index) < len(names):
        raise InputError(f"{spec!r}: two classes of the column {label!r} have the same name")
    for split, values in columns.items():
        if strangers := sorted(set(values) - set(index)):
            raise InputError(f"{spec!r}: the class {strangers[0]!r} has {split} images but no train images")
    labels = {split: np.asarray([index[value] for value in values], np.int64) for split, values in columns.items()}
    return labels, list(index)


def _check_files(path: str, label: str, names: list[str] | None) -> None:
    """Refuse a folder of parquet files whose numbers stand for other classes than those of the first file.

    ``datasets`` reads the numbers of all files with the first one's names.
    """
    if not names or not Path(path).expanduser().is_dir():
        return
    parquet = require("pyarrow.parquet", "sources")
    for file in sorted(Path(path).expanduser().rglob("*.parquet")):
        about = (parquet.read_schema(file).metadata or {}).get(b"huggingface")
        try:
            own = json.loads(about or b"{}")["info"]["features"][label]["names"]
        except (ValueError, KeyError, TypeError):
            continue
        if own != names:
            raise InputError(
                f"'hf:{path}': {file.name} has the classes {', '.join(map(str, own[:5]))} where others have "
                f"{', '.join(map(str, names[:5]))}: write all files with the same class names in the same order"
            )


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
            if any((local / file).is_file() for file in ("dataset_dict.json", "state.json")):
                saved = datasets.load_from_disk(str(local))  # which `load_dataset` reads with one split's classes
                return saved if hasattr(saved, "keys") else {"train": saved}
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
