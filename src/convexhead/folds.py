"""Folds and parts of samples, to train on and to score on.

Some samples belong together, such as the frames of a drive or the images of a patient. What is learnt of some of a
group says much of the others, and a score on these would flatter. So a group is trained on or scored on as a whole.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, GroupShuffleSplit, StratifiedGroupKFold, check_cv

from convexhead import inputs
from convexhead.errors import InputError
from convexhead.padding import Padded

Rows = NDArray[np.int64]
FOLDS = 5
"""Folds where nothing is said, as in scikit-learn."""
DRAWS = 100
"""Random choices of groups to hold out, of which the first that leaves every class to train on is taken. Chosen by
hand: where so many fail, hardly any would do."""


def splits_of(cv: Any, X: Any, y: Any, groups: Any, *, classifier: bool) -> list[tuple[Rows, Rows]]:
    """The samples to train on and those to score on, of each fold; rising, so that stores are read in their order.

    Raises
    ------
    InputError
        No splits, or samples that are none, or samples or groups that are in both parts.
    """
    together = None if groups is None else check_groups(groups, len(y))
    count = _count(cv)
    with inputs.told_plainly():
        listed = isinstance(cv, Iterable) and not isinstance(cv, str) and not hasattr(cv, "split")
        tokens = X.tokens if isinstance(X, Padded) else X
        if together is not None and count is not None:
            splits = grouped_folds(count, y if classifier and y.ndim == 1 else None, together)
        else:
            splits = list(cv) if listed else list(check_cv(cv, y, classifier=classifier).split(tokens, y, groups))
    if not splits:
        raise InputError("cv gives no split: pass a number of folds, a splitter, or pairs (train, test) of indices")
    found = []
    for i, split in enumerate(splits):
        try:
            train, test = split
        except (TypeError, ValueError) as error:
            raise InputError(
                "cv must give pairs (train, test) of indices; pass one split as [(train, test)]"
            ) from error
        rows = _rows(train, len(y), f"train part of split {i + 1}"), _rows(test, len(y), f"test part of split {i + 1}")
        if both := np.intersect1d(*rows).tolist():
            raise InputError(
                f"split {i + 1} of cv has samples in both parts, such as {both[0]}: scores would be of them"
            )
        found.append(rows)
    if together is not None:
        _check_apart(found, together)
    return found


def _rows(index: Any, n: int, what: str) -> Rows:
    with inputs.told_plainly():
        rows = np.asarray(index)
    if rows.dtype == bool and rows.shape == (n,):
        rows = np.flatnonzero(rows)
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or not len(rows) or rows.min() < 0 or rows.max() >= n:
        raise InputError(f"the {what} of cv must be indices of samples below {n}, at least one")
    return np.sort(rows).astype(np.int64)


# -- groups ------------------------------------------------------------------------------------------------------------
def check_groups(groups: Any, n: int) -> Rows:
    """The number of the group of each sample, ``(n,)``.

    Parameters
    ----------
    groups : array (n,)
        Numbers or names.

    Raises
    ------
    InputError
        Another shape, missing values or mixed types.
    """
    with inputs.told_plainly():
        values = np.asarray(inputs.plain(groups, "groups"))
    if values.shape != (n,):
        raise InputError(f"groups must be one number or name for each of the {n} samples, got {values.shape}")
    told = values.tolist()
    if len({type(value) for value in told}) > 1 or any(value is None or value != value for value in told):
        raise InputError("groups mix several types, or lack some: give every sample a number, or a name")
    codes: Rows = np.unique(values, return_inverse=True)[1].astype(np.int64)
    return codes


def grouped_folds(cv: int, labels: NDArray[Any] | None, groups: Rows) -> list[tuple[Rows, Rows]]:
    """The samples to train on and those to score on of ``cv`` folds, no group in both.

    They are those of scikit-learn's ``StratifiedGroupKFold`` for labels, and of ``GroupKFold`` where samples have none
    or where these would leave a fold empty.

    Parameters
    ----------
    labels : array (n,) or None
    groups : int array (n,)

    Raises
    ------
    InputError
        Fewer groups than folds.
    """
    count = len(np.unique(groups))
    if cv < 2 or count < cv:
        raise InputError(f"cv={cv} folds of whole groups need 2 folds and {max(cv, 2)} groups, and there are {count}")
    n, found = np.zeros(len(groups)), list[tuple[Rows, Rows]]()
    if labels is not None and np.unique(labels, return_counts=True)[1].max() >= cv:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class")
            found = list(StratifiedGroupKFold(cv).split(n, labels, groups))
    if not found or any(not len(test) for _, test in found):
        found = list(GroupKFold(cv).split(n, None, groups))
    return found


def hold_out_groups(labels: NDArray[Any] | None, groups: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """The samples that are kept, and those of a random ``share`` of the groups, in their order.

    Raises
    ------
    InputError
        A single group, or classes that lie in one group each.
    """
    if len(np.unique(groups)) < 2:
        raise InputError("all images are of one group: to hold some out, groups must be two or more")
    for kept, held in GroupShuffleSplit(DRAWS, test_size=share, random_state=seed).split(groups, None, groups):
        if labels is None or len(np.unique(labels[kept])) == len(np.unique(labels)):
            return np.sort(kept), np.sort(held)
    raise InputError(
        f"no {100 * share:g}% of the groups can be held out so that images of every class are left to train on: "
        "a class should be in several groups"
    )


def _check_apart(splits: Sequence[tuple[Rows, Rows]], groups: Rows) -> None:
    """Refuse folds with a group in both parts.

    Raises
    ------
    InputError
        Says which fold.
    """
    for i, (train, test) in enumerate(splits):
        if len(np.intersect1d(groups[train], groups[test])):
            raise InputError(
                f"split {i + 1} of cv has a group in both parts: pass a number of folds, or a splitter that keeps "
                "groups together, such as GroupKFold"
            )


def _count(cv: Any) -> int | None:
    """How many folds ``cv`` asks for, 5 for None; None where it gives the folds itself."""
    if cv is None:
        return FOLDS
    return int(cv) if isinstance(cv, numbers.Integral) else None
