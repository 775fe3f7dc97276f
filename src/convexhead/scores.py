"""Scores of predictions: weighted as the losses are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, r2_score
from torch import Tensor

from convexhead import inputs
from convexhead.errors import InputError
from convexhead.spec import Spec
from convexhead.targets import as_weights, every_token, is_multilabel, read_numbers, true_labels

Array = NDArray[Any]


def accuracy(y: Any, predicted: Array, spec: Spec, classes: Array, sample_weight: Any = None) -> float:
    """The share of samples that are right, or of the tokens that count; for several labels all must be right.

    Parameters
    ----------
    y, sample_weight
        As for `ConvexHeadClassifier.fit`; any labels.
    predicted : array (n,) or (n, s), of indicators (n, c) or (n, s, c)
        What `ConvexHeadClassifier.predict` makes.
    classes : array (c,)
        Names of the columns of probabilities.
    """
    y = true_labels(y, spec, classes, sample_weight)
    if y.shape != predicted.shape:
        raise InputError(f"y has the shape {y.shape}, predictions are {predicted.shape}")
    several, r = is_multilabel(spec), y.shape[1] if every_token(spec) else 1
    w = as_weights(sample_weight, len(y), r, y.shape[-1] if several else None, pooled=not every_token(spec))
    right = ((y == predicted) | ((w if every_token(spec) else w[:, 0]) == 0)).all(-1) if several else y
    w = np.broadcast_to(w.max(2), (len(y), r)).reshape(right.shape)
    if not several and every_token(spec):
        w = w * (y != spec.ignore_index)
    if not w.any():
        raise InputError("nothing to score: no label has a weight above 0")
    if several:
        return float(np.average(right, weights=w))
    with inputs.told_plainly():
        return float(accuracy_score(y.ravel(), predicted.ravel(), sample_weight=w.ravel()))


def r_squared(y: Any, f: Float[Array, "n r c"], spec: Spec, sample_weight: Any = None) -> float:
    """R² of outputs ``f``, averaged over columns (and tokens); parameters as of `accuracy`."""
    inputs.check_lengths(torch.from_numpy(f), len(inputs.plain(y, "y")))
    targets = read_numbers(y, f.shape[1], sample_weight, every_token=every_token(spec))
    outputs = torch.from_numpy(f if targets.kept is None else f[targets.kept])
    if targets.Y.shape != outputs.shape:
        raise InputError(f"y has {tuple(targets.Y.shape)} targets, outputs are {tuple(outputs.shape)}")
    return column_r_squared(targets.Y, outputs, targets.weights)


def column_r_squared(
    Y: Shaped[Tensor, "n r c"], f: Shaped[Tensor, "n r c"], weights: Shaped[Tensor, "n a b"] | None
) -> float:
    """The mean R² of the columns, each with its own weights."""
    truth, told = Y.flatten(1).numpy(force=True), f.flatten(1).numpy(force=True)
    if weights is None or weights.shape[1:] == (1, 1):
        of_samples = None if weights is None else weights.flatten().numpy(force=True)
        return float(r2_score(truth, told, sample_weight=of_samples))
    size = truth.shape[1] // weights.shape[1]
    w = weights.expand(len(Y), weights.shape[1], size).flatten(1).numpy(force=True)
    columns = [k for k in range(truth.shape[1]) if int((w[:, k] > 0).sum()) > 1]  # one number has no variance
    scores = [r2_score(truth[:, k], told[:, k], sample_weight=w[:, k]) for k in columns]
    return float(np.mean(scores)) if scores else float("nan")


def share_right(f: Float[Tensor, "n r c"], Y: Shaped[Tensor, "n r c"], several: bool) -> Float[Tensor, "n r"]:
    """Where outputs say what targets say: the same largest entry, or for ``several`` labels the same ones."""
    return ((f > 0) == (Y >= 0.5)).all(-1) if several else f.argmax(-1) == Y.argmax(-1)
