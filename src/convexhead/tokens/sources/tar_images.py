"""``webdataset:PATTERN``: labelled images in tar shards.

The shards are read through once to note where each image begins; after that images are read in any order, as
from a folder, without unpacking anything.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens.sources.base import SPLIT_NAMES, SPLITS, BrokenImageError, check_split
from convexhead.tokens.sources.decode import (
    EXTENSIONS,
    MAYBE_DEEP,
    decode_image,
    decoded_anew,
)
from convexhead.tokens.sources.naming import name_classes, natural_sort
from convexhead.tokens.store.files import sha256_file


@dataclass(frozen=True)
class _Member:
    """One image: ``size`` bytes from ``offset`` of a tar file, and its label."""

    tar: Path
    shard: str
    name: str
    offset: int
    size: int
    label: str


class TarImages:
    """The images of tar shards, in the order of shards and of the files within.

    As in webdataset, the key of a file is its path up to the first dot of its name; an image and a label of one
    key belong together. Keys of different shards have nothing to do with each other.

    Raises
    ------
    InputError
        No shards, no train shard, or a shard without labelled images.
    FileFormatError
        A shard that is not a whole, plain tar file; an image without a label, a label without
        an image, or two of one key.
    """

    def __init__(self, pattern: str) -> None:
        self.spec = f"webdataset:{pattern}"
        self._pattern = pattern
        tars, beside = _find_shards(pattern)
        self.left_out = {"beside the shards": beside} if beside else {}
        self._shards = _shard_names(tars)
        self._stamps = {tar: _stamp(tar) for tar in tars}
        members: dict[str, list[_Member]] = {}
        for tar, split in _splits_of(self.spec, tars).items():
            found, left_out = _index(tar, self._shards[tar])
            members.setdefault(split, []).extend(found)
            for reason, names in left_out.items():
                self.left_out.setdefault(reason, []).extend(names)
        self._members = {split: members[split] for split in SPLITS if split in members}
        if "train" not in self._members:
            raise InputError(f"{self.spec!r} has the splits {', '.join(self._members)} but no train shards")
        self.splits = tuple(self._members)
        self._files = {split: [f"{m.shard}/{m.name}" for m in each] for split, each in self._members.items()}
        columns = {split: [member.label for member in each] for split, each in self._members.items()}
        self._labels, self.class_names = name_classes(columns)

    def labels(self, split: str) -> NDArray[np.int64]:
        return self._labels[check_split(split, self.splits)]

    def files(self, split: str) -> list[str]:
        """Return ``SHARD/NAME`` of every image."""
        return self._files[check_split(split, self.splits)]

    def load(self, split: str, index: int) -> Image.Image:
        member = self._members[check_split(split, self.splits)][index]
        name = f"{member.tar}/{member.name}"
        try:
            content = _read(member)
        except OSError as error:
            raise BrokenImageError(f"cannot read the image {name!r}: {error.strerror}") from error
        return decode_image(io.BytesIO(content), name)

    def fingerprint(self) -> str:
        """Hash the shards' names and bytes."""
        digest = hashlib.sha256()
        for tar, shard in self._shards.items():
            digest.update(f"{shard}\0{sha256_file(tar)}\n".encode(errors="surrogateescape"))
        for member in (member for split in self.splits for member in self._members[split]):
            if PurePosixPath(member.name).suffix.lower() in MAYBE_DEEP:
                digest.update(decoded_anew(_read(member)))
        return digest.hexdigest()

    def changed(self) -> str | None:
        """Name a shard that appeared, disappeared or was rewritten since the source was opened."""
        tars, _ = _find_shards(self._pattern)
        if strangers := set(tars) ^ set(self._stamps):
            tar = min(strangers)
            return f"{str(tar)!r} {'appeared' if tar in tars else 'disappeared'}"
        return next((f"{str(tar)!r} was rewritten" for tar in tars if _stamp(tar) != self._stamps[tar]), None)


open_webdataset = TarImages


def _stamp(tar: Path) -> tuple[int, int]:
    """Return what tells a rewritten shard; reading one that is not there says so."""
    try:
        status = tar.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _read(member: _Member) -> bytes:
    with open(member.tar, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _find_shards(pattern: str) -> tuple[list[Path], list[str]]:
    """Find the shards of a pattern with ``*``, ``?``, ``[...]`` and ``{000..012}``, or of a folder.

    Returns
    -------
    The shards, and what else is in the folder.
    """
    folder = Path(pattern).expanduser()
    beside: list[str] = []
    if folder.is_dir():
        beside = natural_sort(path.name for path in folder.iterdir() if path.suffix != ".tar")
        pattern = str(Path(glob.escape(str(folder))) / "*.tar")
    found: set[str] = set()
    for each in _expand_braces(str(Path(pattern).expanduser())):
        shards = glob.glob(each)
        if not shards and each != pattern:
            raise InputError(f"there is no tar shard {each!r}")
        found.update(shards)
    if not found:
        raise InputError(f"no file matches 'webdataset:{pattern}'")
    return [Path(name) for name in natural_sort(found)], beside


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    whole = [pattern[: match.start()] + number + pattern[match.end() :] for number in numbers]
    return [each for name in whole for each in _expand_braces(name)]


def _shard_names(tars: list[Path]) -> dict[Path, str]:
    """Name shards by their file names, or by their paths below the common folder where those are not unique."""
    names = [tar.name for tar in tars]
    if len(set(names)) < len(names):
        common = os.path.commonpath([tar.parent for tar in tars])
        names = [Path(os.path.relpath(tar, common)).as_posix() for tar in tars]
    return dict(zip(tars, names, strict=True))


def _splits_of(spec: str, tars: list[Path]) -> dict[Path, str]:
    """Tell the split of every shard by the words in its name, or else in that of its folder."""
    several = len({tar.parent for tar in tars}) > 1
    splits = {}
    for tar in tars:
        named = _split_words(tar.stem) or (_split_words(tar.parent.name) if several else set())
        if len(named) > 1:
            raise InputError(f"{spec!r}: the shard {str(tar)!r} has the names of {len(named)} splits: rename it")
        splits[tar] = named.pop() if named else "train"
    return splits


def _split_words(name: str) -> set[str]:
    words = {word.lower() for word in re.findall("[A-Za-z]+", name)}
    names = {**SPLIT_NAMES, "training": "train", "testing": "test"}
    return {names[word] for word in words if word in names}


def _index(tar: Path, shard: str) -> tuple[list[_Member], dict[str, list[str]]]:
    """Note the place of every image of a shard, and its label; list what is neither, by reason."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, tuple[str, str]] = {}
    left_out: dict[str, list[str]] = {}
    try:
        # "r:" refuses compressed files, in which no place can be looked up.
        with open(tar, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for entry in archive:
                folder, name = PurePosixPath(entry.name).parent, PurePosixPath(entry.name).name
                stem, _, rest = name.partition(".")
                key, extension = str(folder / stem), PurePosixPath(f"x.{rest}").suffix.lower()
                used = extension == ".cls" or extension in EXTENSIONS
                if entry.isdir():
                    continue
                if name.startswith(".") or not used:
                    reason = "hidden" if name.startswith(".") else f"no image or label ({extension or 'no extension'})"
                    left_out.setdefault(reason, []).append(f"{shard}/{entry.name}")
                    continue
                if not entry.isreg() or entry.issparse():
                    raise FileFormatError(
                        f"{str(tar)!r}: {entry.name!r} is a link or has holes: write the shard with the files "
                        "themselves (tar --dereference --hard-dereference)"
                    )
                if extension == ".cls":
                    _refuse_second(tar, "labels", key, labels[key][0] if key in labels else None, entry.name)
                    content = archive.extractfile(entry)
                    labels[key] = entry.name, content.read().decode().strip() if content else ""
                else:
                    _refuse_second(tar, "images", key, images[key].name if key in images else None, entry.name)
                    images[key] = entry
            _check_end(tar, file, archive.offset)
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{str(tar)!r} is not a whole, uncompressed tar file: {error}") from error
    if missing := [entry.name for key, entry in images.items() if key not in labels or not labels[key][1]]:
        raise FileFormatError(f"{str(tar)!r}: the image {missing[0]!r} has no label (a file of that name with .cls)")
    if missing := [name for key, (name, _) in labels.items() if key not in images]:
        raise FileFormatError(
            f"{str(tar)!r}: the label {missing[0]!r} has no image (a file of that name with one of "
            f"{', '.join(sorted(EXTENSIONS))})"
        )
    if not images:
        raise InputError(f"{str(tar)!r} holds no images ({', '.join(sorted(EXTENSIONS))})")
    members = [
        _Member(tar, shard, entry.name, entry.offset_data, entry.size, labels[key][1]) for key, entry in images.items()
    ]
    return members, left_out


def _refuse_second(tar: Path, what: str, key: str, first: str | None, second: str) -> None:
    if first is not None:
        raise FileFormatError(
            f"{str(tar)!r}: {first!r} and {second!r} are two {what} of the key {key!r}, which ends at the first dot "
            "of a name: write one of them, or names without dots"
        )


def _check_end(tar: Path, file: IO[bytes], offset: int) -> None:
    """Refuse a tar file whose members are not followed by two blocks of zeros and then by zeros alone.

    `tarfile` takes the end of the file, or a header that it cannot read, for the end of the archive.
    """
    file.seek(offset)
    end = file.read(2 * tarfile.BLOCKSIZE)
    if len(end) < 2 * tarfile.BLOCKSIZE and not end.strip(b"\0"):
        raise FileFormatError(f"{str(tar)!r} is not a whole tar file: its end is missing, copy or write it again")
    if end.strip(b"\0"):
        raise FileFormatError(f"{str(tar)!r} is not a whole tar file: there is no file's header at byte {offset}")
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise FileFormatError(
                f"{str(tar)!r} goes on after its end, as joined tar files do: give those one by one, or join "
                "them with tar --concatenate"
            )
