"""Several classes an image, or numbers, checked the same for every source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import InputError
from convexhead.tokens.sources.base import MULTI_LABEL

RESERVED = ("split", "image")
"""Names of columns that tables have already."""


def check_targets(values: NDArray[Any], task: str, where: str) -> NDArray[np.float64]:
    """Return targets ``(n, c)`` as float64.

    Parameters
    ----------
    values : array (n, c)
        Numbers or truth values.
    task : {"multi-label", "regression"}
        Targets of several classes are ones and zeros, or between.
    where : str
        Begins every message.

    Raises
    ------
    InputError
        Texts, NaN, infinity, or for several classes values outside of [0, 1], with the row; a single class.
    """
    if values.dtype.kind not in "biuf":
        raise InputError(f"{where} holds {values.dtype}: targets are numbers")
    if task == MULTI_LABEL and values.shape[1] == 1:
        raise InputError(
            f"{where} has one column, which tells two classes apart: say task='classes', or give a column for each of "
            "several classes"
        )
    targets = values.astype(np.float64)
    bad, why = ~np.isfinite(targets), "a value is missing or infinite: fill it in, or leave the image out"
    if task == MULTI_LABEL and not bad.any():
        bad = (targets < 0) | (targets > 1)
        why = "with several classes each target is 1 or 0, or between; for other numbers say task='regression'"
    if bad.any():
        row, column = (int(index[0]) for index in np.nonzero(bad))
        raise InputError(f"{where} has {targets[row, column]:g} in row {row}: {why}")
    return targets


def column_names(task: str, count: int, names: Sequence[str] | None) -> list[str]:
    """Return the names of ``count`` columns: those given, else numbers of classes, or ``output_1``, …

    Raises
    ------
    InputError
        Another number of names, or one that occurs twice or that tables use for something else.
    """
    if names is None:
        if task == MULTI_LABEL:
            return [str(k) for k in range(count)]
        return ["output"] if count == 1 else [f"output_{k}" for k in range(1, count + 1)]
    names = list(names)
    if len(names) != count:
        raise InputError(f"there are {len(names)} names for {count} columns of targets: give one for each")
    if twice := [name for name in names if names.count(name) > 1 or name in RESERVED or not name.strip()]:
        raise InputError(f"a column of targets cannot be called {twice[0]!r}: give each a name of its own")
    return names
