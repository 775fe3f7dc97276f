"""Passes over several cores: the same sums for any number of workers, the same every time for one number of them."""

import os
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from convexhead.inputs import open_tokens
from convexhead.program import operator
from convexhead.program.atoms import Atoms
from convexhead.runtime import samples, workers
from convexhead.runtime.workers import add_up
from passes import CASES, C, D, passes, problem_on


@pytest.fixture(autouse=True)
def _three_workers_and_small_batches(monkeypatch):
    monkeypatch.setitem(samples.BATCH_BYTES, "cpu", 1000)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    X = np.random.default_rng(0).normal(size=(61, 6, D))
    path = tmp_path_factory.mktemp("tokens") / "X.npy"
    np.save(path, X)
    return X, path


def in_one(monkeypatch, work):
    """What ``work()`` gives in the calling thread alone, and with how many workers it would have been."""
    asked = []

    def alone(*args, workers, context):
        asked.append(workers)
        add_up(*args, workers=1, context=context)

    with monkeypatch.context() as patch:
        patch.setattr(operator, "add_up", alone)
        result = work()
    return result, max(asked)


@pytest.mark.parametrize("on_disk", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "activation"),
    [pytest.param(*case, marks=pytest.mark.slow if case[0].endswith("fno") else ()) for case in CASES],
)
def test_every_pass_is_the_same_for_any_number_of_workers(name, activation, on_disk, tokens, monkeypatch):
    X = open_tokens(np.load(tokens[1], mmap_mode="r")) if on_disk else torch.from_numpy(tokens[0])
    made = problem_on(X, name, activation, memory=1e3 if on_disk else 1e9)
    assert made.operator.samples.complete != on_disk
    alone, asked = in_one(monkeypatch, lambda: passes(made))
    assert asked == (3 if 2 * made.head.least_batch < len(X) else 1)
    for one, other, again in zip(alone, passes(made), passes(made), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-13)
        assert torch.equal(other, again)


def test_rough_products_are_added_up_in_float32(tokens, monkeypatch):
    monkeypatch.setattr("convexhead.program.operator.has_fast_bfloat16", lambda device: True)
    X = torch.from_numpy(tokens[0])
    half = problem_on(X, "self-attention", "linear", dtype=torch.float32).with_half_products()
    atoms = Atoms(torch.ones(5, D, D), torch.ones(5, D, C), torch.zeros(5, dtype=torch.int64), torch.zeros(C))

    def gradients():
        at = half.value_and_gradient(atoms, 0.1).gradient
        return [at.U, at.V, at.intercept]

    alone, asked = in_one(monkeypatch, gradients)
    assert asked == 3
    for one, other in zip(alone, gradients(), strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def batches(n):
    return ((slice(i, i + 1), {"X": torch.full((1,), float(i))}) for i in range(n))


def test_batches_take_turns_and_threads_have_one_core_each():
    seen = {}

    def work(rows, data):
        seen[rows.start] = threading.current_thread().name, torch.get_num_threads(), torch.is_inference_mode_enabled()
        return (data["X"],)

    total = torch.zeros(1)
    with torch.inference_mode():
        add_up(batches(10), work, (total,), workers=3, context=nullcontext)
    assert float(total) == 45
    assert [seen[i] for i in range(10)] == [(f"convexhead-worker-{i % 3}_0", 1, True) for i in range(10)]
    inside = []
    thread = threading.Thread(target=lambda: inside.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert inside == [3]  # threads of others are left as they were


def test_an_error_in_a_lane_is_raised_once_all_are_at_rest():
    done, total = [], torch.zeros(1)

    def work(rows, data):
        if rows.start == 4:
            raise ArithmeticError("batch 4")
        done.append(rows.start)
        return (data["X"],)

    with pytest.raises(ArithmeticError, match="batch 4"):
        add_up(batches(1000), work, (total,), workers=3, context=nullcontext)
    assert len(done) < 50
    before = len(done)
    add_up(batches(4), work, (total,), workers=3, context=nullcontext)
    assert len(done) == before + 4


def test_no_batch_at_all_adds_nothing():
    total = torch.ones(2)
    add_up(iter(()), lambda rows, data: (total,), (total,), workers=3, context=nullcontext)
    assert total.tolist() == [1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_makes_threads_of_its_own():
    total = torch.zeros(1)
    add_up(batches(6), lambda rows, data: (data["X"],), (total,), workers=3, context=nullcontext)
    assert workers._threads.cache_info().currsize
    child = os.fork()
    if child == 0:
        mine = torch.zeros(1)
        add_up(batches(6), lambda rows, data: (data["X"],), (mine,), workers=3, context=nullcontext)
        os._exit(0 if float(mine) == 15 else 1)
    assert os.waitpid(child, 0)[1] == 0
