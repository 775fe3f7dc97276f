"""What users pass as labels, targets and weights, checked and brought into one form.

Targets are ``Y (n, r, c)``, a row for each output of a sample, with weights ``w`` of samples ``(n, 1, 1)``, rows
``(n, r, 1)`` or entries ``(n, r, c)``. The data term is the weighted mean over whatever has weights,

    F = (1/W) Σ w ℓ,   W = Σ w

so a weight of 2 is the same as twice, and a weight of 0 the same as not there. Labels of tokens count token by token.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils import assert_all_finite, compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d
from torch import Tensor

from convexhead import inputs
from convexhead.errors import InputError
from convexhead.program.losses import BinaryCrossEntropy, with_positive_weights
from convexhead.spec import Spec

Array = NDArray[Any]
ROW_SUM = 1e-5
"""How far the sum of a row of probabilities may be from 1, and a probability from [0, 1]; such rows are divided by it.
Chosen by hand: float32. Of half precision it is the spacing of its numbers at 1."""


@dataclass(eq=False)
class Targets:
    """Targets of samples, all of whose weights are positive somewhere.

    Attributes
    ----------
    Y : Tensor (n, r, c)
        Bytes for labels, else float64.
    weights : Tensor (n, r or 1, c or 1) or None
        ``ω = w n / W``, float64; None where all samples count alike.
    counts : Tensor (n, r or 1) or None
        What a row counts in a score; None where all count alike.
    kept : ndarray or None
        The samples that are left, by their numbers; None for all.
    classes : ndarray (c,) or None
        The label of each output; None of a regression.
    total : float
        ``W``, the sum of all weights as they were given.
    """

    Y: Tensor
    weights: Tensor | None
    counts: Tensor | None
    kept: NDArray[np.int64] | None
    classes: Array | None = None
    total: float = math.nan


def is_multilabel(spec: Spec) -> bool:
    """Whether a sample may have several classes, or none."""
    return spec.loss == BinaryCrossEntropy.name


def every_token(spec: Spec) -> bool:
    """Whether there is an output for every token."""
    return spec.pool is None


# -- classes ----------------------------------------------------------------------------------------------------------
def read_classes(
    y: Array,
    spec: Spec,
    n_tokens: int,
    weights: Any = None,
    classes: Array | None = None,
    mask: NDArray[np.bool_] | None = None,
) -> Targets:
    """Targets of a classifier.

    Parameters
    ----------
    y : array
        As `as_labels` returns it. Labels ``(n,)``; with ``pool=None`` ``(n, s)``, of which ``ignore_index`` does not
        count. Or probabilities of classes ``(n, c)``, with ``pool=None`` ``(n, s, c)``; for binary cross-entropy each
        in [0, 1].
    n_tokens : int
        ``s``.
    weights : array, number or None
        ``w (n,)``; with ``pool=None`` also ``(n, s)``, and for binary cross-entropy also of entries.
    classes : ndarray (c,) or None
        Those of a head, which the labels are matched with; None: the sorted labels.
    mask : array (n, s) or None
        Which tokens there are; None: all.

    Raises
    ------
    InputError
        Labels or weights that cannot be used, or that do not fit together.
    """
    shape = y.shape
    labelled = y.ndim == (2 if every_token(spec) else 1) and not is_multilabel(spec)
    r = n_tokens if every_token(spec) else 1
    if not labelled and y.ndim != (3 if every_token(spec) else 2):
        raise InputError(f"y must be {_forms(spec, n_tokens)}, got {shape}")
    if every_token(spec) and shape[1] != n_tokens:
        raise InputError(f"there are {n_tokens} tokens a sample, but y has {shape}: {_forms(spec, n_tokens)}")
    rows = y if every_token(spec) else y[:, None]
    entries = rows.shape[2] if is_multilabel(spec) else None
    w = as_weights(weights, len(y), r, entries, pooled=not every_token(spec))
    w = w if mask is None or not every_token(spec) else w * mask[..., None]
    if labelled:
        present = np.ones(rows.shape, bool) if not every_token(spec) else rows != spec.ignore_index
        w = w if present.all() and not every_token(spec) else w * present[..., None]
        named, Y = _one_hot(rows, present & (w.max(2) > 0), classes)
        w = _times_class_weights(w, rows, present, spec, named)
    else:
        if spec.class_weight is not None:
            raise InputError("class_weight goes with labels: weigh rows of probabilities with sample_weight" + (
                ", the ones of an indicator matrix with pos_weight" if is_multilabel(spec) else ""))  # fmt: skip
        w = np.broadcast_to(w, (len(y), r, 1)) if every_token(spec) and w.shape[2] == 1 else w
        Y = _probabilities(rows, spec, w)
        named = np.arange(Y.shape[2]) if classes is None else classes
        if len(named) != Y.shape[2]:
            raise InputError(f"y has {Y.shape[2]} columns, but the weights have {len(named)} outputs")
        if Y.shape[2] < 2 and not is_multilabel(spec):
            raise InputError("y has a single class: a classifier needs at least two classes")
    return _finished(_smoothed(Y, spec.label_smoothing), w, named, spec.pos_weight)


def true_labels(y: Any, spec: Spec, classes: Array, weights: Any = None) -> Array:
    """What predictions are compared with: labels, or of rows of probabilities the likeliest class; indicators."""
    y = as_labels(y, spec, weights, to_fit=False)
    if is_multilabel(spec):
        return y >= 0.5
    return classes[y.argmax(-1)] if y.ndim == (3 if every_token(spec) else 2) else y


def _forms(spec: Spec, s: int) -> str:
    """The shapes that ``y`` may have, in words."""
    if is_multilabel(spec):
        if every_token(spec):
            return f"indicators (n, {s}, c)"
        return "an indicator matrix (n, c) of ones and zeros, c ≥ 2 (of one column use loss='cross-entropy')"
    if every_token(spec):
        return f"labels (n, {s}) or probabilities (n, {s}, c) with pool=None"
    return "labels (n,) or probabilities (n, c)"


def as_labels(y: Any, spec: Spec | None = None, weights: Any = None, *, to_fit: bool = True) -> Array:
    """``y`` as an array whose missing values and mixed types have been refused, but where ``weights`` are 0.

    A column ``(n, 1)`` is labels of samples, as scikit-learn has it, unless ``spec`` asks for those of tokens.

    Warns
    -----
    UserWarning
        Labels ``to_fit`` that are so many different ones that they may be numbers to predict.
    """
    with inputs.told_plainly():
        y = _array_of(inputs.plain(y, "y"))
        y = _without_gaps(y, weights)
        if y.ndim == 2 and y.shape[1] == 1 and not (spec and every_token(spec)):
            y = column_or_1d(y, warn=True)
        if y.dtype == object and len({type(label) for label in y.ravel().tolist()}) > 1:
            raise InputError("y mixes labels of several types, or lacks some: give every sample a string, or a number")
        assert_all_finite(y, input_name="y")
        if y.ndim == 1 and not _plainly_labels(y):
            with warnings.catch_warnings():
                if not to_fit:
                    warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
                check_classification_targets(y)
    return y


def _array_of(y: Any) -> Array:
    """An array; of Python's own numbers in a column of objects one of numbers.

    Raises
    ------
    InputError
        Samples with lists of labels.
    """
    rows = (
        [each for each in y if isinstance(each, (list, tuple, set, frozenset))] if isinstance(y, (list, tuple)) else []
    )
    if any(isinstance(row, (set, frozenset)) for row in rows) or len({len(row) for row in rows}) > 1:
        raise InputError(
            "y holds lists of labels: pass ones and zeros (n, c), as sklearn.preprocessing.MultiLabelBinarizer makes "
            "them, with loss='binary-cross-entropy'"
        )
    y = np.asarray(y)
    plain = y.dtype == object and all(isinstance(label, (bool, int, float, np.generic)) for label in y.ravel().tolist())
    return np.array(y.tolist()) if plain and len({type(label) for label in y.ravel().tolist()}) == 1 else y


def _without_gaps(y: Array, weights: Any) -> Array:
    """``y`` with a label that counts in place of missing ones whose weight is 0."""
    if weights is None or np.isscalar(weights):
        return y
    w = np.asarray(inputs.plain(weights, "sample_weight"))
    if w.dtype.kind not in "biuf" or w.shape != y.shape[: w.ndim] or (w > 0).all() or not (w > 0).any():
        return y
    if y.dtype != object and (y.dtype.kind != "f" or np.isfinite(y).all()):
        return y
    y = y.copy()
    y[w == 0] = y[w > 0][0]
    return _array_of(y)


def _plainly_labels(y: Array) -> bool:
    """Whether scikit-learn's check, which takes as long as a step of a small fit, would pass ``y`` in silence."""
    return y.dtype.kind in "biuU" and 2 * len(np.unique(y)) <= len(y)


def _one_hot(rows: Array, counted: NDArray[np.bool_], classes: Array | None) -> tuple[Array, Tensor]:
    """The classes of labels ``(n, r)``, and bytes ``(n, r, c)``; what does not count is of the first class.

    Raises
    ------
    InputError
        Labels that are no whole numbers or names, are none of the ``classes``, or a single class.
    """
    if rows.dtype.kind == "f" and not np.array_equal(rows[counted], np.floor(rows[counted])):
        raise InputError("labels must be whole numbers or names; for float targets use ConvexHeadRegressor")
    present = np.unique(rows[counted])
    if not len(present):
        raise InputError("no label counts: each is to be ignored, or has the weight 0")
    if classes is None:
        if len(present) < 2:
            raise InputError(
                f"only one class is present ({present.tolist()[0]!r}): a classifier needs at least two classes"
            )
        classes = present
    place = {label: i for i, label in enumerate(classes.tolist())}
    if foreign := [label for label in present.tolist() if label not in place]:
        raise InputError(
            f"labels {', '.join(map(repr, foreign[:5]))} are not among the classes of this head "
            f"({', '.join(map(repr, classes.tolist()[:5]))}{', …' if len(classes) > 5 else ''})"
        )
    indices = np.zeros(rows.shape, np.int64)
    indices[counted] = np.array([place[label] for label in present.tolist()], np.int64)[
        np.searchsorted(present, rows[counted])
    ]
    return classes, torch.as_tensor(indices).unsqueeze(2) == torch.arange(len(classes))


def _times_class_weights(w: Array, rows: Array, present: NDArray[np.bool_], spec: Spec, classes: Array) -> Array:
    """Weights times those of the labels' classes, as scikit-learn has them."""
    if spec.class_weight is None:
        return w
    w = np.broadcast_to(w, (*rows.shape, 1)).copy()
    counted = present & (w[..., 0] > 0)
    known, given = set(classes.tolist()), spec.class_weight
    if isinstance(given, dict) and (unknown := [label for label in given if label not in known]):
        raise InputError(f"class_weight names {unknown[0]!r}, which is not a label: {classes.tolist()[:5]}")
    with inputs.told_plainly():
        each = compute_class_weight(
            given,
            classes=classes,
            y=rows[counted],
            **({"sample_weight": w[..., 0][counted]} if given == "balanced" else {}),
        )
    w[counted, 0] *= each[np.searchsorted(classes, rows[counted])]
    return w


def _probabilities(rows: Array, spec: Spec, w: Array) -> Tensor:
    """Rows of probabilities as float64, those of weight 0 alike; checked."""
    with inputs.told_plainly():
        Y = np.where(w > 0, rows.astype(np.float64), 0.0)
    slack = max(ROW_SUM, float(np.finfo(rows.dtype).eps) if rows.dtype.kind == "f" else 0.0)
    if (Y.clip(-slack, 1 + slack) != Y).any():
        hint = "labels of several columns are no targets here" if spec.loss == "cross-entropy" else "0, 1 or between"
        raise InputError(f"y has values outside [0, 1]: {hint}")
    total = Y.sum(2, keepdims=True)
    Y = Y.clip(0, 1)
    if not is_multilabel(spec):
        whole = np.broadcast_to(w, (*Y.shape[:2], 1)) > 0
        if (np.abs(total - 1) > slack)[whole].any():
            raise InputError(
                "rows of y do not sum to 1, so they are no probabilities of classes: where a sample has several "
                "labels, or none, use loss='binary-cross-entropy'"
            )
        total, first = Y.sum(2, keepdims=True), np.eye(1, Y.shape[2])
        Y = np.where(whole, np.where(total == 1, Y, Y / np.where(whole, total, 1)), first)
    return torch.from_numpy(Y)


def _smoothed(Y: Tensor, amount: float) -> Tensor:
    """``(1 − a) y + a/c``."""
    return Y if amount == 0 else (1 - amount) * Y.double() + amount / Y.shape[2]


# -- measurements -----------------------------------------------------------------------------------------------------
def read_numbers(
    y: Any, n_tokens: int, weights: Any = None, *, every_token: bool, mask: NDArray[np.bool_] | None = None
) -> Targets:
    """Targets of a regression: see `inputs.as_targets`. Where the weight is 0 anything may stand, NaN too.

    Parameters
    ----------
    weights : array, number or None
        ``w (n,)``, or of every number in ``y``; with ``every_token`` also ``(n, s)``.
    mask : array (n, s) or None
        Which tokens there are; None: all.
    """
    y = inputs.plain(y, "y")
    mask = mask if every_token else None
    if weights is None and mask is None:
        return Targets(inputs.as_targets(y, n_tokens=n_tokens, every_token=every_token), None, None, None)
    with inputs.told_plainly():
        values = np.array(y)
    entries = values if values.ndim == 3 else values.reshape(len(values), *((-1, 1) if every_token else (1, -1)))
    w = as_weights(weights, len(values), n_tokens if every_token else 1, entries.shape[-1], pooled=not every_token)
    w = w if mask is None else w * mask[..., None]
    if values.dtype.kind == "f" and entries.shape[:2] == (len(values), n_tokens if every_token else 1):
        values = np.where(w > 0, entries, 0.0).reshape(values.shape)
    return _finished(inputs.as_targets(values, n_tokens=n_tokens, every_token=every_token), w, None)


# -- weights ----------------------------------------------------------------------------------------------------------
def as_weights(weights: Any, n: int, r: int, c: int | None, *, pooled: bool) -> Array:
    """``w (n, r or 1, c or 1)``, float64; ``c``: None where entries have no weights of their own."""
    if weights is None:
        return np.ones((n, 1, 1))
    if np.isscalar(weights):
        weights = np.full(n, weights)
    with inputs.told_plainly():
        try:
            w = np.asarray(inputs.plain(weights, "sample_weight"), dtype=np.float64)
        except (ValueError, TypeError) as error:
            raise InputError(f"sample_weight must be an array of numbers: {error}") from error
    shapes: dict[tuple[int, ...], tuple[int, int, int]] = {(n,): (n, 1, 1)}
    if not pooled:
        shapes[n, r] = (n, r, 1)
    if c is not None:
        shapes[(n, c) if pooled else (n, r, c)] = (n, r, c)
    if w.shape not in shapes:
        raise InputError(f"sample_weight must be {' or '.join(map(str, shapes))}, got {w.shape}")
    if not np.isfinite(w).all() or (w < 0).any():
        raise InputError("sample_weight must be finite numbers of at least 0")
    if not w.any():
        raise InputError("all sample weights are zero: give at least one sample a weight above 0")
    return w.reshape(shapes[w.shape])


def _finished(Y: Tensor, w: Array, classes: Array | None, pos_weight: Any = None) -> Targets:
    """Samples without weight left out, the others' weights over their mean."""
    if pos_weight is None and w.shape[1:] == (1, 1) and (w == 1).all():
        return Targets(Y, None, None, None, classes, float(len(w)))
    if not (w > 0).any():
        raise InputError("no label that counts has a weight above 0")
    with np.errstate(over="ignore"):
        total = float(w.sum())
    size = math.frexp(w.max())[1]
    w = np.ldexp(w, -size)  # as users scale them, sums could leave float64
    left = (w > 0).reshape(len(w), -1).any(1)
    kept = None if left.all() else np.flatnonzero(left)
    if kept is not None:
        Y, w = Y[torch.from_numpy(kept)], w[kept]
    omega = torch.from_numpy(np.ascontiguousarray(w * (len(w) / w.sum())))
    plain = omega.shape[1:] == (1, 1) and bool((omega == omega[0]).all())
    counts = None if plain else omega.amax(2)
    weights = None if plain else omega
    if pos_weight is not None:
        if np.shape(pos_weight) not in ((), (Y.shape[2],)):
            raise InputError(f"pos_weight must be one number, or one for each of the {Y.shape[2]} classes")
        positive = torch.as_tensor(pos_weight, dtype=torch.float64).expand(Y.shape[2])
        Y, more = with_positive_weights(Y.double(), positive)
        weights = more if weights is None else weights * more
    return Targets(Y, weights, counts, kept, classes, total)
