"""Images in class folders, the layout of torchvision's ``ImageFolder``."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convexhead.errors import InputError
from convexhead.tokens.decode import EXTENSIONS, decode_image, natural_sort
from convexhead.tokens.sources import SPLITS, BrokenImageError, check_split

SMALL = 20_000
"""Mean bytes of a file under which threads only wait for each other's turn in Python: hashing takes no time."""


class ImageFolder:
    """A folder of class folders, optionally inside ``train/``, ``val/`` and ``test/``.

    Class names are folder names; classes and files are in natural order (``img2`` before ``img10``). Files
    with other extensions and hidden files are left out. Without split folders all images are the split
    ``"train"``.

    Raises:
        InputError: a missing or empty folder, a class folder without images, a class only outside of train.
    """

    def __init__(self, root: str | Path) -> None:
        self.spec = str(root)
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            hint = f"; did you mean 'npz:{root}'?" if self.root.suffix == ".npz" else ""
            raise InputError(f"{str(root)!r} is a file, not a folder of class folders{hint}")
        folders = _split_folders(self.root)
        self.splits = tuple(folders)
        self.class_names = [folder.name for folder in _class_folders(folders["train"])]
        self._labels: dict[str, NDArray[np.int64]] = {}
        self._files: dict[str, list[str]] = {}
        for split, folder in folders.items():
            self._labels[split], self._files[split] = self._scan(folder)

    def _scan(self, split_folder: Path) -> tuple[NDArray[np.int64], list[str]]:
        labels: list[int] = []
        files: list[str] = []
        for folder in _class_folders(split_folder):
            if folder.name not in self.class_names:
                raise InputError(f"class folder {str(folder)!r} has no counterpart among the train classes")
            images = natural_sort(
                entry.name
                for entry in os.scandir(folder)
                if Path(entry.name).suffix.lower() in EXTENSIONS and not entry.name.startswith(".")
            )
            if not images:
                raise InputError(f"class folder {str(folder)!r} holds no images ({', '.join(sorted(EXTENSIONS))})")
            prefix = folder.relative_to(self.root).as_posix()
            files += [f"{prefix}/{name}" for name in images]
            labels += [self.class_names.index(folder.name)] * len(images)
        return np.asarray(labels, dtype=np.int64), files

    def labels(self, split: str) -> NDArray[np.int64]:
        return self._labels[check_split(split, self.splits)]

    def files(self, split: str) -> list[str]:
        """Return the paths relative to the root, with forward slashes."""
        return self._files[check_split(split, self.splits)]

    def load(self, split: str, index: int) -> Image.Image:
        """Decode one image as RGB, upright as its EXIF orientation says."""
        path = self.root / self.files(split)[index]
        return decode_image(path, str(path))

    def fingerprint(self) -> str:
        """Hash every relative path and every file's bytes.

        Bytes, not modification times: a folder that was copied or unpacked again is the same source, and an
        edited image is never mistaken for the old one. Each file is read once more, which costs little beside
        the backbone.
        """
        names = [name for split in self.splits for name in self._files[split]]
        digest = hashlib.sha256()
        with ThreadPoolExecutor() as pool:
            some = [self.root / name for name in names[:: len(names) // 100 + 1]]
            small = sum(path.stat().st_size for path in some if path.exists()) < SMALL * len(some)
            hashes = (map if small else pool.map)(self._hash_file, names)
            for name, content in zip(names, hashes, strict=True):
                digest.update(f"{name}\0{content}\n".encode())
        return digest.hexdigest()

    def _hash_file(self, name: str) -> str:
        try:
            return hashlib.sha256((self.root / name).read_bytes()).hexdigest()
        except OSError as error:
            raise BrokenImageError(f"cannot read the image {str(self.root / name)!r}: {error}") from error


def _subfolders(folder: Path) -> list[Path]:
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    return [folder / name for name in natural_sort(names)]


def _split_folders(root: Path) -> dict[str, Path]:
    """Map split names to folders; a root without split folders is the split ``"train"`` itself."""
    names = {folder.name for folder in _subfolders(root)}
    if not names & set(SPLITS) or not any(_subfolders(root / name) for name in names & set(SPLITS)):
        return {"train": root}
    if "train" not in names:
        raise InputError(f"{str(root)!r} has the split folders {sorted(names & set(SPLITS))} but no train/")
    if strangers := sorted(names - set(SPLITS)):
        raise InputError(f"{str(root)!r} holds {strangers[0]!r} beside train/: splits are named {', '.join(SPLITS)}")
    return {split: root / split for split in SPLITS if split in names}


def _class_folders(split_folder: Path) -> list[Path]:
    folders = _subfolders(split_folder)
    if not folders:
        raise InputError(f"{str(split_folder)!r} has no class folders: put the images of each class into a folder")
    return folders
