"""``webdataset:PATTERN``: labelled images in tar shards.

The shards are read through once to note where each image begins; after that images are read in any order, as
from a folder, without unpacking anything.
"""

from __future__ import annotations

import glob
import hashlib
import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens.decode import EXTENSIONS, decode_image, name_classes, natural_sort
from convexhead.tokens.files import sha256_file
from convexhead.tokens.sources import SPLITS, check_split


@dataclass(frozen=True)
class _Member:
    """One image: ``size`` bytes from ``offset`` of a tar file, and its label."""

    tar: Path
    name: str
    offset: int
    size: int
    label: str


class TarImages:
    """The images of tar shards, in the order of shards and of the files within.

    Raises:
        InputError: no shards, no train shard, or a shard without labelled images.
        FileFormatError: a shard that is not a plain tar file, or an image without a label.
    """

    def __init__(self, pattern: str) -> None:
        self.spec = f"webdataset:{pattern}"
        self._tars = _find_shards(pattern)
        members: dict[str, list[_Member]] = {}
        for tar in self._tars:
            members.setdefault(_split_of(tar), []).extend(_index(tar))
        self._members = {split: members[split] for split in SPLITS if split in members}
        if "train" not in self._members:
            raise InputError(f"{self.spec!r} has the splits {', '.join(self._members)} but no train shards")
        self.splits = tuple(self._members)
        self._files = {split: [f"{m.tar.name}/{m.name}" for m in each] for split, each in self._members.items()}
        columns = {split: [member.label for member in each] for split, each in self._members.items()}
        self._labels, self.class_names = name_classes(columns)

    def labels(self, split: str) -> NDArray[np.int64]:
        return self._labels[check_split(split, self.splits)]

    def files(self, split: str) -> list[str]:
        """Return ``SHARD/NAME`` of every image."""
        return self._files[check_split(split, self.splits)]

    def load(self, split: str, index: int) -> Image.Image:
        member = self._members[check_split(split, self.splits)][index]
        with open(member.tar, "rb") as file:
            file.seek(member.offset)
            return decode_image(io.BytesIO(file.read(member.size)), f"{member.tar}/{member.name}")

    def fingerprint(self) -> str:
        """Hash the shards' names and bytes."""
        digest = hashlib.sha256()
        for tar in self._tars:
            digest.update(f"{tar.name}\0{sha256_file(tar)}\n".encode())
        return digest.hexdigest()


open_webdataset = TarImages


def _find_shards(pattern: str) -> list[Path]:
    """Return the shards of a pattern with ``*``, ``?``, ``[...]`` and ``{000..012}``, or of a folder."""
    if Path(pattern).expanduser().is_dir():
        pattern = str(Path(pattern) / "*.tar")
    found: set[str] = set()
    for each in _expand_braces(str(Path(pattern).expanduser())):
        shards = glob.glob(each)
        if not shards and each != pattern:
            raise InputError(f"there is no tar shard {each!r}")
        found.update(shards)
    if not found:
        raise InputError(f"no file matches 'webdataset:{pattern}'")
    return [Path(name) for name in natural_sort(found)]


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    whole = [pattern[: match.start()] + number + pattern[match.end() :] for number in numbers]
    return [each for name in whole for each in _expand_braces(name)]


def _split_of(tar: Path) -> str:
    return next((split for split in SPLITS if tar.name.startswith(split)), "train")


def _index(tar: Path) -> list[_Member]:
    """Note the place of every image of a shard, and its label."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    try:
        # "r:" refuses compressed files, in which no place can be looked up.
        with tarfile.open(tar, "r:") as archive:
            for entry in archive:
                folder, name = PurePosixPath(entry.name).parent, PurePosixPath(entry.name).name
                stem, _, extension = name.partition(".")
                key = str(folder / stem)
                if not entry.isfile() or name.startswith("."):
                    continue
                if extension == "cls" and (content := archive.extractfile(entry)) is not None:
                    labels[key] = content.read().decode().strip()
                elif f".{extension.lower()}" in EXTENSIONS:
                    images[key] = (entry.name, entry.offset_data, entry.size)
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{str(tar)!r} is not a whole, uncompressed tar file: {error}") from error
    if not images:
        raise InputError(f"{str(tar)!r} holds no images ({', '.join(sorted(EXTENSIONS))})")
    if missing := [name for key, (name, _, _) in images.items() if not labels.get(key)]:
        raise FileFormatError(f"{str(tar)!r}: the image {missing[0]!r} has no label (a file of that name with .cls)")
    return [_Member(tar, *place, labels[key]) for key, place in images.items()]
