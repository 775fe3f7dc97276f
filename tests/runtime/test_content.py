"""Hashes by content: equal for equal values, different for whatever a fit may tell apart."""

from __future__ import annotations

import copy
import functools
import pickle
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from convexhead.errors import InputError
from convexhead.program.losses import Huber
from convexhead.runtime.content import content_hash, described

BIG = np.arange(5000.0)


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


DIFFERENT = [
    (BIG, changed(BIG, 2500, 2500.000001)),  # what `repr` leaves out
    ([BIG.tolist()], [changed(BIG, 2500, 7.0).tolist()]),
    (BIG, BIG.astype(np.float32)),
    (BIG, BIG.reshape(2, -1)),
    (BIG, BIG[::-1]),
    (torch.ones(3), torch.ones(3, dtype=torch.bfloat16)),
    (np.zeros((0, 3)), np.zeros((3, 0))),
    (["ab", "c"], ["a", "bc"]),
    ([1, [2]], [[1], 2]),
    ({"a": 1}, {"a": "1"}),
    (np.array(["a", 1], dtype=object), np.array(["a", 2], dtype=object)),
    (0.1, np.nextafter(0.1, 1)),
    (None, "None"),
    (True, "True"),
    (Path("a"), Path("b")),
    (re.compile("a"), re.compile("b")),
    (functools.partial(max, 1), functools.partial(max, 2)),
    (Huber(1.0), Huber(1.0 + 1e-15)),
    (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)),
    (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
    (np.sum, np.max),
]
EQUAL = [
    (BIG, torch.from_numpy(BIG)),
    (BIG, np.repeat(BIG, 2)[::2]),
    ((1, 2), [1, 2]),
    (1, 1.0),
    (np.float64(0.1), 0.1),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({"x", "y", "z"}, {"z", "y", "x"}),
    (Huber(2.0), Huber(2.0)),
    (OrderedDict(a=1), copy.deepcopy(OrderedDict(a=1))),
    (np.random.default_rng(0), pickle.loads(pickle.dumps(np.random.default_rng(0)))),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=lambda value: "")
def test_different_values(one, other):
    assert content_hash(one) != content_hash(other)
    assert described(one) != described(other)
    assert content_hash(one) == content_hash(copy.deepcopy(one) if not callable(one) else one)


@pytest.mark.parametrize(("one", "other"), EQUAL, ids=lambda value: "")
def test_equal_values(one, other):
    assert content_hash(one) == content_hash(other)


def test_large_arrays_are_hashed_to_the_last_byte():
    big = np.zeros((3, 1_000_000))
    for index in [(0, 0), (1, 524_288), (2, 999_999)]:
        assert content_hash(big) != content_hash(changed(big, index, 1.0))


def test_short_settings_describe_themselves():
    assert described(0.05) == 0.05
    assert described((4, np.int64(4))) == [4, 4]
    assert described("fno") == "fno"
    assert described(np.random.RandomState(0)) is None


def test_what_has_no_content_is_refused():
    with pytest.raises(InputError, match=r"_thread.lock cannot be told from others by its content"):
        content_hash({"lock": threading.Lock()})


# A loss as users write it, in a module of its own; each change must be seen by the hash of an instance.
LOSS = """
import functools
import math
import torch
from convexhead.program.losses import Loss, Squared
from helpers import SLOPE, shrink
import helpers

LEVEL = 0.5
TABLE = torch.arange(2000.0)

def bent(t):
    '''A docstring.'''
    return t.abs() * LEVEL

class Base(Squared):
    power = 2.0

class Mine(Base):
    name = "mine"
    weight = 1.0
    table = [1.0, 2.0]

    def __init__(self, scale=1.0):
        self.scale = scale
        self.inner = {"of": [torch.zeros(3)]}
        self.function = lambda t: t + 1

    def value(self, f, y):
        # a comment
        return (lambda t: bent(t) * 3)(f - y).sum((-2, -1)) + TABLE[0] + math.pi + helpers.OTHER

    def residual(self, f, y, slope=1.5):
        return shrink(f - y) * slope

    @property
    def half(self):
        return 0.5

    @staticmethod
    def twice(t):
        return 2 * t
"""
HELPERS = """
SLOPE = 2.0
OTHER = 1.0
def shrink(t):
    return t * SLOPE
"""
SEEN = [
    ("LEVEL = 0.5", "LEVEL = 0.25"),
    ("arange(2000.0)", "arange(2000.0).roll(1)"),
    ("t.abs()", "t.square()"),
    ("power = 2.0", "power = 3.0"),
    ("weight = 1.0", "weight = 2.0"),
    ("[1.0, 2.0]", "[1.0, 3.0]"),
    ("scale=1.0", "scale=2.0"),
    ("torch.zeros(3)", "torch.ones(3)"),
    ("lambda t: t + 1", "lambda t: t - 1"),
    ("bent(t) * 3", "bent(t) * 4"),
    ("slope=1.5", "slope=1.25"),
    ("return 0.5", "return 0.75"),
    ("return 2 * t", "return 3 * t"),
    ("SLOPE = 2.0", "SLOPE = 3.0"),
    ("t * SLOPE", "t / SLOPE"),
    ("OTHER = 1.0", "OTHER = 2.0"),
    ("class Mine(Base)", "class Mine(Squared)"),
    ('name = "mine"', 'name = "yours"'),
]
UNSEEN = [("# a comment", "# another\\n\\n"), ("'''A docstring.'''", "'''Another.'''"), ("", "")]


def loss_hash(old, new):
    """Hash of the loss with one change, as a fresh module."""
    modules = {}
    for name, source in (("helpers", HELPERS), ("losses_of_a_user", LOSS)):
        module = modules[name] = type(sys)(name)
        sys.modules[name] = module
        exec(compile(source.replace(old, new) if old else source, f"{name}.py", "exec"), vars(module))
    return content_hash(modules["losses_of_a_user"].Mine())


@pytest.fixture
def _clean_modules():
    yield
    for name in ("helpers", "losses_of_a_user"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("_clean_modules")
@pytest.mark.parametrize(("old", "new"), [pair for pair in SEEN if pair[0] != "OTHER = 1.0"])
def test_every_change_of_a_loss_is_seen(old, new):
    assert (LOSS + HELPERS).count(old) == 1
    assert loss_hash(old, new) != loss_hash("", "")


@pytest.mark.usefixtures("_clean_modules")
@pytest.mark.parametrize(("old", "new"), UNSEEN)
def test_what_changes_nothing_is_not(old, new):
    assert loss_hash(old, new) == loss_hash("", "")


@pytest.mark.slow
def test_another_process_has_the_same_hash_and_sees_a_changed_module(tmp_path):
    (tmp_path / "losses_of_a_user.py").write_text(LOSS)
    modules = "from losses_of_a_user import Mine; from convexhead.runtime.content import content_hash"
    command = f"{modules}; print(content_hash(Mine()))"

    def run(helpers, seed):
        (tmp_path / "helpers.py").write_text(helpers)
        return subprocess.run(
            [sys.executable, "-B", "-c", command],
            cwd=tmp_path,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(["", *filter(None, sys.path)])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    first = run(HELPERS, "1")
    assert run(HELPERS, "2") == first
    assert run(HELPERS.replace("OTHER = 1.0", "OTHER = 3.25"), "1") != first


def test_a_replaced_attribute_of_a_library_class_is_seen(monkeypatch):
    before = content_hash(Huber())
    monkeypatch.setattr(Huber, "name", "other")
    assert content_hash(Huber()) != before


def test_cycles_end():
    one, other = [1], [1]
    one.append(one)
    other.append([1, other])
    assert content_hash(one) == content_hash(one)
    assert content_hash(one) != content_hash(other)
