"""Which array is what: tokens, labels, names, lengths and class names of each split, told by their names.

A name may begin or end with a split: ``X_train``, ``train/tokens``, ``test-labels``. Without one it belongs to train.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from convexhead.errors import InputError
from convexhead.tokens.arrays.loader import as_loaders, read_loader
from convexhead.tokens.arrays.open import READERS, facts_of, open_arrays
from convexhead.tokens.arrays.rows import Rows, rows_of
from convexhead.tokens.sources.base import SPLIT_NAMES, SPLITS

ROLES = {
    "tokens": ("x", "tokens", "features", "feats", "embeddings"),
    "labels": ("y", "labels", "label", "targets", "target"),
    "names": ("names", "name", "files", "file", "filenames", "paths", "path", "ids", "id"),
    "prefix": ("prefix",),
    "lengths": ("lengths", "length", "n_tokens"),
    "class_names": ("class_names", "classes"),
}
"""Names, in small letters, that arrays of each role have."""
IN_ORDER = ("tokens", "labels", "names")
"""Roles of several files or arrays of one split."""


@dataclass
class Found:
    """What was found.

    Attributes
    ----------
    spec
        Where, in one line.
    splits
        Of each split its arrays by role.
    class_names
        What integer labels mean, or None.
    files
        All files that arrays are read from.
    left_out
        Names of arrays and files of no known role, by reason.
    exported_reduced
        Whether the tokens are those of a store as they are read, and not as they are stored.
    """

    spec: str
    splits: dict[str, dict[str, Rows]] = field(default_factory=dict)
    class_names: list[str] | None = None
    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    exported_reduced: bool = False


def find_arrays(arrays: Any, keys: dict[str, str | None], run: Callable[[Tensor], Tensor] | None = None) -> Found:
    """Find the arrays of every split.

    Parameters
    ----------
    arrays
        A file; a folder of them, with a file a split or a file an array; or of each split a file, or files or arrays
        in the order tokens, labels, names, or a loader that yields these. A loader may stand alone, for train.
    keys
        Names that the user gave for roles.
    run
        Makes tokens of what loaders yield.

    Raises
    ------
    InputError
        Two arrays of one role, or a split without tokens or labels.
    FileFormatError
        A file that cannot be read.
    """
    finder, arrays = _Finder(keys, run), as_loaders(arrays) or arrays
    if isinstance(arrays, Mapping):
        if not arrays:
            raise InputError("there are no arrays: give a file, a folder, or one for each split")
        for split, value in arrays.items():
            if split not in SPLIT_NAMES:
                raise InputError(f"unknown split {split!r}: splits are named {', '.join(SPLITS)}")
            finder.split(SPLIT_NAMES[split], value)
        told = {split: _told(value) for split, value in arrays.items()}
        finder.found.spec = " ".join(f"{split}={value}" for split, value in told.items())
    else:
        path = Path(arrays).expanduser()
        finder.found.spec = str(arrays)
        if path.is_dir():
            finder.folder(path)
        else:
            finder.file(path, None)
    return finder.finished()


def holds_arrays(folder: Path) -> bool:
    """Whether arrays lie in the folder itself, and not in class folders.

    Raises
    ------
    InputError
        They do both.
    """
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in READERS]
    folders = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if files and folders:
        raise InputError(
            f"{str(folder)!r} holds the array {min(files).name!r} and the folder {min(folders)!r}: give one file or "
            "folder of arrays, or a folder of class folders"
        )
    return bool(files)


class _Finder:
    def __init__(self, keys: dict[str, str | None], run: Callable[[Tensor], Tensor] | None) -> None:
        self._run = run
        self.found = Found("")
        self.roles = {
            role: names if keys.get(role) is None else (_rest(str(keys[role])),) for role, names in ROLES.items()
        }

    def split(self, split: str, value: Any) -> None:
        """Take what the user gave for one split."""
        if isinstance(value, (str, Path)):
            self.file(Path(value).expanduser(), split)
            return
        if isinstance(value, DataLoader):
            for role, rows in read_loader(value, split, self._run).items():
                self._take(split, role, rows)
            return
        if not isinstance(value, (tuple, list)) or not 2 <= len(value) <= len(IN_ORDER):
            raise InputError(f"{split} must be a file, or (tokens, labels) or (tokens, labels, names)")
        for role, part in zip(IN_ORDER, value, strict=False):
            if isinstance(part, (str, Path)):
                self._take(split, role, self._only(Path(part).expanduser()))
            else:
                self._take(split, role, rows_of(part, f"{role} of {split}"))

    def folder(self, folder: Path) -> None:
        """Take a folder with a file a split, or a file an array."""
        for path in sorted(folder.iterdir()):
            suffix = path.suffix.lower()
            if path.name == "store.json":
                self._facts(path)
            elif suffix == ".npy":
                self._sort(self._open(path), None)
            elif suffix in READERS:
                splits = {SPLIT_NAMES[word] for word in _words(path.stem) if word in SPLIT_NAMES}
                if len(splits) != 1:
                    raise InputError(f"{str(path)!r} does not say its split: splits are named {', '.join(SPLITS)}")
                self.file(path, splits.pop())
            elif not path.name.startswith("."):
                self.found.left_out.setdefault("not an array", []).append(path.name)

    def file(self, path: Path, split: str | None) -> None:
        """Take a file, all of whose arrays belong to ``split`` if that is given."""
        if path.suffix.lower() == ".npy":
            self._take(split or "train", "tokens", self._only(path))
            return
        self._sort(self._open(path), split)
        if path.suffix.lower() in (".h5", ".hdf5"):
            self._facts(path)

    def finished(self) -> Found:
        """Return everything, once each split has tokens and labels."""
        splits = self.found.splits
        unknown = self.found.left_out.get("arrays of another name", [])
        for role in ("tokens", "labels"):
            lacking = [split for split in splits or ["train"] if role not in splits.get(split, {})]
            if lacking:
                others = f" ({', '.join(unknown[:8])})" if unknown else ""
                raise InputError(
                    f"{self.found.spec!r} has no {role} of {lacking[0]}: give them the name "
                    f"{' or '.join(self.roles[role][:3])}, or say {role}= with the name that they have{others}; "
                    "or give two files a split, tokens and labels"
                )
        if "train" not in splits:
            raise InputError(f"{self.found.spec!r} has no train split, only {', '.join(splits)}: name one train")
        self.found.splits = {split: splits[split] for split in SPLITS if split in splits}
        return self.found

    def _open(self, path: Path) -> dict[str, Rows]:
        self.found.files.append(path)
        return open_arrays(path)

    def _only(self, path: Path) -> Rows:
        found = self._open(path)
        if len(found) != 1:
            raise InputError(f"{str(path)!r} holds {len(found)} arrays, where one is meant: give a file with one")
        return next(iter(found.values()))

    def _facts(self, path: Path) -> None:
        facts = facts_of(path)
        names = facts.get("class_names")
        if names is not None:
            self.found.class_names = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
        self.found.exported_reduced = facts.get("raw") is False
        self.found.files.append(path)

    def _sort(self, found: dict[str, Rows], split: str | None) -> None:
        """Put arrays where their names say."""
        for key, rows in found.items():
            said = {SPLIT_NAMES[word] for word in _words(key) if word in SPLIT_NAMES}
            role = next((role for role, names in self.roles.items() if _rest(key) in names), None)
            if _rest(key) in ("split", "splits", "fold"):
                raise InputError(f"{rows.name} may say which split a sample is in: give one file for each split")
            if role is None or len(said) > 1 or (split is not None and said - {split}):
                self.found.left_out.setdefault("arrays of another name", []).append(key)
            elif role == "class_names":
                self.found.class_names = texts(rows)
            else:
                self._take(split or next(iter(said), "train"), role, rows)

    def _take(self, split: str, role: str, rows: Rows) -> None:
        roles = self.found.splits.setdefault(split, {})
        if role in roles:
            raise InputError(
                f"{roles[role].name} and {rows.name} may both be the {role} of {split}: say {role}= with one name"
            )
        roles[role] = rows


def texts(rows: Rows) -> list[str]:
    """Return names: an array of texts or numbers, or of bytes ``(n, w)`` padded with zeros as `export_store` has them.

    Raises
    ------
    InputError
        Something else.
    """
    values = rows.whole()
    if values.dtype == np.uint8 and values.ndim == 2:
        return [bytes(row).rstrip(b"\0").decode(errors="surrogateescape") for row in values]
    if values.ndim != 1 or values.dtype.kind not in "SUOTiu":
        raise InputError(f"{rows.name} must be one name a row, not {values.dtype} {values.shape}")
    return [v.decode(errors="surrogateescape") if isinstance(v, bytes) else str(v) for v in values.tolist()]


def _words(key: str) -> list[str]:
    return [word for word in re.split(r"[/_.\-\s]+", key.lower()) if word]


def _rest(key: str) -> str:
    """Return a name without the split in it."""
    return "_".join(word for word in _words(key) if word not in SPLIT_NAMES)


def _told(value: Any) -> str:
    if isinstance(value, (str, Path)):
        return str(value)
    parts = value if isinstance(value, (tuple, list)) else [value]
    if isinstance(value, DataLoader):
        return type(value.dataset).__name__
    return ",".join(str(part) if isinstance(part, (str, Path)) else "arrays in memory" for part in parts)
