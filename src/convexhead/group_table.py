"""Tables of groups: a CSV or parquet file with the columns ``image`` and ``group``; see `convexhead.folds`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import InputError
from convexhead.tokens.sources.label_table import check_cells, read_table
from convexhead.tokens.store.view import SplitView

IMAGE, GROUP = "image", "group"
"""The columns of a table of groups."""


def read_groups(path: str | Path, view: SplitView) -> NDArray[Any]:
    """The group of each image of a split, by a table with the columns ``image`` and ``group``.

    Rows of other images are not read.

    Parameters
    ----------
    path : path
        A file ``.csv`` or ``.parquet``; names of images are those that the store has.
    view : SplitView

    Returns
    -------
    array of str (n,)

    Raises
    ------
    InputError
        An image without a row, with two, or without a group.
    FileFormatError
        A file that is damaged.
    """
    told, names = _table(path), view.files
    if strange := [name for name in names if name not in told]:
        raise InputError(
            f"{str(path)!r} has no row for the image {strange[0]!r} of the split {view.split}, which is one of "
            f"{len(strange)}: give each image a row, under this name"
        )
    return np.array([told[name] for name in names])


def names_some(path: str | Path, view: SplitView) -> bool:
    """Whether a table of groups has a row of an image of this split; `read_groups` then asks for all of them."""
    return not _table(path).keys().isdisjoint(view.files)


def check_tested_apart(path: str | Path, train: SplitView, test: SplitView) -> None:
    """Refuse a group of the train images of which another split has images too, so far as the table tells.

    Raises
    ------
    InputError
        Names it.
    """
    told = _table(path)
    mine = {told[name] for name in train.files if name in told}
    for name in test.files:
        if told.get(name) in mine:
            raise InputError(
                f"the group {told[name]!r} has train images, and the {test.split} image {name!r}: put each group into "
                "one split"
            )


def _table(path: str | Path) -> dict[str, str]:
    table = read_table(Path(path).expanduser())
    where = repr(str(path))
    names, groups = [str(cell) for cell in table.column(IMAGE)], table.column(GROUP)
    check_cells(groups, names, GROUP, where)
    told: dict[str, str] = {}
    for name, group in zip(names, groups, strict=True):
        if told.setdefault(name, str(group)) != str(group):
            raise InputError(f"{where} has the image {name!r} in two groups, {told[name]!r} and {str(group)!r}")
    return told
