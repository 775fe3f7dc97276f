"""Whatever head somebody trained: which kind of thing it is, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convexhead.foreign.attentive import TRIED, AttentiveProbe, has_queries, read_attentive_module
from convexhead.foreign.estimators import is_estimator, read_estimator
from convexhead.foreign.linear_head import LinearHead
from convexhead.foreign.weights import read_file, read_layer, read_state
from convexhead.padding import Padded
from convexhead.reading import tokens_of


def read_head(weights: Any, X: Any) -> LinearHead | AttentiveProbe | None:
    """The linear head or the attentive probe in ``weights``; None where they are of no foreign kind.

    Parameters
    ----------
    weights : estimator, torch.nn.Module, mapping, path, or anything else
    X
        The features, of which a data frame's columns are compared with an estimator's, or the tokens, on some of which
        a module is tried.
    """
    if isinstance(weights, (str, Path)):
        return read_file(Path(weights))
    if isinstance(weights, torch.nn.Module):
        return read_attentive_module(weights, _some(X)) if has_queries(weights.state_dict()) else read_layer(weights)
    if isinstance(weights, Mapping):
        return read_state(weights)
    return read_estimator(weights, X) if is_estimator(weights) else None


def _some(X: Any) -> Tensor:
    """Samples of one length."""
    if isinstance(X, Padded):
        return X.tokens[:1][:, X.mask[0]]
    return torch.as_tensor(tokens_of(X)[0][:TRIED])
