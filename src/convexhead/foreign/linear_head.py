"""A linear head that somebody else trained, and the convex program that it was trained for.

``f = X coef + intercept`` with ``(1/W) Σ_i w_i ℓ(f_i, y_i) + (β/2)‖coef‖²``, ``W = Σ_i w_i``, the intercept free of
penalty. Of two classes most tools keep one row ``w`` and train the logistic loss of ``f = ⟨w, x⟩ + b``. That is the
softmax of the two outputs ``∓f/2``: they have the same loss, and ``‖(−w/2, w/2)‖² = ‖w‖²/2``, so twice the β gives the
same objective. At the optimum of softmax the two columns are opposite, hence the two programs have the same optimal
value. One-vs-rest heads are one program too: their objectives add up to that of binary cross-entropy on indicators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import sparse
from sklearn.utils import compute_sample_weight

from convexhead import inputs
from convexhead.errors import InputError
from convexhead.program.losses import BinaryCrossEntropy, CrossEntropy, Squared
from convexhead.reading import supervision
from convexhead.spec import Spec
from convexhead.targets import as_labels, as_weights

SOFTMAX, ONE_VS_REST, SIGNS = CrossEntropy.name, BinaryCrossEntropy.name, Squared.name
"""Losses; the last is of targets 1 and −1."""
WEIGHT_DECAY = (
    "of SGD or Adam with L2 regularisation it is weight_decay; of AdamW there is none, since its decay is decoupled "
    "and minimises no objective"
)
"""What ``β`` is of weights that torch trained."""


@dataclass(frozen=True, eq=False)
class LinearProgram:
    """Weights of the linear head in the form that an audit reads, and what they are audited as.

    Attributes
    ----------
    coef : ndarray (d, c)
    intercept : ndarray (c,) or None
    classes : ndarray (c,) or None
        The label of each output; None: the sorted labels.
    loss : str
    beta : float
        Of this program.
    y : array or None
        Labels, indicators, or the targets of a squared loss; None: a store's own labels.
    sample_weight : array, number or None
        Those of the user times those of the classes.
    told : str
        The program in words.
    """

    coef: Float[NDArray[np.float64], "d c"]
    intercept: Float[NDArray[np.float64], " c"] | None
    classes: NDArray[Any] | None
    loss: str
    beta: float
    y: Any
    sample_weight: Any
    told: str


@dataclass(frozen=True, eq=False)
class LinearHead:
    """A linear head as its own tool keeps it.

    Attributes
    ----------
    name : str
        What it is, for messages.
    coef : ndarray (c, d)
        A row for each output; of two classes there may be one row, of the second class.
    intercept : ndarray (c,) or None
        None where none was trained.
    classes : ndarray or None
        The labels, in the order of the outputs; None: not known.
    loss : str or None
        `SOFTMAX`, `ONE_VS_REST`, or `SIGNS` (targets ±1, one column a class and one for two classes, as of
        scikit-learn's ``RidgeClassifier``); None: softmax, unless the user names another.
    beta : callable (int, float) -> float, or None
        ``β`` of its own objective, ``weighted mean loss + (β/2)‖coef‖²``, for ``n`` samples whose weights have the sum
        ``W``; None: not known.
    class_weight : dict, "balanced" or None
        As scikit-learn has it.
    """

    name: str
    coef: Float[NDArray[np.float64], "c d"]
    intercept: Float[NDArray[np.float64], " c"] | None
    classes: NDArray[Any] | None = None
    loss: str | None = None
    beta: Callable[[int, float], float] | None = None
    class_weight: Any = None

    def __post_init__(self) -> None:
        if self.coef.ndim != 2 or (self.intercept is not None and self.intercept.shape != self.coef.shape[:1]):
            bias = "" if self.intercept is None else f" and an intercept of shape {self.intercept.shape}"
            raise InputError(
                f"{self.name} has weights of shape {self.coef.shape}{bias}: needed are (c, d) and (c,), a row for "
                "each output as in scikit-learn and torch"
            )

    def program(self, X: Any, y: Any, sample_weight: Any, *, beta: float | None, loss: Any) -> LinearProgram:
        """The program to certify on the data ``X, y``.

        Parameters
        ----------
        beta : float or None
            ``β`` of the head's own objective; None: the one that the head knows.
        loss : str, Loss or None
            That a user names.

        Raises
        ------
        InputError
            β is not known, the loss is another, or the labels are not those of the outputs.
        """
        if self.loss is not None and loss is not None:
            raise InputError(f"{self.name} was trained with the loss {self.loss!r}: leave loss out")
        loss = loss or self.loss or SOFTMAX
        y = named(X, y, self.classes)
        sample_weight = self._weights(X, y, sample_weight)
        weight = self._beta(len(X), sample_weight) if beta is None else float(beta)
        coef, intercept, classes = self.coef.T, self.intercept, self.classes
        told = f"mean {loss} loss of {self.name} + (β/2)‖weights‖² at β = {weight:.6g}"
        if self.loss in (SIGNS, ONE_VS_REST):
            y, classes = self._indicators(X, y), None
            told += ", one class against the rest"
        if self.loss == SIGNS:
            y = 2 * y - 1
            told += ", targets 1 and −1"
        if loss == SOFTMAX and len(self.coef) == 1:
            halves = np.array([-0.5, 0.5])
            coef, intercept, weight = coef * halves, None if intercept is None else intercept * halves, 2 * weight
            told += f", as the softmax of two classes with weights ∓w/2, whose β is twice as large, {weight:.6g}"
        return LinearProgram(coef, intercept, classes, loss, weight, y, sample_weight, told)

    def _beta(self, n: int, sample_weight: Any) -> float:
        """``β`` of its own objective."""
        if self.beta is None:
            raise InputError(
                f"beta must be given, since it cannot be known from {self.name}: the one of "
                f"mean loss + (beta/2)*||weights||^2; {WEIGHT_DECAY}"
            )
        return float(self.beta(n, float(_vector(sample_weight, n).sum())))

    def _weights(self, X: Any, y: Any, sample_weight: Any) -> Any:
        """The user's weights times those of the classes."""
        if self.class_weight is None:
            return sample_weight
        if isinstance(self.class_weight, str) and sample_weight is not None:
            raise InputError(
                f"{self.name} has class_weight='balanced', which with a sample_weight is not the same in all versions "
                "of scikit-learn: fit it with the class weights as a dict"
            )
        with inputs.told_plainly():
            each = compute_sample_weight(self.class_weight, self._labels(X, y))
        return each * _vector(sample_weight, len(X))

    def _labels(self, X: Any, y: Any) -> NDArray[Any]:
        labels = as_labels(supervision(X, y, None, Spec())[0])
        if labels.ndim != 1:
            raise InputError(f"{self.name} has one label a sample, but y has the shape {labels.shape}")
        if len(labels) != len(X):
            raise InputError(f"X and y are not of the same samples: {len(X)} rows of features, {len(labels)} labels")
        return labels

    def _indicators(self, X: Any, y: Any) -> Float[NDArray[np.float64], "n c"]:
        """1 at the class of a sample and 0 elsewhere; of two classes the column of the second."""
        labels, classes = self._labels(X, y), np.asarray(self.classes)
        if strangers := sorted(set(labels.tolist()) - set(classes.tolist()), key=str):
            raise InputError(f"labels {', '.join(map(repr, strangers[:5]))} are not among the classes of {self.name}")
        Y = (labels[:, None] == classes).astype(np.float64)
        return Y[:, 1:] if len(classes) == 2 else Y


def _vector(sample_weight: Any, n: int) -> Float[NDArray[np.float64], " n"]:
    weights: NDArray[np.float64] = as_weights(sample_weight, n, 1, None, pooled=True)[:, 0, 0]
    return weights


def named(X: Any, y: Any, classes: NDArray[Any] | None) -> Any:
    """``y``; of a store without ``y`` the names of its classes, where the head knows its classes by name."""
    if y is None and classes is not None and classes.dtype.kind in "UOS" and inputs.is_store(X):
        return np.asarray(X.class_names)[X.labels]
    return y


def numbers(values: Any, what: str) -> NDArray[np.float64]:
    """Weights as float64 in numpy: from torch, from a GPU library (``.get()``), from sparse or plain arrays."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    elif sparse.issparse(values):
        values = values.toarray()
    elif hasattr(values, "get") and hasattr(values, "dtype"):  # cupy refuses to become numpy in silence
        values = values.get()
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} cannot be read as an array of numbers: {error}") from error
    if array.dtype.kind not in "buif":
        raise InputError(f"{what} must be real numbers, got an array of {array.dtype}")
    return array.astype(np.float64)
