"""β chosen by cross-validation, as a share of each fold's own β_max.

On every fold one head is trained along falling β, each fit from the one before, and scored on the samples that the fold
leaves out. The β with the best mean score is chosen; among equals it is the largest, the simplest model. Where scores
still rise at the edge of the grid, the grid goes on. Each finished fit may be kept in a folder. The same choice goes on
from what is there, to the same scores.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import check_scoring, get_scorer_names, log_loss, make_scorer
from sklearn.utils import _safe_indexing
from torch import Tensor

from convexhead import inputs
from convexhead._version import __version__
from convexhead.errors import InputError, warn
from convexhead.estimator_base import HeadEstimator
from convexhead.fitting import Task, pose, ranks_of
from convexhead.folds import Rows, splits_of
from convexhead.held_out import HeldOut
from convexhead.model import Model
from convexhead.padding import Padded
from convexhead.path import EDGES, C_times_beta, grid_edge
from convexhead.program.atoms import Atoms
from convexhead.reading import Data
from convexhead.runtime.clock import now
from convexhead.runtime.content import content_hash
from convexhead.runtime.run_folder import Piece, RunFolder
from convexhead.solvers.monitor import Progress
from convexhead.tokens.store.manifest import digest_json

LARGEST_RATIO, SMALLEST_RATIO, N_RATIOS = 0.5, 0.002, 12
"""Ends of the default grid of ``β/β_max``, and the number of values on it. Chosen by hand: from almost no head to more
heads than most tasks use."""
MOST_EXTENSIONS = 3
"""How often the grid goes on. Chosen by hand: each time to a quarter, so to a 64th of the smallest value in all."""
FOLD_TOL = 5.0
"""Relative gap of a fold's fits by the solver's own estimate, in units of ``tol``. Chosen by hand: the folds differ by
more."""
TIE = 1e-12
"""Difference of mean scores, relative to the larger of their size and 1, that is rounding. Derived: some thousands of
units in the last place of float64, for sums over folds."""

Scorer = Callable[..., Any]


@dataclass
class Choice:
    """What cross-validation found.

    Attributes
    ----------
    ratios : list of float
        The grid of ``β/β_max``, falling.
    scores : ndarray (folds, grid)
    n_channels : int
        ``d`` of the tokens.
    C_times_beta : float or None
        See `convexhead.path.C_times_beta`, of all samples.
    chosen : float
        The ratio with the best mean score over the folds.
    rising : {"low", "high"} or None
        The edge of the grid that it lies at, if it scores better than its neighbour there: a better one may lie beyond.
    """

    ratios: list[float]
    scores: NDArray[np.float64]
    n_channels: int
    C_times_beta: float | None = None
    chosen: float = field(init=False)
    rising: Literal["low", "high"] | None = field(init=False)

    def __post_init__(self) -> None:
        mean = self.scores.mean(0)
        equal = mean >= mean.max() - TIE * max(1.0, abs(mean.max()))
        self.chosen = self.ratios[int(np.argmax(equal))]
        self.rising = None if equal[:2].all() else grid_edge(self.ratios, self.chosen)


def choose_beta(
    estimator: HeadEstimator,
    X: Any,
    y: Any,
    sample_weight: Any = None,
    *,
    beta_ratios: Any = None,
    cv: Any = 5,
    scoring: Any = None,
    groups: Any = None,
    callback: Callable[[Progress], None] | None = None,
    kept: RunFolder | None = None,
) -> Choice:
    """Score an estimator along a grid of ``β/β_max`` on the folds of ``cv``.

    Parameters
    ----------
    estimator : ConvexHeadClassifier or ConvexHeadRegressor
        Its gates or queries are drawn once, on all tokens, and are the same in all folds.
    X, y, sample_weight
        As for its ``fit``; ``y`` is not None.
    beta_ratios, cv, scoring, groups
        As of `ConvexHeadClassifierCV`.
    callback : callable (Progress) or None
        Called as the solver goes.
    kept : RunFolder or None
        Where finished fits are kept. What is there of these data, settings and folds is not fitted again.

    Raises
    ------
    InputError
        Anything that cannot be used; the message names the fold where it is one's.
    """
    ratios, scorer = grid_of(beta_ratios), _scorer(estimator, scoring)
    ranks = ranks_of(estimator)
    task = pose(estimator, X, y, sample_weight, to_solve=True, run="cross-validation", beta_ratios=ratios)
    classes, head = task.data.classes, task.problem.head
    drawn = {"gates": getattr(task.problem.activation, "gates", None), "queries": head.queries}
    largest = 1.0 if head.learns_mixing else math.inf  # a linear head is never zero: its penalty is squared
    named = {"version": __version__, "max_time": task.spec.max_time, **task.spec.facts(), **task.data.fingerprint}
    about = head.d, C_times_beta(task)
    del task  # with its tokens
    part = _Part(type(estimator)(**estimator.get_params(deep=False)), classes)
    for name, tensor in drawn.items():
        if tensor is not None:
            part.estimator.set_params(**{name: tensor.cpu().numpy()})
    if sample_weight is not None:
        given = np.full(len(y), sample_weight) if np.isscalar(sample_weight) else sample_weight
        sample_weight = np.asarray(inputs.plain(given, "sample_weight"))
    splits = ranks.first_does(lambda: splits_of(cv, X, y, groups, classifier=classes is not None))
    if kept is not None:
        if ranks.size > 1:
            raise InputError("several processes keep no fits of cross-validation: leave checkpoint out")
        kept.begin({"run": "cross-validation"})
    folds = [
        _Fold(
            part, X, y, sample_weight, train, test, scorer, f"fold {i + 1} of {len(splits)}", callback, kept,
            f"fold-{i + 1}-{digest_json({**named, 'fold': content_hash(scoring, train, test)})[:12]}",
        )
        for i, (train, test) in enumerate(splits)
    ]  # fmt: skip
    found = Choice(ratios, np.array([fold.scores(ratios) for fold in folds]), *about)
    for _ in range(MOST_EXTENSIONS):
        if not (more := _beyond(found, largest)):
            break
        scores = np.array([fold.scores(more) for fold in folds])
        order = np.argsort([*found.ratios, *more])[::-1]
        grid = np.array([*found.ratios, *more])[order]
        found = Choice(grid.tolist(), np.hstack([found.scores, scores])[:, order], *about)
    if found.chosen >= largest:
        warn("the zero model, of β_max, has the best score of the grid: on held-out samples no head beats a constant")
    elif found.rising is not None:
        warn(
            f"the best β/β_max, {found.chosen:.3g}, {EDGES[found.rising]}: the grid went on {MOST_EXTENSIONS} times "
            "and stopped there; pass beta_ratios that reach further"
        )
    return found


# -- the grid ----------------------------------------------------------------------------------------------------------
def grid_of(beta_ratios: Any) -> list[float]:
    """The ratios to begin with, falling.

    Raises
    ------
    InputError
        No positive numbers, and no number of them.
    """
    if beta_ratios is None:
        beta_ratios = N_RATIOS
    if isinstance(beta_ratios, numbers.Integral) and not isinstance(beta_ratios, bool):
        if beta_ratios < 2:
            raise InputError(f"beta_ratios must be at least 2 values, got {beta_ratios!r}: to fix one pass [value]")
        return np.geomspace(LARGEST_RATIO, SMALLEST_RATIO, int(beta_ratios)).tolist()
    values: list[float] = []
    if isinstance(beta_ratios, (Iterable, np.ndarray)) and not isinstance(beta_ratios, (str, bytes, dict)):
        with inputs.told_plainly():
            values = np.unique(np.asarray(list(beta_ratios), dtype=np.float64)).tolist()
    if not values or not all(0 < value < math.inf for value in values):
        raise InputError(f"beta_ratios must be None, how many, or positive numbers, got {beta_ratios!r}")
    return values[::-1]


def _beyond(found: Choice, largest: float) -> list[float]:
    """Where the grid goes on, falling, to ``largest`` at most; nothing where scores do not rise at its edge."""
    if found.rising == "low":
        return [found.chosen / 2, found.chosen / 4]
    if found.rising == "high" and found.chosen < largest:
        return sorted({min(2 * found.chosen, largest), min(4 * found.chosen, largest)}, reverse=True)
    return []


# -- the folds ---------------------------------------------------------------------------------------------------------
def some(X: Any, rows: Rows) -> Any:
    """Some samples of what ``fit`` takes as X; those of a store or a memory map stay on disk."""
    if isinstance(X, Padded):
        return X.rows(rows)
    if inputs.is_store(X) or hasattr(X, "detach") or (isinstance(X, np.memmap) and X.ndim == 3):
        return inputs.some_samples(X, rows)
    return _safe_indexing(X if hasattr(X, "shape") else np.asarray(inputs.plain(X, "X")), rows)


@dataclass
class _Part:
    """An estimator that reads a part of the samples, whose classes are those of all. It is posed as any other."""

    estimator: HeadEstimator
    classes: NDArray[Any] | None
    distributed: bool = False

    def __post_init__(self) -> None:
        self.distributed = self.estimator.distributed

    def read(self, X: Any, y: Any, sample_weight: Any = None) -> Data:
        return self.estimator.read(X, y, sample_weight, classes=self.classes)


@dataclass
class _Fold:
    """One fold: fits on ``train``, scores on ``test``.

    Attributes
    ----------
    kept : RunFolder or None
        Where finished fits are kept, under names that begin with ``key``.
    end : Piece or None
        The fit at the smallest β so far, where a grid that goes on begins.
    smallest : float
        Its ratio.
    """

    part: _Part
    X: Any
    y: NDArray[Any]
    sample_weight: NDArray[Any] | None
    train: Rows
    test: Rows
    scorer: Scorer | None
    name: str
    callback: Callable[[Progress], None] | None
    kept: RunFolder | None = None
    key: str = ""
    end: Piece | None = None
    smallest: float = math.inf

    def scores(self, ratios: list[float]) -> list[float]:
        """The score at each of the falling ``ratios``."""
        try:
            return self._scores(ratios)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error

    def _scores(self, ratios: list[float]) -> list[float]:
        path, found = _FoldPath(self, ratios), []
        before = self.end if ratios[0] < self.smallest else None
        for ratio in ratios:
            solve = partial(path.solve, ratio, before)
            piece = solve() if self.kept is None else self.kept.once(f"{self.key}-{ratio!r}", solve)
            if before is not None and self.kept is not None:
                self.kept.drop_weights(before.name)  # they may be large, and no fit begins there any more
            path.generator, before = piece.tensors.get("generator"), piece
            found.append(piece.record["score"])
            if ratio < self.smallest:
                self.end, self.smallest = piece, ratio
        return found

    def pose(self, ratios: list[float]) -> Task:
        """The problem of the samples to train on."""
        X, y, w = self._samples(self.train)
        return pose(self.part, X, y, w, to_solve=True, run="cross-validation", fold=self.name, beta_ratios=ratios)

    def held_out(self, task: Task) -> HeldOut:
        """The samples to score on."""
        return HeldOut(task, *self._samples(self.test))

    def score(self, held_out: HeldOut, model: Model) -> float:
        """The score of a model on what is held out; one process scores for all, so that they choose alike."""
        fitted = type(self.part.estimator).from_model(model)
        return held_out.task.problem.ranks.first_does(lambda: self._score(fitted, held_out))

    def _samples(self, rows: Rows) -> tuple[Any, Any, Any]:
        w = self.sample_weight
        return some(self.X, rows), self.y[rows], None if w is None else w[rows]

    def _score(self, fitted: HeadEstimator, held_out: HeldOut) -> float:
        y, w = held_out.y, held_out.sample_weight
        with inputs.told_plainly():
            try:
                if self.scorer is None:
                    score = held_out.score(fitted)
                else:
                    weights = {} if w is None else {"sample_weight": w}
                    score = float(self.scorer(fitted, held_out.X, y, **weights))
            except AttributeError as error:  # the score needs what this estimator does not have
                raise InputError(f"this scoring is not for {type(fitted).__name__}: {error}") from error
        if not math.isfinite(score):
            raise InputError(
                f"the score of its {len(y)} held-out samples is {score}: use another scoring, or larger folds"
            )
        return score


@dataclass
class _FoldPath:
    """Fits of a fold along falling ratios. The problem is posed when one has to be made.

    Attributes
    ----------
    generator : Tensor or None
        The state of random starts after the fit before, if that is of these ratios.
    """

    fold: _Fold
    ratios: list[float]
    generator: Tensor | None = None
    task: Task | None = None
    held_out: HeldOut | None = None

    def solve(self, ratio: float, before: Piece | None) -> Piece:
        """The score at ``ratio``, and what the next fit begins from; ``before`` is what this one begins from."""
        began = now()
        if self.task is None or self.held_out is None:
            self.task = self.fold.pose(self.ratios)
            self.held_out = self.fold.held_out(self.task)
            _ = self.task.beta_max  # it is drawn for first
            if self.generator is not None:
                self.task.generator.set_state(self.generator)
        task, start = self.task.at(ratio), None if before is None else Atoms.restored(before.tensors)
        model = task.approach(FOLD_TOL * task.spec.tol, start=start, callback=self.fold.callback)
        state = {**model.atoms.state(), "generator": task.generator.get_state()}
        record = {"score": self.fold.score(self.held_out, model), "seconds": now() - began}
        return Piece(record, {name: part.clone() for name, part in state.items()})


def _scorer(estimator: HeadEstimator, scoring: Any) -> Scorer | None:
    """The scorer that scikit-learn has for ``scoring``; None: the estimator's own."""
    if scoring is None:
        return None
    if isinstance(scoring, (list, tuple, set, dict)):
        raise InputError("scoring must be one score, by which β is chosen")
    if isinstance(scoring, str) and scoring not in get_scorer_names():
        raise InputError(f"unknown scoring {scoring!r}: sklearn.metrics.get_scorer_names() lists those that there are")
    if isinstance(scoring, str) and scoring == "neg_log_loss":  # a fold may hold out no sample of some class
        return _log_loss
    with inputs.told_plainly():
        return check_scoring(estimator, scoring)


def _log_loss(fitted: Any, X: Any, y: Any, sample_weight: Any = None) -> float:
    labels = {"labels": fitted.classes_} if np.ndim(y) == 1 else {}
    score = make_scorer(log_loss, greater_is_better=False, response_method="predict_proba", **labels)
    return float(score(fitted, X, y, sample_weight=sample_weight))
