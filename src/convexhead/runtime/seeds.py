"""The seed of a fit's gates and random starts, drawn from what a user passes as ``random_state``."""

from __future__ import annotations

import numbers
import threading
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from convexhead.errors import InputError
from convexhead.runtime.ranks import Ranks

LARGEST = 2**31 - 1
"""Seeds are below this."""
SEEDED, SEEDING = np.random.RandomState(), threading.Lock()
"""A generator that one thread at a time seeds anew: making another takes a hundredth of a small fit."""


def draw_seed(random_state: Any, ranks: Ranks) -> int:
    """The seed, the same in all processes.

    Parameters
    ----------
    random_state : None, int or numpy RandomState
        As scikit-learn takes it; a generator goes on by one draw.
    ranks : Ranks

    Raises
    ------
    InputError
        Anything else.
    """
    try:
        return ranks.first_does(lambda: _drawn(random_state))
    except ValueError as error:
        raise InputError(
            f"random_state must be None, a whole number below 2**32 or a numpy RandomState, got {random_state!r}"
        ) from error


def _drawn(random_state: Any) -> int:
    if not isinstance(random_state, numbers.Integral):
        return int(check_random_state(random_state).randint(LARGEST))
    with SEEDING:
        SEEDED.seed(int(random_state))
        return int(SEEDED.randint(LARGEST))
