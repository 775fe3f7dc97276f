"""The images of a store that a run trains on, and those that choose its β."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split

from convexhead.errors import InputError
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


def parts(store: str | Path, train: Any, validation: float | None, random_state: int) -> tuple[Any, Any]:
    """The images to train on, and those to choose β by."""
    if validation is None and "val" in TokenStore.open(store).splits:
        return train, open_split(store, "val").reduced(train.reduction)
    each = train.labels if train.task == "classes" else None  # others have no label
    kept, held = train_test_split(
        np.arange(len(train)), test_size=validation or HELD_OUT, stratify=each, random_state=random_state
    )
    return train.subset(np.sort(kept)), train.subset(np.sort(held))
