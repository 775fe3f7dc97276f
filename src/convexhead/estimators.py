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
from sklearn.base import ClassifierMixin

from convexhead import inputs
from convexhead.errors import InputError, choose
from convexhead.estimator_base import HeadEstimator, View
from convexhead.metrics import average_precision, mean_of_known
from convexhead.padding import Padded, as_padded, padded_like
from convexhead.program.losses import BinaryCrossEntropy, CrossEntropy
from convexhead.reading import Data, read_labelled, split_for, supervision
from convexhead.scores import accuracy
from convexhead.solvers.monitor import Progress
from convexhead.spec import Spec
from convexhead.targets import as_weights, is_multilabel, true_labels


class ConvexHeadClassifier(ClassifierMixin, HeadEstimator):
    """A token head trained with cross-entropy to a certified global optimum.

    Minimises ``(1/W) Σ_i w_i ℓ(f_i, y_i) + β Σ_j ‖Z_j‖_*``, ``f_i = P Σ_k mix(X_i, U_k) V_k + b``, the convex program
    equal to training ``Σ_k mix(X, U_k) V_k`` with weight decay ``(β/2)(‖U_k‖² + ‖V_k‖²)`` (Sahiner et al., ICML 2022).

    Parameters
    ----------
    head : {"self-attention", "attentive", "mlp-mixer", "fno", "block-fno", "mlp", "linear"}
        How tokens are mixed.
    activation : {"linear", "gated-relu", "relu"}
        With ``"gated-relu"`` the program is convex for the given gates, and the certificate is for them. ``"relu"``
        trains the true ReLU network; it is certified where a problem is small enough for a proof, else its
        certificate is an estimate and says so.
    loss : {"cross-entropy", "binary-cross-entropy"}
        One class a sample, or any number of them: labels, or an indicator matrix.
    beta : float or None
        ``β > 0``; where None, ``beta_ratio · beta_max_``.
    beta_ratio : float
        ``β/β_max``; at 1 the optimum is the zero model (not of the linear head, whose penalty is squared).
    pool : {"mean", "cls"} or None
        Which mixed tokens are read: their mean, or the first. Of a token store that is the backbone's class token,
        which is then token 0, in front of the patches. None: every token has an output and a label of its own.
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
    n_queries : int
        Queries of the attentive head to sample from the tokens, the mean token's included.
    queries : array (J, d) or (J, d + s), "search" or None
        Explicit queries; the last ``s`` columns are log-weights of places. ``"search"``: found for this β, each with a
        norm of its own; the certificate is an estimate then. None: sampled.
    query_scale : float
        ``κ`` of sampled queries: the standard deviation of their scores within a sample. Found ones have at most this.
    query_position : bool
        Whether sampled maps also depend on the place on the grid.
    key_dim : int or None
        Leading principal directions of the tokens that sampled queries lie in; None: all.
    query_norm : {"all", "each"}
        One nuclear norm over the weights of all queries, which share latent directions then, or one for each query.
    fit_intercept : bool
        Add an unpenalised ``b``.
    class_weight : dict, "balanced" or None
        Weights of labels, times those of the samples: scikit-learn's.
    label_smoothing : float
        ``a``: the targets are ``(1 − a) y + a/c``.
    pos_weight : float, list (c,) or None
        ``ω`` of the ones in an indicator matrix, ``ω y log(1 + exp −f) + (1 − y) log(1 + exp f)``.
    ignore_index : int
        The label of tokens that do not count, with ``pool=None``.
    solver : {"auto", "fista", "group-newton", "kernel", "column-generation", "ridge", "relu-exact", "relu-search"}
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
        Of sampled gates and queries and of random starts. The optimum does not depend on it, for given gates or
        queries.
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
        The weight used, and the smallest weight at which the optimum is zero (see `beta_max` for a ReLU).
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
    queries_ : ndarray (J, d) or (J, d + s), or None
        Of the attentive head, as ``queries`` takes them.
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
        loss: str = "cross-entropy",
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
    ) -> ConvexHeadClassifier:
        """Train to the certified optimum.

        Parameters
        ----------
        X : array, memmap, tensor or split of a TokenStore, (n, s, d) or (n, d); list of arrays (s_i, d)
            Tokens; 2-D input is one token a sample. Samples of a list may have different numbers of tokens.
        y : array (n,), (n, c), with ``pool=None`` (n, s), (n, s, c), or None
            Class labels; rows of probabilities; for binary cross-entropy indicators. None: the store's own labels.
        sample_weight : array (n,), a number, or None
            ``w``: 2 is the same as the sample twice, 0 as not there. With ``pool=None`` also ``(n, s)``, of tokens; for
            binary cross-entropy also of every entry of ``y``. The data term is the mean over what has a weight.
        mask : array (n, s) or None
            Which tokens there are, where samples of an array are padded to the same number of tokens.
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
        return self._train(as_padded(X, mask), y, sample_weight, callback, checkpoint, checkpoint_minutes)

    classes_ = View(lambda model: model.classes)
    class_names_ = View(lambda model: model.class_names, optional=True)

    def to_spec(self) -> Spec:
        """The parameters, checked."""
        choose("loss", self.loss, (CrossEntropy.name, BinaryCrossEntropy.name))
        spec = super().to_spec()
        if is_multilabel(spec) and (spec.label_smoothing or spec.class_weight is not None):
            raise InputError("label_smoothing and class_weight go with loss='cross-entropy': use pos_weight instead")
        if not is_multilabel(spec) and spec.pos_weight is not None:
            raise InputError("pos_weight goes with loss='binary-cross-entropy': use class_weight instead")
        return spec

    def read(self, X: Any, y: Any, sample_weight: Any = None, *, classes: NDArray[Any] | None = None) -> Data:
        """The data of a fit, checked; ``classes``: None for those that ``y`` names."""
        spec = self.to_spec()
        X = split_for(X, spec.head, spec.pool)
        y, sample_weight = supervision(X, y, sample_weight, spec)
        return self._named(read_labelled(self._checked(X, reset=True), y, spec, sample_weight, classes))

    def decision_function(self, X: Any, mask: Any = None) -> NDArray[np.float64]:
        """Logits ``(n, c)``, with ``pool=None`` ``(n, s, c)``; of two classes of samples their difference ``(n,)``."""
        f, spec = self._outputs(X, mask), self._fitted().spec
        if spec.pool is None:
            return f
        f = f[:, 0]
        return f[:, 1] - f[:, 0] if f.shape[1] == 2 and not is_multilabel(spec) else f

    def predict_proba(self, X: Any, mask: Any = None) -> NDArray[np.float64]:
        """Probabilities of classes ``(n, c)``, with ``pool=None`` ``(n, s, c)``; for several labels those of each."""
        return self._probabilities(self._outputs(X, mask))

    def _probabilities(self, f: NDArray[np.float64]) -> NDArray[np.float64]:
        logits, spec = torch.from_numpy(f), self._fitted().spec
        p = (logits.sigmoid() if is_multilabel(spec) else logits.softmax(-1)).numpy()
        return p if spec.pool is None else p[:, 0]

    def predict(self, X: Any, mask: Any = None) -> NDArray[Any]:
        """Class labels ``(n,)``, with ``pool=None`` ``(n, s)``, numbered as in training whatever the store.

        For several labels an indicator matrix ``(n, c)`` of those with a probability above one half.

        Another store may number its classes otherwise. Compare these labels with ``labels_of(X)``, which numbers them
        as in training too, and not with the store's own ``X.labels``; `score` does so.
        """
        return self._labels(self._outputs(X, mask))

    def _labels(self, f: NDArray[np.float64]) -> NDArray[Any]:
        spec = self._fitted().spec
        f = f if spec.pool is None else f[:, 0]
        return (f > 0).astype(np.int64) if is_multilabel(spec) else self.classes_[f.argmax(-1)]

    def score(self, X: Any, y: Any = None, sample_weight: Any = None, *, mask: Any = None) -> float:
        """Accuracy: of samples, or of the tokens that count; for several labels the share with all of them right.

        Of tokens with masks it is against their most frequent label; `convexhead.dense.pixel_scores` is of pixels.
        ``y`` may be left out for a split of a store, whose classes are matched by name.
        """
        return self._score(as_padded(inputs.resolve_store(X), mask), y, sample_weight, None)

    def _score(self, X: Any, y: Any, sample_weight: Any, f: NDArray[np.float64] | None) -> float:
        (y, sample_weight), model = self._to_compare(X, y, sample_weight), self._fitted()
        X = as_padded(inputs.resolve_store(X))
        if model.spec.pool is None and isinstance(X, Padded):
            y = padded_like(X.mask.numpy(), y, model.spec.ignore_index)
            sample_weight = X.weights(sample_weight)
        f = self._outputs(X) if f is None else f
        return accuracy(y, self._labels(f), model.spec, self.classes_, sample_weight)

    def validation_score(
        self, X: Any, y: Any = None, sample_weight: Any = None, *, outputs: NDArray[np.float64] | None = None
    ) -> float:
        """What β is chosen by on held-out samples: `score`, but of several labels the mean average precision.

        That all labels of a sample are right is rare where there are many, and then it tells heads apart badly.
        ``outputs (n, r, c)`` are those of the samples, where they are known.
        """
        if not is_multilabel(self._fitted().spec):
            return self._score(X, y, sample_weight, outputs)
        y, sample_weight = self._to_compare(X, y, sample_weight)
        p = self._probabilities(self._outputs(X) if outputs is None else outputs)
        y = true_labels(y, self.model_.spec, self.classes_, sample_weight)
        r = 1 if self.model_.spec.pool is not None else y.shape[1]
        w = as_weights(sample_weight, len(y), r, y.shape[-1], pooled=self.model_.spec.pool is not None)
        w = np.broadcast_to(w, (len(y), r, y.shape[-1])).reshape(-1, y.shape[-1])
        return mean_of_known(average_precision(p.reshape(w.shape), y.reshape(w.shape), w))

    def labels_of(self, X: Any) -> NDArray[Any]:
        """The labels of a split of a store as this head numbers them; see `Model.labels_of`."""
        return self._fitted().labels_of(X)
