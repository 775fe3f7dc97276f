"""A trained head runs where its owner's model runs: every head, activation and pool through every way out of Python."""

from __future__ import annotations

import pytest

from ways_out import CASES, WAYS, difference, some_of_each_head

EVERY_HEAD = list(some_of_each_head())
IN_CI = {"torch.export": EVERY_HEAD, "torch.compile": EVERY_HEAD[:2], "ONNX": EVERY_HEAD[:3]}
"""What CI runs of the slow ways; of the others everything."""
SLOW = ("torch.compile", "ONNX")
NEEDS = {"ONNX": ("onnxscript", "onnxruntime")}
"""Packages of an extra."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "case"),
    [
        pytest.param(
            way,
            case,
            id="-".join(map(str, (way, *case))),
            marks=[pytest.mark.slow] * (way in SLOW) + [pytest.mark.table] * (case not in IN_CI.get(way, CASES)),
        )
        for way in WAYS
        for case in CASES
    ],
)
def test_outputs_are_the_heads(way, case):
    for package in NEEDS.get(way, ()):
        pytest.importorskip(package)
    assert difference(case, WAYS[way]) <= WAYS[way].allowed
