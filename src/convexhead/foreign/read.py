"""Whatever linear head somebody trained: which kind of thing it is, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from convexhead.foreign.estimators import is_estimator, read_estimator
from convexhead.foreign.linear_head import LinearHead
from convexhead.foreign.weights import read_file, read_layer, read_state


def read_linear_head(weights: Any, X: Any) -> LinearHead | None:
    """The linear head in ``weights``; None where they are of no foreign kind.

    Parameters
    ----------
    weights : estimator, torch.nn.Module, mapping, path, or anything else
    X
        The features, of which a data frame's columns are compared with an estimator's.
    """
    if isinstance(weights, (str, Path)):
        return read_file(Path(weights))
    if isinstance(weights, torch.nn.Module):
        return read_layer(weights)
    if isinstance(weights, Mapping):
        return read_state(weights)
    return read_estimator(weights, X) if is_estimator(weights) else None
