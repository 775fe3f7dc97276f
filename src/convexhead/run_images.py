"""The images of a store that a run trains on, and those that choose its β."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split

from convexhead.errors import InputError
from convexhead.folds import check_groups, hold_out_groups
from convexhead.group_table import check_tested_apart, read_groups
from convexhead.runtime.ranks import Ranks
from convexhead.tokens import TokenStore, whitened

HELD_OUT = 0.2
"""Share of the training images that chooses β where nothing else is said, as is usual."""


def open_split(store: str | Path, split: str) -> Any:
    """The images ``split`` of a store.

    Raises
    ------
    InputError
        The store has no such split; the message names those that it has.
    """
    opened = TokenStore.open(store)
    if split not in opened.splits:
        raise InputError(f"{store} has no split {split!r}, only {', '.join(opened.splits)}")
    return opened[split]


def train_of(store: str | Path, whiten: float, ranks: Ranks | None = None) -> Any:
    """The training images of a store in the metric ``whiten``, which is fitted on all of them by one process."""
    train = open_split(store, "train")
    return train.reduced((ranks or Ranks()).first_does(lambda: whitened(train, whiten).reduction))


def grouped(train: Any, groups: str | Path | None, cv: Any) -> dict[str, Any]:
    """What ``fit`` takes of a table of groups, which folds keep together.

    Raises
    ------
    InputError
        There are no folds, or see `read_groups`.
    """
    if groups is not None and cv is None:
        raise InputError("groups are kept together in the folds of a cross-validation: leave groups out, or give cv")
    return {} if groups is None else {"groups": read_groups(groups, train)}


def parts(
    store: str | Path, train: Any, validation: float | None, random_state: int, groups: str | Path | None = None
) -> tuple[Any, Any]:
    """The images to train on, and those to choose β by; ``groups`` of a table, see `read_groups`, are kept together."""
    if validation is None and "val" in TokenStore.open(store).splits:
        val = open_split(store, "val").reduced(train.reduction)
        if groups is not None:
            check_tested_apart(groups, train, val)
        return train, val
    each, share = train.labels if train.task == "classes" else None, validation or HELD_OUT  # others have no label
    if groups is None:
        kept, held = train_test_split(np.arange(len(train)), test_size=share, stratify=each, random_state=random_state)
    else:
        kept, held = hold_out_groups(each, check_groups(read_groups(groups, train), len(train)), share, random_state)
    return train.subset(np.sort(kept)), train.subset(np.sort(held))
