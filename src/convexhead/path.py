"""Regularisation paths: one problem solved over a falling grid of β, each from the solution before."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from convexhead import inputs
from convexhead.errors import InputError
from convexhead.estimators import ConvexHeadClassifier, ConvexHeadRegressor, problem_beta_max
from convexhead.program.atoms import Atoms
from convexhead.runtime.clock import now
from convexhead.runtime.content import content_hash
from convexhead.runtime.surroundings import undisturbed
from convexhead.solvers import Progress

DEFAULT_RATIOS = (0.5, 0.25, 0.12, 0.06, 0.03, 0.015)
Row = dict[str, Any]


@undisturbed()
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
    template = _estimator(loss, parameters)
    with template._ranks().all_or_none():
        return problem_beta_max(*template._prepare(X, y, to_solve=True, run="beta_max"))


@undisturbed()
def regularization_path(
    X: Any,
    y: Any = None,
    *,
    beta_ratios: Sequence[float] = DEFAULT_RATIOS,
    X_val: Any = None,
    y_val: Any = None,
    loss: str | None = None,
    patience: int | None = None,
    search_tol: float | None = None,
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
    search_tol : float or None
        Not None: only the fit with the best validation score goes on to ``tol`` and its certificate. The others end
        at this relative gap by the solver's own estimate, and their rows have no model and nothing that is proven:
        ``dual``, ``gap`` and ``relative_gap`` are None.
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

    Warns
    -----
    ConvergenceWarning
        Ctrl-C ended the path. The rows are those of the fits that were finished, or the first one with its honest
        gap; with ``search_tol``, where no fit has a certificate yet, KeyboardInterrupt is raised.
    """
    ratios = sorted({float(ratio) for ratio in beta_ratios}, reverse=True)
    if not ratios or not all(0 < ratio < math.inf for ratio in ratios):
        raise InputError(f"beta_ratios must be positive numbers, got {list(beta_ratios)!r}")
    for reserved in ("beta", "beta_ratio"):
        if reserved in parameters:
            raise InputError(f"regularization_path sets {reserved} itself: pass beta_ratios instead")
    if search_tol is not None and X_val is None:
        raise InputError("search_tol solves only the best β to the end: pass X_val and y_val to choose it by")
    template = _estimator(loss, parameters)
    with template._ranks().all_or_none():
        return _follow(template, X, y, ratios, X_val, y_val, patience, search_tol, callback, progress)


def _follow(
    template: ConvexHeadClassifier | ConvexHeadRegressor,
    X: Any,
    y: Any,
    ratios: list[float],
    X_val: Any,
    y_val: Any,
    patience: int | None,
    search_tol: float | None,
    callback: Callable[[Row], None] | None,
    progress: Callable[[Progress], None] | None,
) -> list[Row]:
    """`regularization_path`, its arguments checked."""
    began = now()
    problem, generator = template._prepare(
        X,
        y,
        to_solve=True,
        run="path",
        beta_ratios=ratios,
        patience=patience,
        search_tol=search_tol,
        validation=X_val is not None,
    )
    if X_val is not None:
        problem.ranks.agree(
            lambda: inputs.open_tokens(X_val),
            lambda tokens: {
                "held-out data (tokens)": inputs.tokens_hash(tokens),
                "held-out data (targets)": f"sha256:{content_hash(None if y_val is None else np.asarray(y_val))}",
            },
        )
    largest = problem_beta_max(problem, generator)

    rows: list[Row] = []
    interrupted = False

    def fit(ratio: float, start: Atoms | None, search: float | None) -> Row:
        nonlocal began, interrupted
        model = clone(template).set_params(beta_ratio=ratio)
        for name in ("classes_", "_target_shape", "feature_names_in_", "reduction_", "origin_"):
            if hasattr(template, name):
                setattr(model, name, getattr(template, name))
        if search is None:
            solution = model._solve(problem, generator, beta_max=largest, start=start, callback=progress)
            interrupted = solution.interrupted
            if interrupted and rows and not solution.certificate.converged:
                raise KeyboardInterrupt  # beside fits that are finished, it says nothing
            proof = model.certificate_.to_dict()
        else:
            model._approach(problem, generator, search, beta_max=largest, start=start, callback=progress)
            proof = {
                "primal": model.history_[-1]["objective"],
                "dual": None,
                "gap": None,
                "relative_gap": None,
                "converged": False,
            }
        row = {
            "beta_ratio": ratio,
            "beta": model.beta_,
            "objective": proof["primal"],
            **{key: proof[key] for key in ("dual", "gap", "relative_gap", "converged")},
            "n_heads": model.n_heads_,
            "train_score": model._score_fitted(problem),
            # One process scores for all, so that they choose alike.
            "val_score": None if X_val is None else problem.ranks.first_does(lambda: model.score(X_val, y_val)),
            "seconds": now() - began,
            "model": model,
        }
        began = now()
        return row

    start: Atoms | None = None
    for ratio in ratios:
        try:
            row = fit(ratio, start, search_tol)
        except KeyboardInterrupt:
            if not rows or search_tol is not None:
                raise
            interrupted = True
            break
        rows.append(row)
        start = row["model"]._atoms()
        if callback is not None:
            callback(row)
        if interrupted:
            break
        if patience is not None and X_val is not None:
            best_so_far = int(np.argmax([row["val_score"] for row in rows]))
            if len(rows) - 1 - best_so_far >= patience:
                break
    if interrupted and len(rows) < len(ratios):
        told = f"interrupted: {len(rows)} of {len(ratios)} β were visited"
        warnings.warn(told, ConvergenceWarning, stacklevel=2)
    if search_tol is not None:
        chosen = rows.index(best(rows))
        row = fit(rows[chosen]["beta_ratio"], rows[chosen]["model"]._atoms(), None)
        if interrupted:
            raise KeyboardInterrupt
        row["seconds"] += rows[chosen]["seconds"]
        searched = rows[chosen]["model"].history_
        after = [{**m, "seconds": m["seconds"] + searched[-1]["seconds"]} for m in row["model"].history_]
        row["model"].history_ = searched + after
        rows = [{**other, "model": None} for other in rows]
        rows[chosen] = row
        if callback is not None:
            callback(row)
    return rows


def best(rows: list[Row]) -> Row:
    """The row with the best validation score among those with a model; among equals the one with the largest β."""
    if rows[0]["val_score"] is None:
        raise InputError("the path has no validation scores to choose by: pass X_val and y_val")
    solved = [row for row in rows if row["model"] is not None]
    return max(solved, key=lambda row: (row["val_score"], row["beta_ratio"]))


EDGES = {
    "low": "is the smallest of the grid, and a smaller one may be better",
    "high": "is the largest of the grid, and a larger one may be better",
}
"""What it means that β lies at an edge of its grid."""


def grid_edge(beta_ratios: Sequence[float], chosen: float) -> Literal["low", "high"] | None:
    """The edge of the grid that ``chosen`` lies at; None inside, and where the grid is a single value."""
    if min(beta_ratios) == max(beta_ratios):
        return None
    return "low" if chosen <= min(beta_ratios) else "high" if chosen >= max(beta_ratios) else None


def _estimator(loss: str | None, parameters: dict[str, Any]) -> ConvexHeadClassifier | ConvexHeadRegressor:
    cls = ConvexHeadClassifier if loss is None else ConvexHeadRegressor
    unknown = set(parameters) - set(cls().get_params())
    if unknown:
        from convexhead.errors import choose

        choose("parameter", sorted(unknown)[0], cls().get_params())
    return cls(**parameters) if loss is None else ConvexHeadRegressor(loss=loss, **parameters)
