"""Tables of labels: CSV or parquet files with a row for each image, and what the labels in them are."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import FileFormatError, InputError, choose, require
from convexhead.tokens.sources.base import MULTI_LABEL, REGRESSION, TASKS
from convexhead.tokens.sources.naming import label_name
from convexhead.tokens.sources.targets import check_targets

CLASSES = "classes"
"""What is known of an image with one class."""
EXTENSIONS = (".csv", ".parquet")
TRUTH = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class Table:
    """A file with named columns of equal length; cells of a CSV file are texts without spaces around them."""

    path: Path
    columns: dict[str, list[Any]]

    def column(self, name: str) -> list[Any]:
        """Return a column.

        Raises
        ------
        InputError
            There is none of this name.
        """
        return self.columns[choose(f"column of {str(self.path)!r}", name, self.columns)]


def read_table(path: Path) -> Table:
    """Read a file ``.csv`` (commas, UTF-8, a first line with names of columns) or ``.parquet``.

    Raises
    ------
    InputError
        Another kind of file, no rows, or columns without a name of their own.
    FileFormatError
        A file that is damaged, or a line with more or fewer cells than the first.
    MissingExtraError
        Parquet without pyarrow.
    """
    suffix = path.suffix.lower()
    if suffix not in EXTENSIONS:
        raise InputError(f"{str(path)!r} is no table: give a file {' or '.join(EXTENSIONS)}")
    names, rows = _csv(path) if suffix == ".csv" else _parquet(path)
    odd = [name for name in names if not name.strip() or names.count(name) > 1]
    if odd:
        raise InputError(f"{str(path)!r} has a column called {odd[0]!r}: give each column a name of its own")
    if not rows:
        raise InputError(f"{str(path)!r} has no rows: it needs one for each image")
    return Table(path, {name: [row[i] for row in rows] for i, name in enumerate(names)})


def _csv(path: Path) -> tuple[list[str], list[Sequence[Any]]]:
    rows: list[Sequence[Any]] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            names = [name.strip() for name in next(lines, [])]
            for cells in lines:
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise FileFormatError(
                        f"line {lines.line_num} of {str(path)!r} has {len(cells)} cells, its first line {len(names)}"
                    )
                rows.append([cell.strip() for cell in cells])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileFormatError(f"{str(path)!r} is no CSV file in UTF-8: {error}") from error
    if len(names) == 1 and any(sign in names[0] for sign in ";\t"):
        raise FileFormatError(f"the cells of {str(path)!r} are not separated by commas: save it with commas")
    return names, rows


def _parquet(path: Path) -> tuple[list[str], list[Sequence[Any]]]:
    pyarrow = require("pyarrow", "stores")
    parquet = require("pyarrow.parquet", "stores")
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise FileFormatError(f"{str(path)!r} is no whole parquet file: {error}") from error
    columns = [column.to_pylist() for column in table.columns]
    return [str(name) for name in table.column_names], list(zip(*columns, strict=True))


# -- what the cells are -----------------------------------------------------------------------------------------------
def number(cell: Any) -> float | None:
    """A cell as a number, a truth value as 1 or 0; None of a text."""
    if isinstance(cell, (bool, int, float, np.number)):
        return float(cell)
    try:
        return float(cell)
    except (TypeError, ValueError):
        return TRUTH.get(str(cell).lower())


def check_cells(cells: Sequence[Any], images: Sequence[str], column: str, where: str) -> None:
    """Refuse cells without a value.

    Raises
    ------
    InputError
        Names the image.
    """
    for cell, image in zip(cells, images, strict=True):
        nan = isinstance(cell, (float, np.floating)) and math.isnan(cell)
        if cell is None or nan or (isinstance(cell, str) and cell in ("", "nan", "NaN")):
            raise InputError(f"{where} has no {column!r} for {image!r}: fill the cell in, or leave the row out")


def choose_task(columns: dict[str, list[Any]], where: str) -> str:
    """What the labels of images are, by the cells of their columns.

    Raises
    ------
    InputError
        What can be read in two ways.
    """
    cells = [cell for column in columns.values() for cell in column]
    numbers = [number(cell) for cell in cells]
    known = [value for value in numbers if value is not None]
    texts, whole = len(known) < len(numbers), all(value.is_integer() for value in known)
    if len(columns) == 1:
        truth = all(isinstance(cell, bool) or str(cell).lower() in TRUTH for cell in cells)
        if texts or truth:
            return CLASSES
        if whole:
            raise InputError(
                f"{where} has whole numbers in {next(iter(columns))!r}, which may be classes or numbers to predict: "
                f"say ?task={CLASSES} or ?task={REGRESSION} behind table:PATH"
            )
        return REGRESSION
    if texts:
        return MULTI_LABEL  # refused with the cell, when it is read
    if set(known) <= {0.0, 1.0}:
        return MULTI_LABEL
    if min(known) >= 0 and max(known) <= 1:
        raise InputError(
            f"{where} has several columns of shares, which may be labels or numbers to predict: "
            f"say ?task={MULTI_LABEL} or ?task={REGRESSION} behind table:PATH"
        )
    return REGRESSION


def check_task(task: str, columns: Sequence[str]) -> str:
    """Return a task that somebody asks for.

    Raises
    ------
    InputError
        There is none of that name, or it is for another number of columns.
    """
    choose("task", task, (CLASSES, *TASKS))
    if task == CLASSES and len(columns) > 1:
        raise InputError(
            f"task={CLASSES!r} reads one column, and there are {', '.join(columns)}: say which, ?label=NAME"
        )
    return task


def read_classes(cells: Sequence[Any], images: Sequence[str], where: str) -> list[str]:
    """The class name of each image."""
    return [label_name(cell, f"{where}: {image!r}") for cell, image in zip(cells, images, strict=True)]


def read_targets(columns: dict[str, list[Any]], images: Sequence[str], task: str, where: str) -> NDArray[np.float64]:
    """Targets ``(n, c)``.

    Raises
    ------
    InputError
        Texts, or numbers that are no targets of ``task``.
    """
    made = []
    for name, cells in columns.items():
        values = [number(cell) for cell in cells]
        if None in values:
            row = values.index(None)
            raise InputError(
                f"{where} has {str(cells[row])[:40]!r} in {name!r} for {images[row]!r}, which is no number: say which "
                "columns are labels, ?label=NAME,NAME behind table:PATH, or which column has the names, ?image=NAME"
            )
        made.append(values)
    return check_targets(np.array(made, np.float64).T.reshape(len(images), len(columns)), task, where)
