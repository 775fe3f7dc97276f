"""Names of classes and files, the same for every source."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import InputError


def label_name(value: object, where: str) -> str:
    """Return the class name that a label stands for: a text, a whole number or a truth value.

    Raises
    ------
    InputError
        No label, or one that is no class; the message begins with ``where``.
    """
    if isinstance(value, bytes):
        value = value.decode(errors="surrogateescape")
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        value = int(value)
    if isinstance(value, (str, bool, int, np.integer, np.bool_)) and str(value).strip():
        return str(value)
    missing = np.isnan(value) if isinstance(value, (float, np.floating)) else value is None or isinstance(value, str)
    if missing:
        raise InputError(f"{where} has no label ({value!r}): leave it out of the data set, or label it")
    raise InputError(f"{where} has the label {str(value)[:40]!r}: a label is one text or one whole number")


def natural_sort(names: Iterable[str]) -> list[str]:
    """Sort names with their numbers compared as numbers.

    >>> natural_sort(["img10", "img2", "a"])
    ['a', 'img2', 'img10']
    """

    def key(name: str) -> tuple[list[tuple[int, str]], str]:
        # Odd parts of the split are digits; the pair keeps numbers and text comparable at any position.
        parts = re.split(r"([0-9]+)", name)
        return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)], name

    return sorted(names, key=key)


def name_classes(columns: dict[str, list[str]]) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """Turn labels into indices of class names: the distinct labels of all splits in natural order."""
    class_names = natural_sort({label for column in columns.values() for label in column})
    index = {name: i for i, name in enumerate(class_names)}
    labels = {split: np.asarray([index[label] for label in column], np.int64) for split, column in columns.items()}
    return labels, class_names


def check_class_indices(what: str, columns: dict[str, NDArray[np.int64]], n_classes: int) -> None:
    """Refuse labels that are not integers ``0 .. n_classes - 1``.

    Raises
    ------
    InputError
        Names the split.
    """
    for split, column in columns.items():
        if column.dtype.kind not in "iu" or (column.size and not 0 <= column.min() <= column.max() < n_classes):
            raise InputError(f"{what}: {split} labels must be integers below {n_classes} (class_names)")


def encode_labels(
    file: str, columns: dict[str, NDArray[Any]], class_names: list[str] | None
) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """Turn label columns into indices of class names, which are the distinct labels if None are given.

    Raises
    ------
    InputError
        A label that is none, or no index of the class names.
    """
    if class_names is None:
        named = {
            split: [label_name(label, f"{file!r}: {split}-{i}") for i, label in enumerate(column.tolist())]
            for split, column in columns.items()
        }
        return name_classes(named)
    check_class_indices(repr(file), columns, len(class_names))
    return {split: column.astype(np.int64) for split, column in columns.items()}, class_names
