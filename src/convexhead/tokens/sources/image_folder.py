"""Images in folders: a folder a class, or wherever they lie."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from convexhead.errors import InputError
from convexhead.tokens.sources.class_folders import ClassFolders
from convexhead.tokens.sources.decode import EXTENSIONS, decode_image, decoded_anew
from convexhead.tokens.sources.folder_content import FolderContent
from convexhead.tokens.sources.naming import natural_sort


class ImageFolder(ClassFolders):
    """Class folders of image files."""

    kind, other, extensions = "images", "not an image", EXTENSIONS

    def load(self, split: str, index: int) -> Image.Image:
        """Decode one image as RGB, upright as its EXIF orientation says."""
        path = self.root / self.files(split)[index]
        return decode_image(path, str(path))

    def mark(self, content: bytes) -> bytes:
        return decoded_anew(content)


class LooseImages(ImageFolder):
    """All images in a folder, however deep and whatever its folders mean, or one image file: they have no labels.

    Raises
    ------
    InputError
        There are none.
    """

    splits_inside = True

    def __init__(self, root: str | Path) -> None:
        place = Path(root).expanduser()
        self.spec, self.root = str(root), place if place.is_dir() else place.parent
        self.left_out = defaultdict(list)
        files = natural_sort(self._inside(place, ())) if place.is_dir() else [place.name]
        if not files or (place.is_file() and place.suffix.lower() not in EXTENSIONS):
            raise InputError(f"{str(root)!r} holds no images ({', '.join(sorted(EXTENSIONS))})")
        self.left_out = defaultdict(list, {
            reason: [name.removeprefix("./") for name in names] for reason, names in self.left_out.items()
        })  # fmt: skip
        self.splits, self.class_names = ("images",), [""]
        self._files, self._labels = {"images": files}, {"images": np.zeros(len(files), np.int64)}
        self._content = FolderContent(self.root, self.names, self.mark)
