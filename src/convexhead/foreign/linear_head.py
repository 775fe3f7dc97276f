"""A linear head that somebody else trained, and the convex program that it was trained for.

``f = X coef + intercept`` with ``(1/n) Σ_i ℓ(f_i, y_i) + (β/2)‖coef‖²``, the intercept free of penalty. Of two classes
most tools keep one row ``w`` and train the logistic loss of ``f = ⟨w, x⟩ + b``. That is the softmax of the two outputs
``∓f/2``: they have the same loss, and ``‖(−w/2, w/2)‖² = ‖w‖²/2``, so twice the β gives the same objective. At the
optimum of softmax the two columns are opposite, hence the two programs have the same optimal value.
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

from convexhead import inputs
from convexhead.errors import InputError
from convexhead.reading import labels_of

CROSS_ENTROPY = "cross-entropy"
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
        Labels, or the targets of a squared loss; None: a store's own labels.
    told : str
        The program in words.
    """

    coef: Float[NDArray[np.float64], "d c"]
    intercept: Float[NDArray[np.float64], " c"] | None
    classes: NDArray[Any] | None
    loss: str
    beta: float
    y: Any
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
        None: cross-entropy, unless the user names another.
    beta : callable (int) -> float, or None
        ``β`` of its own objective, ``mean loss + (β/2)‖coef‖²``, for ``n`` samples; None: not known.
    signs : bool
        Whether the targets are ±1, one column a class (one for two classes), as of scikit-learn's ``RidgeClassifier``.
    """

    name: str
    coef: Float[NDArray[np.float64], "c d"]
    intercept: Float[NDArray[np.float64], " c"] | None
    classes: NDArray[Any] | None = None
    loss: str | None = None
    beta: Callable[[int], float] | None = None
    signs: bool = False

    def __post_init__(self) -> None:
        if self.coef.ndim != 2 or (self.intercept is not None and self.intercept.shape != self.coef.shape[:1]):
            bias = "" if self.intercept is None else f" and an intercept of shape {self.intercept.shape}"
            raise InputError(
                f"{self.name} has weights of shape {self.coef.shape}{bias}: needed are (c, d) and (c,), a row for "
                "each output as in scikit-learn and torch"
            )

    def program(self, X: Any, y: Any, *, beta: float | None, loss: Any) -> LinearProgram:
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
        if self.loss is not None and loss not in (None, self.loss):
            raise InputError(f"{self.name} was trained with the loss {self.loss!r}: leave loss out")
        loss = loss or self.loss or CROSS_ENTROPY
        y = named(X, y, self.classes)
        weight = self._weight(len(X)) if beta is None else float(beta)
        told = f"mean {loss} loss of {self.name} + (β/2)‖weights‖² at β = {weight:.6g}"
        if self.signs:
            return LinearProgram(
                self.coef.T, self.intercept, None, "squared", weight, _signs(X, y, self.classes, self.name),
                f"{told}, targets 1 and −1",
            )  # fmt: skip
        if loss == CROSS_ENTROPY and len(self.coef) == 1:
            halves = np.array([-0.5, 0.5])
            intercept = None if self.intercept is None else self.intercept * halves
            told += f", as the softmax of two classes with weights ∓w/2, whose β is twice as large, {2 * weight:.6g}"
            return LinearProgram(self.coef.T * halves, intercept, self.classes, loss, 2 * weight, y, told)
        return LinearProgram(self.coef.T, self.intercept, self.classes, loss, weight, y, told)

    def _weight(self, n: int) -> float:
        """``β`` of its own objective for ``n`` samples."""
        if self.beta is None:
            raise InputError(
                f"beta must be given, since it cannot be known from {self.name}: the one of "
                f"mean loss + (beta/2)*||weights||^2; {WEIGHT_DECAY}"
            )
        return float(self.beta(n))


def named(X: Any, y: Any, classes: NDArray[Any] | None) -> Any:
    """``y``; of a store without ``y`` the names of its classes, where the head knows its classes by name."""
    if y is None and classes is not None and classes.dtype.kind in "UOS" and inputs.is_store(X):
        return np.asarray(X.class_names)[X.labels]
    return y


def _signs(X: Any, y: Any, classes: NDArray[Any] | None, name: str) -> Float[NDArray[np.float64], "n c"]:
    """1 at the class of a sample and −1 elsewhere; of two classes the column of the second."""
    labels = labels_of(X, y)
    assert classes is not None
    if strangers := sorted(set(labels.tolist()) - set(classes.tolist()), key=str):
        raise InputError(f"labels {', '.join(map(repr, strangers[:5]))} are not among the classes of {name}")
    Y = np.where(labels[:, None] == classes, 1.0, -1.0)
    return Y[:, 1:] if len(classes) == 2 else Y


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
