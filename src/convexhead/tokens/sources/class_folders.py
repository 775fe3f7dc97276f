"""Files in class folders, the layout of torchvision's ``ImageFolder``."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import InputError
from convexhead.tokens.sources.base import SPLIT_NAMES, SPLITS, check_split, match_splits
from convexhead.tokens.sources.folder_content import FolderContent, entries, is_folder
from convexhead.tokens.sources.naming import natural_sort

SPLIT_LIKE = frozenset({*SPLIT_NAMES, "training", "testing", "dev", "eval", "evaluation"})
"""Names, in small letters, of folders that are splits rather than classes where they hold folders."""


class ClassFolders:
    """A folder of class folders, optionally inside ``train/``, ``val/`` and ``test/``, with a file a sample.

    Class names are the names of the top folders; files of deeper folders belong to the class that holds them,
    as in torchvision's ``ImageFolder``. Classes and files are in natural order (``img2`` before ``img10``). What
    is hidden, has another extension or lies beside the class folders is listed in ``left_out``. Without split
    folders all files are the split ``"train"``.

    Attributes
    ----------
    kind
        What a file holds, in the plural.
    other
        What a file is called that has another extension.
    extensions
        Of the files that are read, in small letters.
    splits_inside
        Whether a folder deep inside may be called as a split is.

    Raises
    ------
    InputError
        A missing or empty folder, a class folder without such files, a class only outside of train, or
        folders that look like splits where classes are expected.
    """

    kind: ClassVar[str]
    other: ClassVar[str]
    extensions: ClassVar[frozenset[str]]
    splits_inside: ClassVar[bool] = False

    def __init__(self, root: str | Path) -> None:
        self.spec = str(root)
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            scheme = {".npz": "npz", ".csv": "table", ".parquet": "table"}.get(self.root.suffix.lower())
            hint = f"; did you mean '{scheme}:{root}'?" if scheme else ""
            raise InputError(f"{str(root)!r} is a file, not a folder of class folders{hint}")
        self.left_out: dict[str, list[str]] = defaultdict(list)
        folders = self._split_folders()
        self.splits = tuple(folders)
        classes = {split: self._class_folders(folder) for split, folder in folders.items()}
        self.class_names = [folder.name for folder in classes["train"]]
        self._labels: dict[str, NDArray[np.int64]] = {}
        self._files: dict[str, list[str]] = {}
        for split, each in classes.items():
            self._labels[split], self._files[split] = self._scan(each)
        self._content = FolderContent(self.root, self.names, self.mark)

    def labels(self, split: str) -> NDArray[np.int64]:
        return self._labels[check_split(split, self.splits)]

    def files(self, split: str) -> list[str]:
        """Return the paths relative to the root, with forward slashes."""
        return self._files[check_split(split, self.splits)]

    def mark(self, content: bytes) -> bytes:
        """Return what the fingerprint has of a file's ``content`` beside that itself."""
        return b""

    def fingerprint(self) -> str:
        """Hash every relative path and every file's bytes.

        Bytes, not modification times: a folder that was copied or unpacked again is the same source, and an
        edited image is never mistaken for the old one. Each file is read once more, which costs little beside
        the backbone. A file that cannot be read counts as one without bytes: loading it says what is wrong.
        """
        return self._content.fingerprint()

    def changed(self) -> str | None:
        """Name a file that appeared, disappeared or was rewritten since the fingerprint was taken."""
        return self._content.changed(type(self)(self.root).names)

    @property
    def names(self) -> list[str]:
        """The files of all splits, as `files` gives them."""
        return [name for split in self.splits for name in self._files[split]]

    def _split_folders(self) -> dict[str, Path]:
        """Map splits to folders; a root without split folders is the split ``"train"`` itself."""
        names = self._folders(self.root)
        nested = [name for name in names if self._has_folders(self.root / name)]
        found = match_splits(repr(self.spec), names)
        if not any(name in nested for name in found.values()):
            return {"train": self.root}
        if "train" not in found:
            raise InputError(f"{self.spec!r} has the split folders {sorted(found.values())} but no train/")
        if strangers := sorted(set(names) - set(found.values())):
            raise InputError(
                f"{self.spec!r} holds {strangers[0]!r} beside train/: splits are named {', '.join(SPLITS)}"
            )
        self._leave_files(self.root)
        return {split: self.root / name for split, name in found.items()}

    def _class_folders(self, split_folder: Path) -> list[Path]:
        names = self._folders(split_folder)
        if not names:
            raise InputError(
                f"{str(split_folder)!r} has no class folders: put the {self.kind} of each class into a folder"
            )
        like = [name for name in names if name.lower() in SPLIT_LIKE]
        trains = any(name.lower().startswith("train") for name in like)
        if (trains and like == names) or any(self._has_folders(split_folder / name) for name in like):
            raise InputError(
                f"{str(split_folder)!r} has {', '.join(map(repr, like))} where class folders should be: splits are "
                f"the folders {', '.join(SPLITS)}, in small letters, with a folder for each class"
            )
        self._leave_files(split_folder)
        return [split_folder / name for name in names]

    def _scan(self, class_folders: list[Path]) -> tuple[NDArray[np.int64], list[str]]:
        labels: list[int] = []
        files: list[str] = []
        index = {name: i for i, name in enumerate(self.class_names)}
        for folder in class_folders:
            if folder.name not in index:
                raise InputError(f"class folder {str(folder)!r} has no counterpart among the train classes")
            names = natural_sort(self._inside(folder, ()))
            if not names:
                extensions = ", ".join(sorted(self.extensions))
                raise InputError(f"class folder {str(folder)!r} holds no {self.kind} ({extensions})")
            prefix = folder.relative_to(self.root).as_posix()
            files += [f"{prefix}/{name}" for name in names]
            labels += [index[folder.name]] * len(names)
            if len(class_folders) == 1 and all("/" in name for name in names):
                raise InputError(
                    f"{str(folder)!r} is the only class folder, and its {self.kind} lie in folders of their own: "
                    "if those are the classes, give that folder"
                )
        return np.asarray(labels, dtype=np.int64), files

    def _inside(self, folder: Path, above: tuple[str, ...]) -> Iterator[str]:
        """Yield the files of a folder and of those in it, as paths relative to it."""
        place = os.path.realpath(folder)
        if place in above:
            raise InputError(f"{str(folder)!r} is a link to a folder that holds it: remove the link")
        within = folder.relative_to(self.root).as_posix()
        for entry in entries(folder):
            extension = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                self.left_out["hidden"].append(f"{within}/{entry.name}")
            # A folder of such a name, or a link to nowhere, is a file that cannot be read.
            elif extension in self.extensions:
                yield entry.name
            elif not is_folder(entry):
                self.left_out[f"{self.other} ({extension or 'no extension'})"].append(f"{within}/{entry.name}")
            elif self._looks_like_split(entry):
                raise InputError(
                    f"'{within}/{entry.name}' of {self.spec!r} looks like a split inside a class: give the folder "
                    "that holds it, or rename it"
                )
            else:
                for name in self._inside(Path(entry.path), (*above, place)):
                    yield f"{entry.name}/{name}"

    def _looks_like_split(self, entry: os.DirEntry[str]) -> bool:
        return not self.splits_inside and entry.name.lower() in SPLIT_LIKE and self._has_folders(Path(entry.path))

    def _folders(self, folder: Path) -> list[str]:
        return natural_sort(e.name for e in entries(folder) if is_folder(e) and not e.name.startswith("."))

    def _has_folders(self, folder: Path) -> bool:
        return any(is_folder(e) and not e.name.startswith(".") for e in entries(folder))

    def _leave_files(self, folder: Path) -> None:
        """Note what lies beside the folders of splits or classes: it has no label."""
        for entry in entries(folder):
            if not is_folder(entry) or entry.name.startswith("."):
                reason = "hidden" if entry.name.startswith(".") else "beside the folders of classes"
                self.left_out[reason].append((folder / entry.name).relative_to(self.root).as_posix())
