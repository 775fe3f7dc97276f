"""scikit-learn's face of regression: see `convexhead.estimators`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import RegressorMixin

from convexhead import inputs
from convexhead.estimator_base import HeadEstimator
from convexhead.padding import Padded, as_padded, padded_like
from convexhead.program.losses import Loss
from convexhead.reading import Data, read_measured, split_for, supervision
from convexhead.scores import r_squared
from convexhead.solvers.monitor import Progress


class ConvexHeadRegressor(RegressorMixin, HeadEstimator):
    """A token head trained with the squared or Huber loss to a certified global optimum.

    The parameters and attributes are those of `ConvexHeadClassifier`, and

    Parameters
    ----------
    loss : {"squared", "huber"} or Loss
        ``½‖f − y‖²`` or its robust relative, or a `convexhead.program.losses.Loss` of your own.
    pool : {"mean", "cls"} or None
        None: an output for every token, targets ``(n, s, c)``.
    """

    def __init__(
        self,
        head: str = "self-attention",
        *,
        activation: str = "linear",
        loss: str | Loss = "squared",
        beta: float | None = None,
        beta_ratio: float = 0.05,
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
        self.beta = beta
        self.beta_ratio = beta_ratio
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

    def fit(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        mask: Any = None,
        callback: Callable[[Progress], None] | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_minutes: float = 10.0,
    ) -> ConvexHeadRegressor:
        """Train to the certified optimum.

        Parameters
        ----------
        X : array, memmap, tensor or split of a TokenStore, (n, s, d) or (n, d); list of arrays (s_i, d)
        y : array (n,), (n, c), or (n, s, c) with ``pool=None``; or None
            Targets. None: the store's own. Where the weight is 0 anything may stand, NaN too.
        sample_weight : array (n,), a number, or None
            ``w``: 2 is the same as the sample twice, 0 as not there. Also of every number in ``y``, and with
            ``pool=None`` ``(n, s)``, of tokens: a mask. The data term is the mean over what has a weight.
        mask, callback, checkpoint, checkpoint_minutes
            As for `ConvexHeadClassifier.fit`, and so is what it raises and warns of.
        """
        return self._train(as_padded(X, mask), y, sample_weight, callback, checkpoint, checkpoint_minutes)

    def read(self, X: Any, y: Any, sample_weight: Any = None, *, classes: NDArray[Any] | None = None) -> Data:
        """The data of a fit, checked."""
        spec = self.to_spec()
        X = split_for(X, spec.head, spec.pool)
        y, sample_weight = supervision(X, y, sample_weight, spec)
        return self._named(read_measured(self._checked(X, reset=True), y, spec, sample_weight))

    def predict(self, X: Any, mask: Any = None) -> NDArray[np.float64]:
        """Outputs in the shape of the targets that the head was fitted on."""
        f, model = self._outputs(X, mask), self._fitted()
        return f if model.any_length and model.spec.pool is None else f.reshape(len(f), *model.target_shape)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None, *, mask: Any = None) -> float:
        """R², averaged over outputs (and tokens). ``y`` may be left out for a split of a store with numbers."""
        return self._score(as_padded(inputs.resolve_store(X), mask), y, sample_weight, None)

    def _score(self, X: Any, y: Any, sample_weight: Any, f: NDArray[np.float64] | None) -> float:
        (y, sample_weight), spec = self._to_compare(X, y, sample_weight), self._fitted().spec
        X = as_padded(inputs.resolve_store(X))
        if spec.pool is None and isinstance(X, Padded):
            y, sample_weight = padded_like(X.mask.numpy(), y, 0.0), X.weights(sample_weight)
        return r_squared(y, self._outputs(X) if f is None else f, spec, sample_weight)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
