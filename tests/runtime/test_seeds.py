"""Seeds are those that scikit-learn would draw."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sklearn.utils import check_random_state

import convexhead as ch
from convexhead.runtime.ranks import Ranks
from convexhead.runtime.seeds import draw_seed


@pytest.mark.parametrize("seed", [0, 1, np.int64(7), 2**32 - 1])
def test_a_number_gives_one_seed(seed):
    assert draw_seed(seed, Ranks()) == check_random_state(seed).randint(2**31 - 1)


def test_threads_do_not_mix_up_their_seeds():
    with ThreadPoolExecutor(4) as threads:
        drawn = list(threads.map(lambda seed: draw_seed(seed, Ranks()), range(400)))
    assert drawn == [np.random.RandomState(seed).randint(2**31 - 1) for seed in range(400)]


def test_a_generator_goes_on():
    ours, theirs = np.random.RandomState(3), np.random.RandomState(3)
    assert [draw_seed(ours, Ranks()) for _ in range(2)] == [theirs.randint(2**31 - 1) for _ in range(2)]


@pytest.mark.parametrize("value", [-1, 2**32, 1.5, "a"])
def test_what_is_no_seed_is_refused(value):
    with pytest.raises(ch.InputError, match="random_state must be"):
        draw_seed(value, Ranks())
