"""Images with a table of their labels beside them: ``images/`` and ``labels.csv``, or ``table:PATH``."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convexhead.errors import InputError, choose
from convexhead.tokens.sources.base import SPLIT_NAMES, SPLITS, check_split, match_splits
from convexhead.tokens.sources.decode import decode_image, decoded_anew
from convexhead.tokens.sources.folder_content import FolderContent, entries, is_folder
from convexhead.tokens.sources.image_folder import LooseImages
from convexhead.tokens.sources.label_table import (
    CLASSES,
    Table,
    check_cells,
    check_task,
    choose_task,
    read_classes,
    read_table,
    read_targets,
)
from convexhead.tokens.sources.naming import name_classes
from convexhead.tokens.sources.targets import column_names

IMAGES, MASKS, TABLES = "images", "labels", ("labels.csv", "labels.parquet")
OPTIONS = ("image", "label", "split", "images", "task")
SPLIT = "split"
"""The column that says the split of an image, unless another one is named."""


@dataclass(frozen=True)
class Place:
    """A table, the folder of its images, and the split of all its rows; None: a column may say it."""

    table: Path
    images: Path
    split: str | None


@dataclass
class Rows:
    """What tables say of the images that there are, split by split: files relative to the root, and cells."""

    files: dict[str, list[str]]
    cells: dict[str, dict[str, list[Any]]]
    left_out: dict[str, list[str]]


class ClassTable:
    """Images of one class each, which a table tells.

    Attributes
    ----------
    task : str
        ``"classes"``.
    """

    def __init__(self, spec: str, place: str, root: Path, tables: list[Path], rows: Rows, task: str) -> None:
        self.spec, self.root, self.task = spec, root, task
        self.splits = tuple(rows.files)
        self.left_out = rows.left_out
        self._place, self._files, self._tables = place, rows.files, tables
        self._known, self.class_names = self._read(rows)
        self._content = FolderContent(root, self.names, decoded_anew)

    def _read(self, rows: Rows) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Labels or targets of each split, and their names."""
        columns = {
            split: read_classes(next(iter(cells.values())), rows.files[split], repr(self.spec))
            for split, cells in rows.cells.items()
        }
        labels, names = name_classes(columns)
        return dict(labels), names

    @property
    def names(self) -> list[str]:
        """The tables, and the images of all splits, relative to the root."""
        tables = [_relative(table, self.root) for table in self._tables]
        return tables + [name for split in self.splits for name in self._files[split]]

    def labels(self, split: str) -> NDArray[np.int64]:
        return self._known[check_split(split, self.splits)]

    def files(self, split: str) -> list[str]:
        """Return the paths of the images relative to the root, with forward slashes, in the order of the rows."""
        return self._files[check_split(split, self.splits)]

    def load(self, split: str, index: int) -> Image.Image:
        """Decode one image as RGB, upright as its EXIF orientation says."""
        path = self.root / self.files(split)[index]
        return decode_image(path, str(path))

    def fingerprint(self) -> str:
        """Hash the path and the bytes of every table and image, splits, labels and their names."""
        digest = hashlib.sha256(self._content.fingerprint().encode())
        told = {"task": self.task, "names": self.class_names, "files": self._files}
        digest.update(json.dumps(told, ensure_ascii=True).encode())
        for split in self.splits:
            digest.update(np.ascontiguousarray(self._known[split]).tobytes())
        return digest.hexdigest()

    def changed(self) -> str | None:
        """Name a file that appeared, disappeared or was rewritten since the fingerprint was taken."""
        return self._content.changed(open_table(self._place).names)


class TargetTable(ClassTable):
    """Images with several classes each, or with numbers: see `convexhead.tokens.sources.base.TargetSource`."""

    def _read(self, rows: Rows) -> tuple[dict[str, NDArray[Any]], list[str]]:
        names = list(rows.cells["train"])
        return {
            split: read_targets(cells, rows.files[split], self.task, repr(self.spec))
            for split, cells in rows.cells.items()
        }, column_names(self.task, len(names), names)

    def labels(self, split: str) -> NoReturn:
        """Refuse: an image has no label of its own."""
        raise InputError(f"{self.spec!r} has targets, not one label an image")

    def targets(self, split: str) -> NDArray[np.float64]:
        return self._known[check_split(split, self.splits)]


def has_table(root: Path) -> bool:
    """Whether a folder, or a split in it, holds ``images/`` and a table of labels, and no other folder but masks."""
    return any(
        IMAGES in (folders := set(_folders(folder))) and folders <= {IMAGES, MASKS} and _table_in(folder) is not None
        for folder in _split_folders(root).values()
    )


def open_table(place: str, spec: str | None = None) -> ClassTable | TargetTable:
    """Open ``table:PATH``, a table or a folder with one, with options after a question mark.

    Images lie in ``images/`` beside the table, else beside it; ``images=FOLDER`` says where else. The first column has
    their names, or ``image=COLUMN``: paths below that folder, with or without extension. A column ``split``, or
    ``split=COLUMN``, says the split; folders ``train/``, ``test/`` with a table each do so too. All other columns are
    labels, or those of ``label=COLUMN,COLUMN``. ``task`` says what they are where that can be read in two ways.

    Rows whose image is not there, and images without a row, are listed in ``left_out``.

    Raises
    ------
    InputError
        Unknown options or columns, an image with two rows, an empty cell, or labels that cannot be used.
    FileFormatError
        A table that is damaged.
    """
    path, _, query = (place, "", "") if Path(place).expanduser().exists() else place.partition("?")
    options = _options(query)
    root = Path(path).expanduser()
    places = _places(root, options.get("images"))
    root = root if root.is_dir() else root.parent
    spec = f"table:{place}" if spec is None else spec
    tables = [read_table(each.table) for each in places]
    for table in tables[1:]:
        if odd := sorted(set(table.columns) ^ set(tables[0].columns)):
            raise InputError(
                f"{str(tables[0].path)!r} and {str(table.path)!r} have other columns: {odd[0]!r} is in one of them only"
            )
    image = options.get("image", next(iter(tables[0].columns)))
    labels = _label_columns(tables[0], image, options)
    rows = Rows({}, {}, defaultdict(list))
    for each, table in zip(places, tables, strict=True):
        _add(rows, root, each, table, image, labels, options)
    if "train" not in rows.files:
        raise InputError(f"{spec!r} has no train images: rows of {', '.join(rows.files)} only")
    rows.files = {split: rows.files[split] for split in SPLITS if split in rows.files}
    rows.cells = {split: rows.cells[split] for split in rows.files}
    every = {name: [cell for cells in rows.cells.values() for cell in cells[name]] for name in labels}
    task = check_task(options["task"], labels) if "task" in options else choose_task(every, repr(spec))
    kind = ClassTable if task == CLASSES else TargetTable
    return kind(spec, place, root, [each.table for each in places], rows, task)


def _options(query: str) -> dict[str, str]:
    try:
        given = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError as error:
        raise InputError(f"'?{query}' are no options: write ?NAME=VALUE&NAME=VALUE") from error
    options: dict[str, str] = {}
    for name, value in given:
        choose("option of table:", name, OPTIONS)
        options[name] = f"{options[name]},{value}" if name == "label" and name in options else value
    return options


def _places(root: Path, images: str | None) -> list[Place]:
    if root.is_file():
        return [Place(root, _images_of(root, images), None)]
    if not root.is_dir():
        raise InputError(f"there is no table or folder {str(root)!r}")
    places, without = [], []
    for split, folder in _split_folders(root).items():
        if (table := _table_in(folder)) is None:
            without.append(folder)
        else:
            places.append(Place(table, _images_of(table, images), None if folder == root else split))
    if places and without:
        raise InputError(
            f"{str(without[0])!r} has no table {' or '.join(TABLES)}, and {str(places[0].table)!r} is there"
        )
    if len(places) > 1 and images is not None and Path(images).expanduser().is_absolute():
        raise InputError(f"images={images} would be of {len(places)} tables: give a folder beside each, or one table")
    if not places:
        raise InputError(f"{str(root)!r} has no table {' or '.join(TABLES)}: name it, table:{root}/NAME.csv")
    return places


def _images_of(table: Path, images: str | None) -> Path:
    beside = table.parent / (IMAGES if images is None else Path(images).expanduser())
    if beside.is_dir():
        return beside
    if images is not None:
        raise InputError(f"there is no folder {str(beside)!r} of images")
    return table.parent


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in entries(folder) if is_folder(entry) and not entry.name.startswith(".")]


def _table_in(folder: Path) -> Path | None:
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(found) > 1:
        raise InputError(f"{str(folder)!r} has both {' and '.join(TABLES)}: say which, table:{folder}/NAME")
    return found[0] if found else None


def _split_folders(root: Path) -> dict[str, Path]:
    """Folders of splits; a root that holds a table itself is all of them, as ``"train"``."""
    if not root.is_dir():
        return {}
    if _table_in(root) is not None:
        return {"train": root}
    return {split: root / name for split, name in match_splits(repr(str(root)), _folders(root)).items()}


def _label_columns(table: Table, image: str, options: dict[str, str]) -> list[str]:
    table.column(image)
    split = options.get("split", SPLIT)
    if "split" in options:
        table.column(split)
    asked = [name.strip() for name in options["label"].split(",")] if "label" in options else []
    for name in asked:
        table.column(name)
    labels = asked or [name for name in table.columns if name not in (image, split)]
    if not labels or image in labels or split in labels:
        raise InputError(
            f"{str(table.path)!r} has the columns {', '.join(table.columns)}: one is of names of images ({image!r}), "
            "and another must be of labels"
        )
    return list(dict.fromkeys(labels))


def _add(
    rows: Rows, root: Path, place: Place, table: Table, image: str, labels: list[str], options: dict[str, str]
) -> None:
    """Add the rows of one table whose images are there."""
    where, column = repr(str(table.path)), options.get("split", SPLIT)
    found = _Found(place.images, place.table)
    if (header := next(iter(table.columns))) in found.names:
        raise InputError(f"the first line of {where} names an image, {header!r}: put names of columns in front of it")
    if place.split is not None and column in table.columns:
        raise InputError(f"{where} has a column {column!r}, and lies in the folder of a split: remove one of them")
    splits = [_split_name(name, where) for name in table.columns.get(column, [])]
    taken: dict[str, str] = {}
    check_cells(table.column(image), [f"row {i + 1}" for i in range(len(table.column(image)))], image, where)
    for i, cell in enumerate(table.column(image)):
        told = str(cell)
        name = found.name_of(told, where)
        if name is None:
            rows.left_out["row without an image"].append(told)
            continue
        if name in taken:
            raise InputError(f"{where} has two rows for the image {name!r} ({taken[name]!r}, {told!r}): remove one")
        taken[name] = told
        split = place.split or (splits[i] if splits else "train")
        rows.files.setdefault(split, []).append(_relative(place.images / name, root))
        cells = rows.cells.setdefault(split, {label: [] for label in labels})
        for label in labels:
            check_cells([table.column(label)[i]], [told], label, where)
            cells[label].append(table.column(label)[i])
    if not taken:
        raise InputError(
            f"no image in {str(place.images)!r} is in the column {image!r} of {where}, which has "
            f"{str(table.column(image)[0])!r}; there is {found.names[0]!r}: say which column has the names, ?image=NAME"
        )
    without = [_relative(place.images / name, root) for name in found.names if name not in taken]
    rows.left_out["image without a row"] += without
    for reason, names in found.left_out.items():
        rows.left_out[reason] += [_relative(place.images / name, root) for name in names]


class _Found:
    """The images in a folder, to be found by what a table calls them."""

    def __init__(self, folder: Path, table: Path) -> None:
        source = LooseImages(folder)
        self.names = source.files("images")
        self.left_out = {
            reason: kept
            for reason, names in source.left_out.items()
            if (kept := [name for name in names if folder / name != table])
        }
        self._folder, self._there = folder.name, set(self.names)
        self._stems: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            self._stems[str(PurePosixPath(name).with_suffix(""))].append(name)

    def name_of(self, told: str, where: str) -> str | None:
        """Return the image that a table calls ``told``; None if it is not there.

        Raises
        ------
        InputError
            It may be one or another.
        """
        path = PurePosixPath(told)
        inside = [str(path)]
        if len(path.parts) > 1 and path.parts[0] == self._folder:
            inside.append(str(PurePosixPath(*path.parts[1:])))
        for name in inside:
            if name in self._there:
                return name
            if len(same := self._stems.get(name, [])) > 1:
                raise InputError(f"{where} has {told!r}, which may be {same[0]!r} or {same[1]!r}: add the extension")
            if same:
                return same[0]
        return None


def _split_name(name: Any, where: str) -> str:
    if str(name) not in SPLIT_NAMES:
        raise InputError(f"{where} has the split {str(name)[:40]!r}: splits are named {', '.join(SPLITS)}")
    return SPLIT_NAMES[str(name)]


def _relative(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()
