"""Regularisation paths: one problem solved over a falling grid of β, each from the solution before."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from convexhead import inputs
from convexhead.errors import InputError, choose, warn
from convexhead.estimators import ConvexHeadClassifier
from convexhead.fitting import Task, pose, ranks_of
from convexhead.held_out import HeldOut
from convexhead.model import Model
from convexhead.padding import as_padded, with_lengths
from convexhead.program.atoms import Atoms
from convexhead.program.losses import BinaryCrossEntropy, CrossEntropy
from convexhead.program.recent_outputs import RecentOutputs
from convexhead.reading import tokens_of
from convexhead.regressor import ConvexHeadRegressor
from convexhead.runtime.checkpoint import Checkpoint
from convexhead.runtime.clock import now
from convexhead.runtime.content import content_hash
from convexhead.runtime.surroundings import undisturbed
from convexhead.solvers.monitor import Progress
from convexhead.trail import Trail

PROVEN = ("primal", "dual", "gap", "relative_gap", "converged")
"""What a row has of a certificate, ``primal`` as ``objective``."""
DEFAULT_RATIOS = (0.5, 0.25, 0.12, 0.06, 0.03, 0.015)
Grid = Sequence[float] | NDArray[Any]
Row = dict[str, Any]


@undisturbed()
def beta_max(X: Any, y: Any = None, sample_weight: Any = None, *, loss: str | None = None, **parameters: Any) -> float:
    """The smallest β at which the optimum is the zero model.

    Parameters
    ----------
    X, y, sample_weight
        As for ``fit``. Labels, or float targets with ``loss="squared"`` or ``"huber"``.
    loss : str or None
        None: classification with cross-entropy.
    **parameters
        Of `ConvexHeadClassifier` or `ConvexHeadRegressor`: ``head``, ``activation``, ``pool``, …

    Returns
    -------
    float
        Of a ReLU head for which there is no tight bound, the largest weight at which a search found a better model
        than zero: the true one is not smaller.
    """
    template = _estimator(loss, parameters)
    with ranks_of(template).all_or_none():
        return pose(template, X, y, sample_weight, to_solve=True, run="beta_max").beta_max


@undisturbed()
def regularization_path(
    X: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    beta_ratios: Grid = DEFAULT_RATIOS,
    Cs: Grid | None = None,
    X_val: Any = None,
    y_val: Any = None,
    loss: str | None = None,
    patience: int | None = None,
    search_tol: float | None = None,
    callback: Callable[[Row], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float = 10.0,
    **parameters: Any,
) -> list[Row]:
    """Fit one head along falling β, each fit warm-started from the one before.

    Parameters
    ----------
    X, y, sample_weight
        As for ``fit``.
    beta_ratios : sequence of float
        ``β/β_max``; visited from the largest down.
    Cs : sequence of float or None
        Of the linear head of a classifier: scikit-learn's ``C`` instead of ``beta_ratios``; visited from the smallest
        up.
    X_val, y_val
        Held-out data that every fit is scored on.
    loss : str or None
        None: classification with cross-entropy. Another cross-entropy, or regression with that loss.
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
    checkpoint : path or None
        A folder in which each fit writes its state now and then, and when it ends. The same call goes on from there.
    checkpoint_minutes : float
        Minutes between two checkpoints of a fit.
    **parameters
        Of the estimator: ``head``, ``activation``, ``pool``, ``tol``, …

    Returns
    -------
    list of dict
        One row for each β, as visited: ``beta_ratio``, ``beta``, ``objective``, ``dual``, ``gap``, ``relative_gap``,
        ``converged``, ``n_heads``, ``train_score``, ``val_score`` (of `validation_score`; None without held-out data),
        ``seconds`` and ``model``, the fitted estimator. `best` picks one. The linear head of a classifier has ``C``
        too, the same weight as scikit-learn's ``LogisticRegression`` counts it.

    Warns
    -----
    ConvergenceWarning
        Ctrl-C ended the path. The rows are those of the fits that were finished, or the first one with its honest
        gap; with ``search_tol``, where no fit has a certificate yet, KeyboardInterrupt is raised.
    """
    grid = _grid(beta_ratios, Cs)
    template = _template(loss, parameters, X_val, search_tol, checkpoint)
    with ranks_of(template).all_or_none():
        began = now()
        agreed: dict[str, Any] = {**grid, "patience": patience, "search_tol": search_tol}
        agreed |= {"checkpoint": None if checkpoint is None else str(checkpoint)}
        task = pose(template, X, y, sample_weight, to_solve=True, run="path", **agreed, validation=X_val is not None)
        if X_val is not None:
            _agree_on_held_out(task, X_val, y_val)
        held_out = None if X_val is None else HeldOut(task, X_val, y_val)
        path = _Path(task, type(template), held_out, progress, began, _saved(checkpoint, checkpoint_minutes))
        return path.followed(_ratios(task, **grid), search_tol, patience, callback)


def _grid(beta_ratios: Grid, Cs: Grid | None) -> dict[str, list[float]]:
    """The one of them that is passed, checked, in the order of falling β."""
    if Cs is not None and beta_ratios is not DEFAULT_RATIOS:
        raise InputError("beta_ratios and Cs are two ways to name the same weights: pass one of them")
    name, given = ("beta_ratios", beta_ratios) if Cs is None else ("Cs", Cs)
    try:
        values = sorted({float(value) for value in given}, reverse=Cs is None)
    except (TypeError, ValueError):
        values = []
    if not values or not all(0 < value < math.inf for value in values):
        raise InputError(f"{name} must be some positive numbers, got {given!r}")
    return {name: values}


def _ratios(task: Task, beta_ratios: Sequence[float] = (), Cs: Sequence[float] = ()) -> list[float]:
    """``β/β_max`` for each value of a `_grid`."""
    if not Cs:
        return list(beta_ratios)
    times = C_times_beta(task)
    if times is None:
        raise InputError("Cs are of the linear head of a classifier: pass beta_ratios")
    if not task.beta_max:
        raise InputError("no feature is related to the targets: at any C the optimum is the zero model")
    return [times / (C * task.beta_max) for C in Cs]


def _template(
    loss: str | None, parameters: dict[str, Any], X_val: Any, search_tol: float | None, checkpoint: str | Path | None
) -> ConvexHeadClassifier | ConvexHeadRegressor:
    """The estimator of a path, whose settings go together."""
    for reserved in ("beta", "beta_ratio"):
        if reserved in parameters:
            raise InputError(f"regularization_path sets {reserved} itself: pass beta_ratios instead")
    if search_tol is not None and X_val is None:
        raise InputError("search_tol solves only the best β to the end: pass X_val and y_val to choose it by")
    template = _estimator(loss, parameters)
    if checkpoint is not None and search_tol is not None:
        raise InputError("search_tol goes through the β too fast for checkpoints: leave one of them out")
    if checkpoint is not None and not isinstance(template.random_state, numbers.Integral):
        raise InputError("a path with checkpoints draws the same when it is resumed: pass random_state, a whole number")
    return template


def _agree_on_held_out(task: Task, X_val: Any, y_val: Any) -> None:
    ragged = y_val is None or isinstance(y_val, (list, tuple))  # lists may hold arrays of different length
    task.problem.ranks.agree(
        lambda: tokens_of(with_lengths(as_padded(inputs.resolve_store(X_val)))),
        lambda held: {
            "held-out data (tokens)": inputs.tokens_hash(held[0]),
            "held-out data (mask)": f"sha256:{content_hash(held[1])}",
            "held-out data (targets)": f"sha256:{content_hash(y_val if ragged else np.asarray(y_val))}",
        },
    )


@dataclass
class _Path:
    """A path being followed.

    Attributes
    ----------
    began : float
        When the row that is next was begun.
    saved : (Path, float) or None
        The folder of the checkpoints, and the minutes between them.
    interrupted : bool
        Whether Ctrl-C has ended it.
    """

    task: Task
    estimator: type[ConvexHeadClassifier] | type[ConvexHeadRegressor]
    held_out: HeldOut | None
    progress: Callable[[Progress], None] | None
    began: float
    saved: tuple[Path, float] | None = None
    rows: list[Row] = field(default_factory=list)
    trail: Trail = field(default_factory=Trail)
    interrupted: bool = False

    def followed(
        self,
        ratios: list[float],
        search_tol: float | None,
        patience: int | None,
        callback: Callable[[Row], None] | None,
    ) -> list[Row]:
        """All rows, with ``search_tol`` after its best fit went on to its certificate."""
        self._follow(ratios, search_tol, patience, callback)
        if self.interrupted and len(self.rows) < len(ratios):
            warn(f"interrupted: {len(self.rows)} of {len(ratios)} β were visited", ConvergenceWarning)
        if search_tol is None:
            return self.rows
        rows, chosen = self._finished()
        if callback is not None:
            callback(chosen)
        return rows

    def _follow(
        self,
        ratios: list[float],
        search_tol: float | None,
        patience: int | None,
        callback: Callable[[Row], None] | None,
    ) -> None:
        """Add a row for each of the falling ``ratios``, until patience or a person ends it."""
        problem = self.task.problem
        if not problem.head.learns_mixing:
            problem.operator.samples.recent, problem.operator.samples.problems = RecentOutputs(), len(ratios)
        for ratio in ratios:
            task = self.task.at(ratio)
            start = self.trail.start(task.beta, task.problem)
            try:
                row = self._solved(task, start) if search_tol is None else self._searched(task, start, search_tol)
            except KeyboardInterrupt:
                if not self.rows or search_tol is not None:
                    raise
                self.interrupted = True
                return
            self.rows.append(row)
            self.trail.add(row["model"].model_)
            if callback is not None:
                callback(row)
            if self.interrupted:
                return
            if patience is not None and self.held_out is not None:
                best_so_far = int(np.argmax([row["val_score"] for row in self.rows]))
                if len(self.rows) - 1 - best_so_far >= patience:
                    return

    def _solved(self, task: Task, start: Atoms | None) -> Row:
        """The row of a certified fit."""
        checkpoint = None
        if self.saved is not None:
            folder, minutes = self.saved
            checkpoint = _saved_in(folder / repr(task.spec.beta_ratio), task, minutes)
            self.task.beta_max = task.beta_max
        model, solution = task.solve(start=start, callback=self.progress, checkpoint=checkpoint)
        if checkpoint is not None:
            checkpoint.flush()
        self.interrupted = solution.interrupted
        if self.interrupted and self.rows and not solution.certificate.converged:
            raise KeyboardInterrupt  # beside fits that are finished, it says nothing
        return self._row(task, model, {name: getattr(solution.certificate, name) for name in PROVEN})

    def _searched(self, task: Task, start: Atoms | None, tol: float) -> Row:
        """The row of a fit that ends at the solver's own estimate."""
        model = task.approach(tol, start=start, callback=self.progress)
        unproven = {"dual": None, "gap": None, "relative_gap": None, "converged": False}
        return self._row(task, model, {"primal": model.history[-1]["objective"], **unproven})

    def _row(self, task: Task, model: Model, proof: dict[str, Any]) -> Row:
        fitted = self.estimator.from_model(model)
        ranks, held_out = self.task.problem.ranks, self.held_out
        times = C_times_beta(self.task)
        row = {
            "beta_ratio": model.spec.beta_ratio,
            "beta": model.beta,
            **({} if times is None else {"C": times / model.beta}),
            "objective": proof["primal"],
            **{name: proof[name] for name in PROVEN if name != "primal"},
            "n_heads": len(model.atoms),
            "train_score": task.score(model),
            # One process scores for all, so that they choose alike.
            "val_score": None if held_out is None else ranks.first_does(lambda: held_out.score(fitted)),
            "seconds": now() - self.began,
            "model": fitted,
        }
        self.began = now()
        return row

    def _finished(self) -> tuple[list[Row], Row]:
        """The rows of a search whose best fit, the second result, went on to its certificate: only it has a model."""
        if self.held_out is not None:
            self.held_out.rest()  # a certificate has use for the memory
        chosen = best(self.rows)
        searched = chosen["model"].model_
        row = self._solved(self.task.at(chosen["beta_ratio"]), searched.atoms)
        if self.interrupted:
            raise KeyboardInterrupt
        row["seconds"] += chosen["seconds"]
        model, before = row["model"].model_, searched.history[-1]["seconds"]
        after = [{**moment, "seconds": moment["seconds"] + before} for moment in model.history]
        row["model"] = self.estimator.from_model(replace(model, history=searched.history + after))
        return [row if other is chosen else {**other, "model": None} for other in self.rows], row


def _saved(checkpoint: str | Path | None, minutes: float) -> tuple[Path, float] | None:
    """Where fits write checkpoints, and how often."""
    return None if checkpoint is None else (Path(checkpoint), minutes)


def _saved_in(folder: Path, task: Task, minutes: float) -> Checkpoint:
    """A checkpoint of ``task``, which takes the `beta_max` that it was begun with.

    Another number of processes would round that otherwise.
    """
    settings = {**task.spec.facts(), **task.data.fingerprint}
    saved = Checkpoint(folder, settings, minutes=minutes, ranks=task.problem.ranks)
    if "beta_max" in saved.notes:
        task.beta_max = saved.notes["beta_max"]
    saved.notes["beta_max"] = task.beta_max
    return saved


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
"""Sentences that say what it means if β lies at an edge of its grid."""


def grid_edge(beta_ratios: Sequence[float], chosen: float) -> Literal["low", "high"] | None:
    """The edge of the grid that ``chosen`` lies at; None inside, and where the grid is a single value."""
    if min(beta_ratios) == max(beta_ratios):
        return None
    return "low" if chosen <= min(beta_ratios) else "high" if chosen >= max(beta_ratios) else None


def C_times_beta(task: Task) -> float | None:
    """The ``C`` of scikit-learn's ``LogisticRegression`` times β; None for heads that are no such model.

    Its objective is ``½‖W‖² + C Σ_i w_i ℓ_i``, which is ours times ``C W`` for ``W = Σ_i w_i`` and ``C = 1/(W β)``. Of
    two classes it has one row of weights where we have two columns ``∓w/2``: half the penalty, and twice the ``C``.
    """
    loss = task.problem.loss
    if task.problem.head.learns_mixing or not isinstance(loss, (CrossEntropy, BinaryCrossEntropy)):
        return None
    halved = isinstance(loss, CrossEntropy) and task.problem.c == 2
    return (2.0 if halved else 1.0) / task.data.total_weight


def _estimator(loss: str | None, parameters: dict[str, Any]) -> ConvexHeadClassifier | ConvexHeadRegressor:
    cls = ConvexHeadClassifier if loss in (None, "cross-entropy", "binary-cross-entropy") else ConvexHeadRegressor
    known = cls().get_params()
    for name in sorted(parameters):
        choose("parameter", name, known)
    return cls(**parameters) if loss is None else cls(loss=loss, **parameters)
