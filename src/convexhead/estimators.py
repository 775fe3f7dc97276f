"""scikit-learn's face: heads trained to a certified global optimum.

An estimator has parameters and a `Model`, its other attributes are views of that; `convexhead.fitting` fits it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import r2_score

from convexhead import inputs
from convexhead.errors import InputError
from convexhead.estimator_base import HeadEstimator, View
from convexhead.program.losses import Loss
from convexhead.reading import Data, labels_of, read_labelled, read_measured, split_for
from convexhead.solvers.monitor import Progress
from convexhead.spec import Spec


class ConvexHeadClassifier(ClassifierMixin, HeadEstimator):
    """A token head trained with cross-entropy to a certified global optimum.

    Minimises ``(1/n) Σ_i ℓ(f_i, y_i) + β Σ_j ‖Z_j‖_*`` with ``f_i = P Σ_k mix(X_i, U_k) V_k + b``, the convex program
    equal to training ``Σ_k mix(X, U_k) V_k`` with weight decay ``(β/2)(‖U_k‖² + ‖V_k‖²)`` (Sahiner et al., ICML 2022).

    Parameters
    ----------
    head : {"self-attention", "mlp-mixer", "fno", "block-fno", "mlp", "linear"}
        How tokens are mixed.
    activation : {"linear", "gated-relu", "relu"}
        With ``"gated-relu"`` the program is convex for the given gates, and the certificate is for them. ``"relu"``
        trains the true ReLU network; it is certified where a problem is small enough for a proof, else its
        certificate is an estimate and says so.
    beta : float or None
        ``β > 0``; where None, ``beta_ratio · beta_max_``.
    beta_ratio : float
        ``β/β_max``; at 1 the optimum is the zero model.
    pool : {"mean", "cls"}
        Which mixed tokens are read: their mean, or the first. Of a token store that is the backbone's class token,
        which is then token 0, in front of the patches.
    grid : (int, int) or None
        ``(h, w)`` of the tokens; None: square if ``s`` is a square, else ``(s, 1)``.
    n_gates : int or "all"
        Gates sampled for the gated ReLU, of different patterns (fewer where there are fewer); ``"all"``: one for every
        activation pattern, for small problems only.
    gates : array (J, \\*mixing_shape) or None
        Explicit gates; block-fno: ``(J, n_blocks, s, d/n_blocks)``.
    n_blocks : int
        Channel groups of block-fno.
    outputs : {"shared", "grouped"}
        Whether every group of block-fno writes all outputs, or each its own share.
    fit_intercept : bool
        Add an unpenalised ``b``.
    solver : {"auto", "fista", "group-newton", "column-generation", "ridge", "relu-exact", "relu-search"}
        The method; ``"auto"`` chooses by cost. All that can solve a problem end at the same optimum, and one that
        cannot is refused (see `convexhead.solvers.select`).
    tol : float
        Certified relative gap to reach.
    max_heads : int or None
        Bound on the number of heads; the certificate then says what it costs.
    max_time : float or None
        Seconds; the best model so far is returned with its honest gap.
    max_memory : float or None
        Bytes for tokens and what is made of them; stored tokens beyond are read again in each pass. None: half of
        what is free.
    random_state : int, RandomState or None
        Of sampled gates and of random starts. The optimum does not depend on it, for given gates.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, …
    distributed : bool
        Whether the processes that torchrun started share the samples; each of them calls ``fit`` with the same data.
    verbose : int
        Print progress if positive.

    Attributes
    ----------
    model_ : Model
        What was trained; the other attributes are views of it.
    certificate_ : Certificate
        How far from the global optimum the model is, at most.
    beta_, beta_max_ : float
        The weight used, and the smallest weight at which the optimum is zero.
    n_heads_ : int
        Heads found: the rank of the solution over all blocks.
    singular_values_ : list of ndarray
        Of each block's ``Z_j``, falling; for a ReLU ``‖U_k‖‖V_k‖`` of its heads.
    mixing_, values_ : lists of ndarray
        For each block ``(k, *mixing_shape)`` and ``(k, e, c)``: ``f = Σ mix(X, U_k) V_k``.
    coef_ : ndarray (d, c)
        Of the linear head, in place of these two.
    intercept_ : ndarray (c,)
    gates_ : ndarray or None
    classes_ : ndarray (c,)
    history_ : list of dict
        ``seconds``, ``objective``, ``gap`` (the solver's estimate), ``heads``.
    stop_reason_ : str
        Why the fit ended.
    n_features_in_, n_tokens_, n_outputs_ : int
        ``d``, ``s`` and ``c``.
    grid_ : (int, int)
    class_names_ : list of str or None
        The names of ``classes_``, where a store tells them.
    origin_ : TokenOrigin or None
        How the tokens of the store that the head was fitted on were made; None for arrays.
    reduction_ : Reduction or None
        What those tokens were read through.

    Examples
    --------
    >>> import numpy as np, convexhead as ch
    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(60, 9, 4)), np.arange(60) % 3
    >>> clf = ch.ConvexHeadClassifier(beta_ratio=0.3, random_state=0).fit(X, y)
    >>> clf.certificate_.converged
    True
    """

    def __init__(
        self,
        head: str = "self-attention",
        *,
        activation: str = "linear",
        beta: float | None = None,
        beta_ratio: float = 0.05,
        pool: str = "mean",
        grid: tuple[int, int] | None = None,
        n_gates: int | str = 50,
        gates: Any = None,
        n_blocks: int = 4,
        outputs: str = "shared",
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
        self.beta = beta
        self.beta_ratio = beta_ratio
        self.pool = pool
        self.grid = grid
        self.n_gates = n_gates
        self.gates = gates
        self.n_blocks = n_blocks
        self.outputs = outputs
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
        *,
        callback: Callable[[Progress], None] | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_minutes: float = 10.0,
    ) -> ConvexHeadClassifier:
        """Train to the certified optimum.

        Parameters
        ----------
        X : array, memmap, tensor or split of a TokenStore, (n, s, d) or (n, d)
            Tokens; 2-D input is one token a sample.
        y : array (n,) or None
            Class labels; None: the store's own.
        callback : callable (Progress) or None
            Called as the solver goes.
        checkpoint : path or None
            Folder that the state is written to; the same fit goes on from it exactly where it was written. It stays
            when the fit is over.
        checkpoint_minutes : float
            Between two checkpoints.

        Raises
        ------
        ValueError
            Anything about the input that cannot be used; the message says what to do.

        Warns
        -----
        ConvergenceWarning
            The requested gap was not reached; `certificate_` says how far the model may be from the optimum.
        """
        return self._train(X, y, callback, checkpoint, checkpoint_minutes)

    classes_ = View(lambda model: model.classes)
    class_names_ = View(lambda model: model.class_names, optional=True)

    def to_spec(self) -> Spec:
        """The parameters, checked; a class is that of the pooled tokens."""
        if self.pool not in ("mean", "cls"):
            raise InputError(f"pool must be 'mean' or 'cls' for a classifier, got {self.pool!r}")
        return super().to_spec()

    def read(self, X: Any, y: Any) -> Data:
        """The data of a fit, checked."""
        X = split_for(X, self.head, self.pool)
        y = labels_of(X, y)
        return self._named(read_labelled(self._checked(X, reset=True), y))

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Logits ``(n, c)``; for two classes their difference ``(n,)``, as scikit-learn has it."""
        f = self._outputs(X)[:, 0]
        return f[:, 1] - f[:, 0] if f.shape[1] == 2 else f

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Class probabilities ``(n, c)``."""
        return torch.softmax(torch.from_numpy(self._outputs(X)[:, 0]), -1).numpy()

    def predict(self, X: Any) -> NDArray[Any]:
        """Class labels ``(n,)``, numbered as in training whatever the store.

        Another store may number its classes otherwise. Compare these labels with ``labels_of(X)``, which numbers them
        as in training too, and not with the store's own ``X.labels``; `score` does so.
        """
        largest = self._outputs(X)[:, 0].argmax(1)
        return self.classes_[largest]

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Accuracy; ``y`` may be left out for a split of a store, whose classes are matched by name."""
        X, named = inputs.resolve_store(X), self._fitted().class_names is not None
        if inputs.is_store(X) and (y is None or (named and np.array_equal(y, X.labels))):
            y = self.labels_of(X)
        return super().score(X, labels_of(X, y), sample_weight)

    def labels_of(self, X: Any) -> NDArray[Any]:
        """The labels of a split of a store as this head numbers them; see `Model.labels_of`."""
        return self._fitted().labels_of(X)


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
        *,
        callback: Callable[[Progress], None] | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_minutes: float = 10.0,
    ) -> ConvexHeadRegressor:
        """Train to the certified optimum.

        Parameters
        ----------
        X : array, memmap, tensor or split of a TokenStore, (n, s, d) or (n, d)
        y : array (n,), (n, c), or (n, s, c) with ``pool=None``
            Targets.
        callback, checkpoint, checkpoint_minutes
            As for `ConvexHeadClassifier.fit`, and so is what it raises and warns of.
        """
        return self._train(X, y, callback, checkpoint, checkpoint_minutes)

    def read(self, X: Any, y: Any) -> Data:
        """The data of a fit, checked."""
        if y is None:
            raise InputError("This ConvexHeadRegressor estimator requires y to be passed, but the target y is None")
        tokens = self._checked(split_for(X, self.head, self.pool), reset=True)
        return self._named(read_measured(tokens, y, every_token=self.pool in (None, "none")))

    def predict(self, X: Any) -> NDArray[np.float64]:
        """Outputs in the shape of the targets that the head was fitted on."""
        f = self._outputs(X)
        return f.reshape(len(f), *self._fitted().target_shape)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R², averaged over outputs (and tokens)."""
        y = np.asarray(y)
        return float(r2_score(y.reshape(len(y), -1), self.predict(X).reshape(len(y), -1), sample_weight=sample_weight))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
