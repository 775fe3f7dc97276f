"""Regularisation paths: one problem solved over a falling grid of β, each from the solution before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.base import clone

from convexhead.clock import now
from convexhead.errors import InputError
from convexhead.estimators import ConvexHeadClassifier, ConvexHeadRegressor, problem_beta_max
from convexhead.problem import Atoms
from convexhead.solvers import Progress

DEFAULT_RATIOS = (0.5, 0.25, 0.12, 0.06, 0.03, 0.015)
Row = dict[str, Any]


def beta_max(X: Any, y: Any = None, *, loss: str | None = None, **parameters: Any) -> float:
    """The smallest β at which the optimum is the zero model.

    Parameters
    ----------
    X, y
        As for ``fit``. Labels, or float targets with ``loss="squared"`` or ``"huber"``.
    loss : str or None
        None: classification with cross-entropy.
    **parameters
        Of `ConvexHeadClassifier` or `ConvexHeadRegressor`: ``head``, ``activation``, ``pool``, …
    """
    problem, generator = _estimator(loss, parameters)._prepare(X, y)
    return problem_beta_max(problem, generator)


def regularization_path(
    X: Any,
    y: Any = None,
    *,
    beta_ratios: Sequence[float] = DEFAULT_RATIOS,
    X_val: Any = None,
    y_val: Any = None,
    loss: str | None = None,
    patience: int | None = None,
    callback: Callable[[Row], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    **parameters: Any,
) -> list[Row]:
    """Fit one head along falling β, each fit warm-started from the one before.

    Parameters
    ----------
    X, y
        As for ``fit``.
    beta_ratios : sequence of float
        ``β/β_max``; visited from the largest down.
    X_val, y_val
        Held-out data that every fit is scored on.
    loss : str or None
        None: classification with cross-entropy; else regression with that loss.
    patience : int or None
        Stop after this many fits in a row without a better validation score.
    callback : callable (row) or None
        Called after every fit.
    progress : callable (Progress) or None
        Called as the solver goes.
    **parameters
        Of the estimator: ``head``, ``activation``, ``pool``, ``tol``, …

    Returns
    -------
    list of dict
        One row for each β, as visited: ``beta_ratio``, ``beta``, ``objective``, ``dual``, ``gap``, ``relative_gap``,
        ``converged``, ``n_heads``, ``train_score``, ``val_score`` (None without held-out data), ``seconds`` and
        ``model``, the fitted estimator. `best` picks one.
    """
    ratios = sorted({float(ratio) for ratio in beta_ratios}, reverse=True)
    if not ratios or not all(0 < ratio < math.inf for ratio in ratios):
        raise InputError(f"beta_ratios must be positive numbers, got {list(beta_ratios)!r}")
    for reserved in ("beta", "beta_ratio"):
        if reserved in parameters:
            raise InputError(f"regularization_path sets {reserved} itself: pass beta_ratios instead")
    template = _estimator(loss, parameters)
    began = now()
    problem, generator = template._prepare(X, y)
    largest = problem_beta_max(problem, generator)
    rows: list[Row] = []
    start: Atoms | None = None
    for ratio in ratios:
        model = clone(template).set_params(beta_ratio=ratio)
        for name in ("classes_", "_target_shape", "feature_names_in_", "reduction_"):
            if hasattr(template, name):
                setattr(model, name, getattr(template, name))
        solution = model._solve(problem, generator, beta_max=largest, start=start, callback=progress)
        start = solution.atoms
        certificate = model.certificate_
        seconds = now() - began
        rows.append(
            {
                "beta_ratio": ratio,
                "beta": model.beta_,
                "objective": certificate.primal,
                "dual": certificate.dual,
                "gap": certificate.gap,
                "relative_gap": certificate.relative_gap,
                "converged": certificate.converged,
                "n_heads": model.n_heads_,
                "train_score": model._score_fitted(problem),
                "val_score": None if X_val is None else model.score(X_val, y_val),
                "seconds": seconds,
                "model": model,
            }
        )
        began = now()
        if callback is not None:
            callback(rows[-1])
        if patience is not None and X_val is not None:
            best_so_far = int(np.argmax([row["val_score"] for row in rows]))
            if len(rows) - 1 - best_so_far >= patience:
                break
    return rows


def best(rows: list[Row]) -> Row:
    """The row with the best validation score; among equals the one with the largest β."""
    if rows[0]["val_score"] is None:
        raise InputError("the path has no validation scores to choose by: pass X_val and y_val")
    return max(rows, key=lambda row: (row["val_score"], row["beta_ratio"]))


def _estimator(loss: str | None, parameters: dict[str, Any]) -> ConvexHeadClassifier | ConvexHeadRegressor:
    cls = ConvexHeadClassifier if loss is None else ConvexHeadRegressor
    unknown = set(parameters) - set(cls().get_params())
    if unknown:
        from convexhead.errors import choose

        choose("parameter", sorted(unknown)[0], cls().get_params())
    return cls(**parameters) if loss is None else ConvexHeadRegressor(loss=loss, **parameters)
