"""Images with masks: ``SPLIT/images/NAME.*`` and ``SPLIT/labels/NAME.png``, whose values are numbers of classes."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convexhead.errors import InputError
from convexhead.tokens.sources.base import check_split, match_splits
from convexhead.tokens.sources.decode import EXTENSIONS, ORIENTATION, decode_image, decoded_anew
from convexhead.tokens.sources.folder_content import FolderContent, entries, is_folder
from convexhead.tokens.sources.naming import natural_sort

IMAGES, LABELS, NAMES = "images", "labels", "classes.txt"
MODES = frozenset({"1", "L", "P", "I", "I;16"})
"""Kinds of PNG files whose values are single whole numbers."""
TURNED = frozenset({5, 6, 7, 8})
"""EXIF orientations that exchange width and height."""
LARGEST = 2**15 - 2
"""The largest number of a class. Derived: masks are held in int16."""
USUAL_VOID = 255
"""The number that many data sets give to pixels without a label."""
UNKNOWN = -2
"""What a number that is no class becomes, until it is refused."""


class MaskFolder:
    """A folder of images with masks, optionally in ``train/``, ``val/`` and ``test/``.

    A mask is a grey or palette PNG of the size of its upright image. Without class names the numbers that the masks
    hold are the classes, and their names. With class names the numbers are positions in their list; ``void`` is none
    of the classes even if it is in the list. Images without a mask, masks without an image and other files are listed
    in ``left_out``.

    Parameters
    ----------
    root : path
    void : int or None
        The number of pixels that do not count.
    class_names : sequence of str, path or None
        The names of numbers 0, 1, …, or a text file with one a line; None: the file ``classes.txt`` in ``root`` if
        there is one.

    Raises
    ------
    InputError
        Folders that lack images or masks.
    """

    def __init__(
        self, root: str | Path, void: int | None = None, class_names: Sequence[str] | str | Path | None = None
    ) -> None:
        self.spec, self.root, self.void = str(root), Path(root).expanduser(), void
        if void is not None and not 0 <= void < 2**16:
            raise InputError(f"void={void} is no number that a mask can hold: give one of 0 .. 65535")
        self.left_out: dict[str, list[str]] = defaultdict(list)
        self._names = _read_names(class_names, self.root / NAMES)
        folders = _split_folders(self.root)
        if "train" not in folders:
            raise InputError(f"{self.spec!r} has the split folders {sorted(folders)} but no train/")
        self.splits = tuple(folders)
        self._pairs = {split: self._match(folder) for split, folder in folders.items()}
        self._content = FolderContent(self.root, self.names, decoded_anew)
        names = self._names  # without them every mask is read
        self.class_names = [str(number) if names is None else names[number] for number in self._numbers]

    @staticmethod
    def is_one(root: Path) -> bool:
        """Whether a folder, or a split in it, holds the folders ``images`` and ``labels`` and no other."""
        return any(set(_folders(folder)) == {IMAGES, LABELS} for folder in _split_folders(root).values())

    @property
    def names(self) -> list[str]:
        """The files of all splits, masks too."""
        return [name for pairs in self._pairs.values() for pair in pairs for name in pair]

    def labels(self, split: str) -> NoReturn:
        """Refuse: an image has no label of its own."""
        raise InputError(
            f"{self.spec!r} has masks, not one label an image: extract it, and train on its tokens with pool=None"
        )

    def files(self, split: str) -> list[str]:
        """Return the paths of the images relative to the root, with forward slashes."""
        return [image for image, _ in self._pairs[check_split(split, self.splits)]]

    def load(self, split: str, index: int) -> Image.Image:
        """Decode one image as RGB, upright as its EXIF orientation says."""
        path = self.root / self.files(split)[index]
        return decode_image(path, str(path))

    def mask(self, split: str, index: int) -> NDArray[np.int16]:
        """Decode one mask: classes of pixels, −1 for those that do not count."""
        name = self._pairs[check_split(split, self.splits)][index][1]
        values = self._values(name)
        places = np.full(int(values.max()) + 1, UNKNOWN, np.int16)
        for place, number in enumerate(self._numbers):
            places[number : number + 1] = place
        if self.void is not None:
            places[self.void : self.void + 1] = -1
        classes: NDArray[np.int16] = places[values]
        if (classes == UNKNOWN).any():
            self._refuse(name, int(values[classes == UNKNOWN][0]))
        return classes

    def pixels(self, split: str) -> NDArray[np.int64]:
        """Count the pixels of every class, then those that do not count."""
        if self._names is None and USUAL_VOID in self._numbers:
            raise InputError(
                f"masks of {self.spec!r} hold {USUAL_VOID}, as pixels without a label often are: say so with "
                f"void={USUAL_VOID}, or give class_names if it is a class"
            )
        counts = self._counts[check_split(split, self.splits)]
        void = 0 if self.void is None else counts[self.void]
        return np.append(counts[self._numbers], void)

    def fingerprint(self) -> str:
        """Hash the path and the bytes of every image and mask, and the names of the classes."""
        names = "\n".join(f"{number} {name}" for number, name in zip(self._numbers, self.class_names, strict=True))
        return hashlib.sha256(f"{self._content.fingerprint()}\n{names}".encode(errors="surrogateescape")).hexdigest()

    def changed(self) -> str | None:
        """Name a file that appeared, disappeared or was rewritten since the fingerprint was taken."""
        return self._content.changed(MaskFolder(self.root, self.void, self._names).names)

    def like(self, class_names: list[str], void: int | None) -> MaskFolder:
        """The source with these classes, and this void where it has none of its own."""
        void = void if self.void is None else self.void
        other = MaskFolder(self.root, void, self._names)
        if self._names is None and other.class_names != class_names:
            other = MaskFolder(self.root, void, class_names)
        if other.class_names != class_names:
            raise InputError(
                f"{self.spec!r} has the classes {_few(other.class_names)}, `like` has {_few(class_names)}: give the "
                "same class_names and void"
            )
        return other

    # -- reading ------------------------------------------------------------------------------------------------------
    @cached_property
    def _numbers(self) -> list[int]:
        """The numbers in the files that are classes."""
        if self._names is not None:
            return [number for number in range(len(self._names)) if number != self.void]
        found = np.flatnonzero(sum(self._counts.values()))
        numbers = [int(number) for number in found if number != self.void]
        if numbers and numbers[-1] > LARGEST:
            raise InputError(f"masks of {self.spec!r} hold {numbers[-1]}: classes are numbers up to {LARGEST}")
        return numbers

    @cached_property
    def _counts(self) -> dict[str, NDArray[np.int64]]:
        """How many pixels have each number of a file, of every split; all masks are read and checked.

        Raises
        ------
        InputError
            Names a mask that cannot be read, has another size than its image, or holds a number that is no class.
        """
        counts = {}
        with ThreadPoolExecutor() as pool:
            for split, pairs in self._pairs.items():
                counts[split] = np.zeros(2**16, np.int64)
                for (_, name), here in zip(pairs, pool.map(self._count, pairs), strict=True):
                    present = np.flatnonzero(here)
                    if self._names is not None:
                        strange = [n for n in present.tolist() if n >= len(self._names) and n != self.void]
                        if strange:
                            self._refuse(name, strange[0])
                    counts[split][present] += here[present]
        return counts

    def _count(self, pair: tuple[str, str]) -> NDArray[np.int64]:
        image, name = pair
        values = self._values(name)
        size = values.shape[::-1]
        try:
            with Image.open(self.root / image) as opened:
                turned = opened.getexif().get(ORIENTATION, 1) in TURNED
                wanted = opened.size[::-1] if turned else opened.size
        except Exception:  # a broken image, which is refused or counted when it is read
            wanted = size
        if size != wanted:
            raise InputError(
                f"the mask {name!r} has {size[0]}x{size[1]} pixels, its image {image!r} {wanted[0]}x{wanted[1]}: "
                "masks have the size of their images"
            )
        return np.bincount(values.reshape(-1), minlength=1)

    def _values(self, name: str) -> NDArray[np.int64]:
        """The numbers in a mask's file."""
        try:
            with Image.open(self.root / name) as mask:
                mode, values = mask.mode, np.asarray(mask)
        except Exception as error:  # decoders raise whatever corrupt bytes lead them to
            raise InputError(f"cannot read the mask {name!r} of {self.spec!r}: {error}") from error
        if mode not in MODES:
            raise InputError(
                f"the mask {name!r} of {self.spec!r} has colours ({mode}), not numbers of classes: save masks as grey "
                "or palette PNG"
            )
        return values.astype(np.int64)

    def _refuse(self, name: str, number: int) -> NoReturn:
        last = len(self._names or self._numbers) - 1
        raise InputError(
            f"the mask {name!r} of {self.spec!r} holds {number}, which is none of the classes 0 .. {last}: name all "
            f"classes with class_names, or give void={number} if such pixels do not count"
        )

    def _match(self, folder: Path) -> list[tuple[str, str]]:
        """Pairs of image and mask, as paths relative to the root."""
        missing = [name for name in (IMAGES, LABELS) if name not in _folders(folder)]
        if missing:
            raise InputError(f"{str(folder)!r} has no folder {missing[0]!r}: masks lie in it beside {IMAGES}/")
        within = PurePosixPath(folder.relative_to(self.root).as_posix())
        images = self._listed(folder / IMAGES, within / IMAGES, EXTENSIONS)
        masks = self._listed(folder / LABELS, within / LABELS, frozenset({".png"}))
        twice = [names for names in images.values() if len(names) > 1]
        if twice:
            raise InputError(f"{twice[0][0]!r} and {twice[0][1]!r} of {self.spec!r} share one mask: rename one")
        self.left_out["image without a mask"] += [images[stem][0] for stem in natural_sort(images.keys() - masks)]
        self.left_out["mask without an image"] += [masks[stem][0] for stem in natural_sort(masks.keys() - images)]
        pairs = [(images[stem][0], masks[stem][0]) for stem in natural_sort(images.keys() & masks)]
        if not pairs:
            raise InputError(
                f"no image in {str(folder / IMAGES)!r} has a mask: a mask of NAME.jpg is called {LABELS}/NAME.png"
            )
        return pairs

    def _listed(self, folder: Path, within: PurePosixPath, extensions: frozenset[str]) -> dict[str, list[str]]:
        """The files of these extensions by the stem of their names; others are noted as left out."""
        found: dict[str, list[str]] = defaultdict(list)
        for entry in entries(folder):
            path = within / entry.name
            if entry.name.startswith("."):
                self.left_out["hidden"].append(str(path))
            elif path.suffix.lower() in extensions:
                found[path.stem].append(str(path))
            else:
                what = "folder" if is_folder(entry) else path.suffix.lower() or "no extension"
                self.left_out[f"not an image ({what})"].append(str(path))
        return found


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in entries(folder) if is_folder(entry) and not entry.name.startswith(".")]


def _split_folders(root: Path) -> dict[str, Path]:
    """Folders of splits; a root that holds images and masks itself is the split ``"train"``."""
    if not root.is_dir():
        return {}
    names = _folders(root)
    if IMAGES in names and LABELS in names:
        return {"train": root}
    return {split: root / name for split, name in match_splits(repr(str(root)), names).items()}


def _read_names(given: Sequence[str] | str | Path | None, beside: Path) -> list[str] | None:
    """Names of classes from a list or a file; None where there are none."""
    if given is None and not beside.is_file():
        return None
    if given is None or isinstance(given, (str, Path)):
        file = beside if given is None else Path(given).expanduser()
        try:
            given = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the names of classes in {str(file)!r}: {error}") from error
    names = [str(name) for name in given]
    if len(set(names)) < len(names) or not names:
        raise InputError("class_names must be different names, one for each number from 0")
    if len(names) > LARGEST:
        raise InputError(f"class_names has {len(names)} names: at most {LARGEST} classes fit")
    return names


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f", … ({len(names)})" if len(names) > 5 else "")
