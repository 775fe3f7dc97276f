"""Fitted estimators of scikit-learn, and of libraries that have its attributes, as linear heads.

| estimator | its objective, divided by what makes the loss a mean | β |
|---|---|---|
| ``LogisticRegression``, ``...CV`` (and cuML's) | ``C Σ_i w_i ℓ + ½‖w‖²`` over ``C W`` | ``1/(C W)`` |
| ``SGDClassifier(loss="log_loss")`` | ``(1/n) Σ_i w_i ℓ + (α/2)‖w‖²`` times ``n/W`` | ``α n/W`` |
| ``RidgeClassifier``, ``...CV`` | ``Σ_i w_i ‖f − y‖² + α‖w‖²`` over ``2W`` | ``α/W`` |

with ``W = Σ_i w_i``, the weights of samples times those of their classes; ``W = n`` without.
What an estimator was trained for is read from its parameters. A parameter that makes it another program is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.exceptions import NotFittedError

from convexhead import inputs
from convexhead.errors import InputError
from convexhead.foreign.linear_head import ONE_VS_REST, SIGNS, SOFTMAX, LinearHead, numbers
from convexhead.padding import Padded


def is_estimator(weights: Any) -> bool:
    """Whether ``weights`` is an estimator, by what it has."""
    return hasattr(weights, "fit") and hasattr(weights, "get_params")


def own_features(weights: Any, X: Any) -> tuple[Any, Any]:
    """The last step of a pipeline, and ``X`` as that step sees it; anything else unchanged.

    Raises
    ------
    InputError
        ``X`` is not a table that the steps before can transform.
    """
    if hasattr(weights, "best_estimator_"):  # of a search over parameters
        return own_features(weights.best_estimator_, X)
    if not (is_estimator(weights) and isinstance(getattr(weights, "steps", None), list)):
        return weights, X
    if isinstance(X, Padded) or inputs.is_store(X) or not inputs.is_table(X):
        raise InputError("a pipeline reads a table (n, d): pass the features that it was fitted on, and their labels")
    with inputs.told_plainly():
        X = weights[:-1].transform(X) if len(weights.steps) > 1 else X
    return own_features(weights.steps[-1][1], X)


def read_estimator(weights: Any, X: Any) -> LinearHead:
    """The head of a fitted estimator.

    Raises
    ------
    InputError
        It is none of those that can be read, or it was trained for another program.
    NotFittedError
        It is not fitted.
    """
    kinds = [kind.__name__ for kind in type(weights).__mro__]
    read = next((READERS[kind] for kind in kinds if kind in READERS), None)
    name = f"this {type(weights).__name__}"
    if read is None:
        raise InputError(
            f"{name} cannot be audited: only {', '.join(READERS)} can, alone or at the end of a pipeline; of other "
            "linear heads pass the weights (None, coef) with head='linear', intercept= and beta="
        )
    if not hasattr(weights, "coef_"):
        raise NotFittedError(f"{name} is not fitted yet: call fit before certify")
    _check_columns(weights, X, name)
    return read(weights, name)


def _check_columns(weights: Any, X: Any, name: str) -> None:
    """Refuse a data frame with other columns than the head was fitted on, or in another order."""
    known = getattr(weights, "feature_names_in_", None)
    if known is not None and hasattr(X, "columns") and list(known) != list(X.columns):
        raise InputError(f"{name} was fitted on a table with other columns, or in another order: pass the same table")


def _logistic(weights: Any, name: str) -> LinearHead:
    if told := _other_penalty(weights):
        raise InputError(f"{name} has the penalty {told}: only the L2 penalty has a certificate here")
    classes = np.asarray(weights.classes_)
    solver, kind = getattr(weights, "solver", ""), getattr(weights, "multi_class", "auto")
    one_vs_rest = len(classes) > 2 and (solver == "liblinear" or kind == "ovr")
    if len(classes) == 2 and kind == "multinomial":
        raise InputError(f"{name} has multi_class='multinomial' for two classes, another program: fit it without")
    if solver == "liblinear" and weights.fit_intercept:
        raise InputError(
            f"{name} has solver='liblinear', which penalises the intercept (intercept_scaling): a program of its own; "
            "fit it with another solver or with fit_intercept=False"
        )
    return _head(weights, name, ONE_VS_REST if one_vs_rest else SOFTMAX, _beta_of_C(weights, name))


def _other_penalty(weights: Any) -> str | None:
    """What is not the L2 penalty, in words; None of what is. From scikit-learn 1.8 on ``l1_ratio`` alone says it."""
    penalty = getattr(weights, "penalty", "deprecated")
    if penalty != "deprecated":
        return None if penalty == "l2" else repr(penalty)
    ratio = getattr(weights, "l1_ratio_", getattr(weights, "l1_ratio", "unknown"))
    pure = all(share is None or share == 0 for share in np.ravel(np.asarray(ratio, object)))
    return None if pure else f"l1_ratio={ratio!r}"


def _beta_of_C(weights: Any, name: str) -> Callable[[int, float], float] | None:
    """``1/(C W)``; None where no single ``C`` was trained at."""
    if getattr(weights, "refit", True) is False:  # means over folds, of coefficients and of C
        return None
    chosen = np.unique(numbers(getattr(weights, "C_", weights.C if hasattr(weights, "C") else []), f"C of {name}"))
    if len(chosen) != 1:
        return None
    C = float(chosen[0])
    if not 0 < C < np.inf:
        raise InputError(f"{name} has C = {C:g}, which is no penalty: only the L2 penalty has a certificate here")
    return lambda n, W: 1 / (C * W)


def _sgd(weights: Any, name: str) -> LinearHead:
    if weights.loss not in ("log_loss", "log"):
        raise InputError(f"{name} has the loss {weights.loss!r}: of its losses only 'log_loss' has a certificate here")
    if weights.penalty != "l2":
        raise InputError(f"{name} has the penalty {weights.penalty!r}: only the L2 penalty has a certificate here")
    alpha = _positive(float(weights.alpha), name)
    loss = ONE_VS_REST if len(weights.classes_) > 2 else SOFTMAX
    return _head(weights, name, loss, lambda n, W: alpha * n / W)


def _ridge(weights: Any, name: str) -> LinearHead:
    if getattr(weights, "positive", False):
        raise InputError(f"{name} was fitted with positive=True, a constraint: another program")
    known = getattr(weights, "alpha_", weights.alpha if hasattr(weights, "alpha") else np.nan)
    alpha = _positive(float(known), name)
    return _head(weights, name, SIGNS, lambda n, W: alpha / W)


def _positive(alpha: float, name: str) -> float:
    if not 0 < alpha < np.inf:
        raise InputError(f"{name} has alpha = {alpha:g}: only a positive L2 penalty has a certificate here")
    return alpha


def _head(weights: Any, name: str, loss: str, beta: Callable[[int, float], float] | None) -> LinearHead:
    coef = np.atleast_2d(numbers(weights.coef_, f"coef_ of {name}"))
    intercept = np.atleast_1d(numbers(weights.intercept_, f"intercept_ of {name}")) if weights.fit_intercept else None
    classes = weights.classes_
    classes = numbers(classes, f"classes_ of {name}") if hasattr(classes, "get") else np.asarray(classes)
    if classes.ndim != 1 or len(coef) != (1 if len(classes) == 2 else len(classes)):
        raise InputError(
            f"{name} has {len(coef)} rows of coef_ and classes_ of shape {classes.shape}: audits are of one label a "
            "sample, with a row for each class, or one row for two"
        )
    class_weight = getattr(weights, "class_weight", None)
    if loss == ONE_VS_REST and class_weight is not None:
        raise InputError(
            f"{name} is one-vs-rest with class_weight, which weighs a class in its own program alone: audits of such "
            "heads have weights of samples only"
        )
    return LinearHead(name, coef, intercept, classes, loss, beta, class_weight)


READERS: dict[str, Callable[[Any, str], LinearHead]] = {
    "LogisticRegressionCV": _logistic,
    "LogisticRegression": _logistic,
    "SGDClassifier": _sgd,
    "RidgeClassifierCV": _ridge,
    "RidgeClassifier": _ridge,
}
"""How an estimator is read, by the name of its class or of one that it inherits from."""
