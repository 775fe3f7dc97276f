"""Whitened coordinates where curvature is no number."""

from __future__ import annotations

import math

import pytest
import torch

from convexhead.solvers.whitening import _root


@pytest.mark.parametrize("entry", [math.nan, math.inf])
def test_a_root_of_what_is_no_number_is_that_of_zero(entry):
    C = torch.eye(3, dtype=torch.float64)
    C[0, 1] = C[1, 0] = entry
    torch.testing.assert_close(_root(C, 4.0), 2 * torch.eye(3, dtype=torch.float64))
