"""Estimators that choose β by cross-validation, after scikit-learn's ``LogisticRegressionCV``."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import NotFittedError
from sklearn.metrics import check_scoring

from convexhead import inputs
from convexhead.cross_validation import choose_beta, grid_of
from convexhead.errors import InputError
from convexhead.estimator_base import SETTINGS, HeadEstimator, hold
from convexhead.estimators import ConvexHeadClassifier
from convexhead.fitting import fit, ranks_of
from convexhead.model import Model
from convexhead.padding import Padded, as_padded, padded_like
from convexhead.program.losses import Loss
from convexhead.reading import supervision
from convexhead.regressor import ConvexHeadRegressor
from convexhead.runtime.run_folder import RunFolder
from convexhead.runtime.seeds import draw_seed
from convexhead.solvers.monitor import Progress
from convexhead.targets import as_labels

E = TypeVar("E", bound="_ChoosesBeta")


class _ChoosesBeta(HeadEstimator):
    """What both share; see `ConvexHeadClassifierCV`."""

    beta_ratios: Any
    cv: Any
    scoring: Any
    refit: bool
    random_state: Any

    def _choose(
        self: E,
        plain: HeadEstimator,
        X: Any,
        y: NDArray[Any],
        sample_weight: Any,
        groups: Any,
        callback: Callable[[Progress], None] | None,
        checkpoint: str | Path | None,
    ) -> E:
        """Choose β for the estimator ``plain`` of this one's settings, and train it on everything."""
        if not isinstance(self.refit, (bool, np.bool_)):
            raise InputError(f"refit must be True or False, got {self.refit!r}")
        plain.set_params(**{name: value for name, value in self.get_params(deep=False).items() if name in SETTINGS})
        ranks = ranks_of(plain)
        with ranks.all_or_none():
            grid_of(self.beta_ratios)
            if not isinstance(self.random_state, numbers.Integral):
                plain.set_params(random_state=draw_seed(self.random_state, ranks))  # the same gates for all fits
            found = choose_beta(
                plain, X, y, sample_weight, beta_ratios=self.beta_ratios, cv=self.cv, scoring=self.scoring,
                groups=groups, callback=callback, kept=None if checkpoint is None else RunFolder(Path(checkpoint)),
            )  # fmt: skip
            model = None
            if self.refit:
                model = fit(plain.set_params(beta_ratio=found.chosen), X, y, sample_weight, callback=callback)
        for name in ("model_", "feature_names_in_", "C_"):
            self.__dict__.pop(name, None)  # of an earlier fit
        if model is not None and found.C_times_beta is not None:
            self.C_ = found.C_times_beta / model.beta
        self.n_features_in_ = found.n_channels
        self.beta_ratio_, self.beta_ratios_, self.scores_ = found.chosen, np.array(found.ratios), found.scores
        return self if model is None else hold(self, model)

    def _fitted(self) -> Model:
        if "model_" not in vars(self) and hasattr(self, "beta_ratio_"):
            raise NotFittedError(f"{type(self).__name__} was fitted with refit=False: it chose beta_ratio_, no head")
        return super()._fitted()

    def _scored(self, X: Any, y: Any, sample_weight: Any) -> float:
        """The score that ``scoring`` names."""
        y, sample_weight = self._to_compare(X, y, sample_weight)
        weights = {} if sample_weight is None else {"sample_weight": sample_weight}
        with inputs.told_plainly():
            return float(check_scoring(self, self.scoring)(self, X, y, **weights))


class ConvexHeadClassifierCV(_ChoosesBeta, ConvexHeadClassifier):
    """A `ConvexHeadClassifier` that chooses β by cross-validation, as ``LogisticRegressionCV`` chooses its weight.

    On every fold the head is trained along falling β, each fit from the one before, and scored on what the fold leaves
    out. The β with the best mean score is chosen; among equals it is the largest, the simplest model. Then the head is
    trained on everything, and that one is certified. A fold's β are shares of the fold's own β_max; the head is trained
    at the same share of the β_max of all samples. Fits on folds end at a relative gap of ``5 tol`` by the solver's own
    estimate, nothing is proven of them.

    Where scores still rise at the edge of the grid, the grid goes on with half and a quarter of its smallest value, or
    with twice and four times its largest, to 1 at most, at which a head is the zero model. It does so three times at
    most. A grid of one value stays as it is.

    The other parameters and attributes are those of `ConvexHeadClassifier`; ``max_time`` is of each fit. Gates are
    drawn once, on all tokens, and are the same in all fits.

    Parameters
    ----------
    beta_ratios : int, list of float, or None
        The grid of ``β/β_max``, or how many values from 0.5 to 0.002, at equal ratios; None: 12.
    cv : int, splitter, or iterable of (train, test)
        The folds, as in all of scikit-learn: an int is that many, stratified by the labels and not shuffled, with
        ``groups`` those of ``StratifiedGroupKFold``. One split that is given is enough.
    scoring : str, callable or None
        Any scorer of scikit-learn; None: accuracy, and for several labels the mean average precision. Where
        probabilities matter take ``"neg_log_loss"``.
    refit : bool
        False: choose only, there is no head then.

    Attributes
    ----------
    beta_ratio_ : float
        The chosen ``β/β_max``; ``beta_`` is the weight itself.
    beta_ratios_ : ndarray (grid,)
        Falling, with what the grid went on by.
    scores_ : ndarray (folds, grid)
    C_ : float
        Of the linear head after a refit: ``beta_`` as scikit-learn's ``LogisticRegression`` counts it.

    Examples
    --------
    >>> import numpy as np, convexhead as ch
    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(60, 9, 4)), np.arange(60) % 3
    >>> X[:, :, 0] += y[:, None]
    >>> clf = ch.ConvexHeadClassifierCV("mlp", beta_ratios=[0.3, 0.1, 0.03], cv=3, random_state=0).fit(X, y)
    >>> clf.certificate_.converged, clf.scores_.shape[0]
    (True, 3)
    """

    def __init__(
        self,
        head: str = "self-attention",
        *,
        activation: str = "linear",
        loss: str = "cross-entropy",
        beta_ratios: Any = None,
        cv: Any = 5,
        scoring: Any = None,
        refit: bool = True,
        pool: str | None = "mean",
        grid: tuple[int, int] | None = None,
        n_gates: int | str = 50,
        gates: Any = None,
        n_blocks: int = 4,
        outputs: str = "shared",
        n_queries: int = 192,
        queries: Any = None,
        query_scale: float = 2.0,
        query_position: bool = True,
        key_dim: int | None = None,
        query_norm: str = "all",
        fit_intercept: bool = False,
        class_weight: Any = None,
        label_smoothing: float = 0.0,
        pos_weight: Any = None,
        ignore_index: int = -1,
        solver: str = "auto",
        tol: float = 1e-3,
        max_heads: int | None = None,
        max_time: float | None = None,
        max_memory: float | None = None,
        random_state: Any = None,
        device: str = "auto",
        distributed: bool = False,
        verbose: int = 0,
    ) -> None:
        self.head = head
        self.activation = activation
        self.loss = loss
        self.beta_ratios = beta_ratios
        self.cv = cv
        self.scoring = scoring
        self.refit = refit
        self.pool = pool
        self.grid = grid
        self.n_gates = n_gates
        self.gates = gates
        self.n_blocks = n_blocks
        self.outputs = outputs
        self.n_queries = n_queries
        self.queries = queries
        self.query_scale = query_scale
        self.query_position = query_position
        self.key_dim = key_dim
        self.query_norm = query_norm
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.label_smoothing = label_smoothing
        self.pos_weight = pos_weight
        self.ignore_index = ignore_index
        self.solver = solver
        self.tol = tol
        self.max_heads = max_heads
        self.max_time = max_time
        self.max_memory = max_memory
        self.random_state = random_state
        self.device = device
        self.distributed = distributed
        self.verbose = verbose

    def fit(  # type: ignore[override]
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        mask: Any = None,
        groups: Any = None,
        callback: Callable[[Progress], None] | None = None,
        checkpoint: str | Path | None = None,
    ) -> ConvexHeadClassifierCV:
        """Choose β, then train to the certified optimum.

        Parameters
        ----------
        X, y, sample_weight, mask
            As for `ConvexHeadClassifier.fit`; weights count in fits and in scores.
        groups : array (n,) or None
            Numbers or names of groups of samples that belong together, such as the images of a patient. No fold has a
            group in both parts; a splitter that would is refused.
        callback : callable (Progress) or None
            Called as the solver goes, in every fit.
        checkpoint : path or None
            Folder in which every finished fit of a fold is kept. The same choice goes on from there, to the same
            scores, if ``random_state`` is a number. It stays when the fit is over.

        Raises
        ------
        InputError
            Anything about the input that cannot be used; the message says what to do.

        Warns
        -----
        UserWarning
            The best β is still at the edge of the grid.
        ConvergenceWarning
            As for `ConvexHeadClassifier.fit`.
        """
        spec = self.to_spec()
        X = as_padded(inputs.resolve_store(X), mask)
        y, sample_weight = supervision(X, y, sample_weight, spec)
        y = as_labels(_of_tokens(X, y, self.pool, self.ignore_index), spec, sample_weight)
        return self._choose(ConvexHeadClassifier(), X, y, sample_weight, groups, callback, checkpoint)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None, *, mask: Any = None) -> float:
        """The score that ``scoring`` names, accuracy where it is None; for a split of a store ``y`` may be left out."""
        X = as_padded(inputs.resolve_store(X), mask)
        return super().score(X, y, sample_weight) if self.scoring is None else self._scored(X, y, sample_weight)


class ConvexHeadRegressorCV(_ChoosesBeta, ConvexHeadRegressor):
    """A `ConvexHeadRegressor` that chooses β by cross-validation: see `ConvexHeadClassifierCV`.

    Its folds are those of ``KFold``, with ``groups`` of ``GroupKFold``, and ``scoring=None`` is R². Scores of a fold
    with one sample need another scoring.
    """

    def __init__(
        self,
        head: str = "self-attention",
        *,
        activation: str = "linear",
        loss: str | Loss = "squared",
        beta_ratios: Any = None,
        cv: Any = 5,
        scoring: Any = None,
        refit: bool = True,
        pool: str | None = "mean",
        grid: tuple[int, int] | None = None,
        n_gates: int | str = 50,
        gates: Any = None,
        n_blocks: int = 4,
        outputs: str = "shared",
        n_queries: int = 192,
        queries: Any = None,
        query_scale: float = 2.0,
        query_position: bool = True,
        key_dim: int | None = None,
        query_norm: str = "all",
        fit_intercept: bool = False,
        solver: str = "auto",
        tol: float = 1e-3,
        max_heads: int | None = None,
        max_time: float | None = None,
        max_memory: float | None = None,
        random_state: Any = None,
        device: str = "auto",
        distributed: bool = False,
        verbose: int = 0,
    ) -> None:
        self.head = head
        self.activation = activation
        self.loss = loss
        self.beta_ratios = beta_ratios
        self.cv = cv
        self.scoring = scoring
        self.refit = refit
        self.pool = pool
        self.grid = grid
        self.n_gates = n_gates
        self.gates = gates
        self.n_blocks = n_blocks
        self.outputs = outputs
        self.n_queries = n_queries
        self.queries = queries
        self.query_scale = query_scale
        self.query_position = query_position
        self.key_dim = key_dim
        self.query_norm = query_norm
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.tol = tol
        self.max_heads = max_heads
        self.max_time = max_time
        self.max_memory = max_memory
        self.random_state = random_state
        self.device = device
        self.distributed = distributed
        self.verbose = verbose

    def fit(  # type: ignore[override]
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        mask: Any = None,
        groups: Any = None,
        callback: Callable[[Progress], None] | None = None,
        checkpoint: str | Path | None = None,
    ) -> ConvexHeadRegressorCV:
        """Choose β, then train to the certified optimum; see `ConvexHeadClassifierCV.fit`."""
        X = as_padded(inputs.resolve_store(X), mask)
        y, sample_weight = supervision(X, y, sample_weight, self.to_spec())
        with inputs.told_plainly():
            y = np.asarray(inputs.plain(_of_tokens(X, y, self.pool, 0.0), "y"))
        return self._choose(ConvexHeadRegressor(), X, y, sample_weight, groups, callback, checkpoint)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None, *, mask: Any = None) -> float:
        """The score that ``scoring`` names; R² where it is None."""
        X = as_padded(inputs.resolve_store(X), mask)
        return super().score(X, y, sample_weight) if self.scoring is None else self._scored(X, y, sample_weight)


def _of_tokens(X: Any, y: Any, pool: str | None, value: Any) -> Any:
    """``y``; targets of tokens of samples of different length filled up with ``value``, so that folds take rows."""
    return padded_like(X.mask.numpy(), y, value) if pool is None and isinstance(X, Padded) else y
