"""scikit-learn estimators: heads trained to a certified global optimum.

Both estimators do the same thing for different targets: check the input, build a `Problem`, solve it, and
keep the weights with their certificate.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import assert_all_finite, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from convexhead import inputs
from convexhead.dual_norm.norm import NormOracle
from convexhead.errors import InputError, choose
from convexhead.linalg.deflation import spectral_norm
from convexhead.modules import HeadModule
from convexhead.program.activations import ACTIVATIONS, make_activation
from convexhead.program.atoms import Atoms
from convexhead.program.coordinates import Coordinates
from convexhead.program.heads import Head, make_head
from convexhead.program.intercept import solve_intercept
from convexhead.program.losses import Loss, make_loss
from convexhead.program.operator import Operator
from convexhead.program.patterns import all_gates, sample_patterns
from convexhead.program.problem import Problem
from convexhead.runtime.checkpoint import Checkpoint
from convexhead.runtime.content import content_hash, described
from convexhead.runtime.ranks import SOFTWARE, Ranks, join_ranks
from convexhead.runtime.samples import default_memory
from convexhead.runtime.stored_tokens import Tokens
from convexhead.runtime.surroundings import undisturbed
from convexhead.solvers import Progress, Solution, approach, solve

NOT_SETTINGS = ("max_time", "max_memory", "device", "distributed", "verbose")
"""Parameters that a checkpoint may be gone on from with other values of."""
SMALL_TOKENS = 2e5
"""Numbers of tokens up to which the solver works in float64 whatever the tolerance."""
TIGHT = 1e-4
"""Tolerance under which it always does."""


@dataclass
class Data:
    """Checked tokens and targets of a fit, all samples of them, and its loss.

    Attributes
    ----------
    y : array or Tensor
        What ``targets`` were made of.
    """

    tokens: Tokens
    targets: torch.Tensor
    loss: Loss
    y: NDArray[Any] | torch.Tensor

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What tells the data from others: in parts, so that a message can say which of them differs."""
        return {
            "shape of the tokens": str(tuple(self.tokens.shape)),
            "type of the tokens": str(self.tokens.dtype).removeprefix("torch."),
            "data (tokens)": inputs.tokens_hash(self.tokens),
            "shape of the targets": str(tuple(self.y.shape)),
            "data (targets)": f"sha256:{content_hash(self.y)}",
        }


class _ConvexHead(BaseEstimator):
    """What classifier and regressor share; see `ConvexHeadClassifier` for the parameters."""

    head: str
    activation: str
    beta: float | None
    beta_ratio: float
    pool: str | None
    grid: tuple[int, int] | None
    n_gates: int | str
    gates: Any
    n_blocks: int
    outputs: str
    fit_intercept: bool
    tol: float
    max_heads: int | None
    max_time: float | None
    max_memory: float | None
    random_state: Any
    device: str
    distributed: bool
    verbose: int

    # -- from parameters and data to a problem ------------------------------------------------------------------------
    def _check_parameters(self) -> None:
        choose("activation", self.activation, ACTIVATIONS)
        for name, optional in (
            ("beta", True), ("max_time", True), ("max_memory", True), ("beta_ratio", False), ("tol", False)
        ):  # fmt: skip
            value = getattr(self, name)
            if not ((_is_number(value) and 0 < value < math.inf) or (optional and value is None)):
                raise InputError(f"{name} must be a positive number{' or None' * optional}, got {value!r}")
        for name, others in (("n_gates", ("all",)), ("n_blocks", ()), ("max_heads", (None,))):
            value = getattr(self, name)
            whole = isinstance(value, numbers.Integral) and _is_number(value) and int(value) >= 1
            if not whole and not any(value is other or (isinstance(value, str) and value == other) for other in others):
                allowed = "".join(f" or {other!r}" for other in others)
                raise InputError(f"{name} must be a positive integer{allowed}, got {value!r}")
        for name in ("fit_intercept", "distributed"):
            value = getattr(self, name)
            if not isinstance(value, (bool, np.bool_)):
                raise InputError(f"{name} must be True or False, got {value!r}")
        if not isinstance(self.verbose, numbers.Integral) or self.verbose < 0:
            raise InputError(f"verbose must be a whole number from 0, got {self.verbose!r}")

    def _make_head(self, n_tokens: int, n_channels: int) -> Head:
        return make_head(
            self.head,
            n_tokens,
            n_channels,
            pool="none" if self.pool is None else self.pool,
            grid=self._store_grid if self.grid is None else self.grid,
            n_blocks=self.n_blocks,
            outputs=self.outputs,
        )

    def _make_gates(self, head: Head, X: Tokens, generator: torch.Generator) -> torch.Tensor | None:
        if self.activation != "gated-relu":
            return None
        if self.gates is None and self.n_gates == "all":
            return all_gates(head, X if isinstance(X, torch.Tensor) else X.read())
        if self.gates is None:
            return sample_patterns(head, X, int(self.n_gates), generator)
        return inputs.as_gates(self.gates)

    def _read(self, X: Any, y: Any) -> Data:
        """The data, checked: all that this process can do alone."""
        raise NotImplementedError

    def _agreed(self, X: Any, y: Any, **run: Any) -> Data:
        """The data, once all processes have the same data, the same settings and the same ``run``."""

        def read() -> Data:
            self._check_parameters()
            return self._read(X, y)

        def facts(data: Data) -> dict[str, Any]:
            device = inputs.pick_device(self.device).type
            return {**run, **SOFTWARE, "device": device, **self._settings(), **data.fingerprint}

        return self._ranks().agree(read, facts)

    @undisturbed()
    def _prepare(self, X: Any, y: Any, *, to_solve: bool = False, **run: Any) -> tuple[Problem, torch.Generator]:
        """The problem of these data, the same in all processes, and a generator that its seed is in.

        Parameters
        ----------
        to_solve : bool
            In the coordinates that serve a solver best; else as it is stated.
        **run
            What else the processes must agree on, as JSON values.
        """
        return self._pose(self._agreed(X, y, **run), self._seed(), to_solve)

    def _pose(self, data: Data, seed: int, to_solve: bool) -> tuple[Problem, torch.Generator]:
        generator = torch.Generator().manual_seed(seed)
        return self._make_problem(data.tokens, data.targets, data.loss, generator, to_solve), generator

    def _settings(self) -> dict[str, Any]:
        """What determines the iterates besides the data, as JSON values."""
        settings = self.get_params(deep=False).items()
        return {name: described(value) for name, value in settings if name not in NOT_SETTINGS}

    def _make_problem(
        self, X: Tokens, Y: torch.Tensor, loss: Loss, generator: torch.Generator, to_solve: bool
    ) -> Problem:
        ranks, device = self._ranks(), inputs.pick_device(self.device)
        head = self._make_head(X.shape[1], X.shape[2])
        gates = self._make_gates(head, X, generator)
        if self.activation == "relu" and ranks.size > 1:
            raise InputError("activation='relu' is solved in one process: start it without torchrun")
        activation, coordinates = make_activation(self.activation, head, gates), Coordinates()
        if to_solve:
            coordinates = Coordinates.of(X, Y, head, activation, loss, bool(self.fit_intercept))
        rows = ranks.share(len(X))
        problem = Problem(
            Operator(
                X[rows] if isinstance(X, torch.Tensor) else X.share(rows),
                head,
                activation,
                dtype=torch.float64 if math.prod(X.shape) <= SMALL_TOKENS or self.tol < TIGHT else torch.float32,
                reuse=not coordinates,
                device=device,
                memory=default_memory(device) if self.max_memory is None else float(self.max_memory),
                ranks=ranks,
            ),
            Y[rows],
            loss,
            fit_intercept=bool(self.fit_intercept),
        )
        return problem.in_coordinates(coordinates)

    def _ranks(self) -> Ranks:
        """The processes that share the samples."""
        return join_ranks() if self.distributed else Ranks()

    def _seed(self) -> int:
        """Of gates and random starts, the same in all processes."""
        try:
            return self._ranks().first_does(lambda: int(check_random_state(self.random_state).randint(2**31 - 1)))
        except ValueError as error:
            raise InputError(
                "random_state must be None, a whole number below 2**32 or a numpy RandomState, "
                f"got {self.random_state!r}"
            ) from error

    def _checkpoint(self, folder: str | Path | None, minutes: float, data: Data) -> Checkpoint | None:
        """The checkpoint of this fit; None without a folder."""
        if folder is None:
            return None
        settings = {**self._settings(), **data.fingerprint}
        return Checkpoint(folder, settings, minutes=minutes, ranks=self._ranks())

    # -- fitting ------------------------------------------------------------------------------------------------------
    @undisturbed()
    def _fit(
        self, X: Any, y: Any, callback: Callable[[Progress], None] | None, checkpoint: str | Path | None, minutes: float
    ) -> None:
        if checkpoint is not None and self.activation == "relu":
            raise InputError("activation='relu' has no checkpoints: leave checkpoint out")
        with self._ranks().all_or_none():
            data = self._agreed(X, y, run="fit", checkpoint=None if checkpoint is None else str(checkpoint))
            saved = self._checkpoint(checkpoint, minutes, data)
            if saved is None:
                problem, generator = self._pose(data, self._seed(), True)
                self._solve(problem, generator, callback=callback)
                return
            seed = saved.notes.setdefault("seed", self._seed())
            problem, generator = self._pose(data, seed, True)
            if "beta_max" not in saved.notes:
                saved.notes["beta_max"] = problem_beta_max(problem, generator)
            self._solve(problem, generator, beta_max=saved.notes["beta_max"], callback=callback, checkpoint=saved)

    # -- solving ------------------------------------------------------------------------------------------------------
    @undisturbed()
    def _solve(
        self,
        problem: Problem,
        generator: torch.Generator,
        *,
        beta_max: float | None = None,
        start: Atoms | None = None,
        callback: Callable[[Progress], None] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Solution:
        """Solve at this estimator's β and keep everything that a user may read."""
        limits = self._limits(problem, generator, beta_max, start, callback)
        beta = problem.coordinates.beta(self.beta_)
        solution = solve(problem, beta, tol=float(self.tol), checkpoint=checkpoint, **limits)
        self._keep(problem.head, problem.activation, problem.leave(solution.atoms))
        self.certificate_ = solution.certificate
        self.history_ = [row.to_dict() for row in solution.history]
        self.stop_reason_ = solution.stop.value
        if not solution.certificate.converged:
            certificate = solution.certificate
            told = f"certified relative gap {certificate.relative_gap:.2g} > tol={self.tol:g}"
            if certificate.scope == "estimated":
                told = f"estimated relative gap {certificate.estimated_gap:.2g}, tol={self.tol:g}"
            warnings.warn(
                f"{told}: {solution.stop.value}",
                ConvergenceWarning,
                stacklevel=3,
            )
        return solution

    @undisturbed()
    def _approach(
        self,
        problem: Problem,
        generator: torch.Generator,
        tol: float,
        *,
        beta_max: float,
        start: Atoms | None,
        callback: Callable[[Progress], None] | None,
    ) -> None:
        """Keep weights to be scored: a gap of about ``tol``, but no certificate."""
        limits = self._limits(problem, generator, beta_max, start, callback)
        atoms, history = approach(problem, problem.coordinates.beta(self.beta_), tol=tol, **limits)
        self._keep(problem.head, problem.activation, problem.leave(atoms))
        self.history_ = [row.to_dict() for row in history]

    def _limits(
        self,
        problem: Problem,
        generator: torch.Generator,
        beta_max: float | None,
        start: Atoms | None,
        callback: Callable[[Progress], None] | None,
    ) -> dict[str, Any]:
        """Decides β; what a solver is told besides it and the tolerance."""
        self.beta_max_ = problem_beta_max(problem, generator) if beta_max is None else beta_max
        self.beta_ = float(self.beta) if self.beta is not None else float(self.beta_ratio) * self.beta_max_
        # Targets or features without signal have beta_max 0 and the zero model at any weight.
        self.beta_ = self.beta_ or problem.coordinates.user_beta(1.0)
        return {
            "start": None if start is None else problem.enter(start),
            "max_heads": None if self.max_heads is None else int(self.max_heads),
            "max_time": None if self.max_time is None else float(self.max_time),
            "callback": callback or (_print_progress if self.verbose and problem.ranks.rank == 0 else None),
            "generator": generator,
        }

    def _keep(self, head: Head, activation: Any, atoms: Atoms) -> None:
        """Fitted attributes from atoms."""
        atoms = atoms.to("cpu", torch.float64)
        self.n_tokens_, self.n_features_in_ = head.s, head.d
        self.n_outputs_ = atoms.V.shape[2]
        self.grid_ = head.grid
        self.intercept_ = atoms.intercept.numpy()
        gates = getattr(activation, "gates", None)
        self.gates_ = None if gates is None else gates.cpu().numpy()
        self.n_heads_ = len(atoms)
        if not head.learns_mixing:
            self.coef_ = atoms.V[0].numpy()
            self.singular_values_ = [np.linalg.svd(self.coef_, compute_uv=False)]
            return
        mask = head.output_mask(self.n_outputs_)
        self.mixing_, self.values_, self.singular_values_ = [], [], []
        for j in range(activation.n_blocks):
            mine = atoms.select(atoms.block == j)
            V = mine.V if mask is None else mine.V[:, :, mask[j % head.n_groups]]
            self.mixing_.append(mine.U.numpy())
            self.values_.append(V.numpy())
            self.singular_values_.append(mine.U.flatten(1).square().sum(1).numpy())

    def _atoms(self) -> Atoms:
        """The fitted weights as atoms; inverse of `_keep`."""
        intercept = torch.from_numpy(self.intercept_)
        if hasattr(self, "coef_"):
            return Atoms(
                torch.ones(1, dtype=torch.float64),
                torch.from_numpy(self.coef_)[None],
                torch.zeros(1, dtype=torch.int64),
                intercept,
            )
        return atoms_from_blocks(self._fitted_head(), self.mixing_, self.values_, self.n_outputs_, intercept)

    def _fitted_head(self) -> Head:
        return make_head(
            self.head,
            self.n_tokens_,
            self.n_features_in_,
            pool="none" if self.pool is None else self.pool,
            grid=self.grid_,
            n_blocks=int(self.n_blocks),
            outputs=self.outputs,
        )

    # -- using --------------------------------------------------------------------------------------------------------
    @undisturbed()
    def _outputs(self, X: Any) -> NDArray[np.float64]:
        """``f (n, r, c)`` in float64."""
        check_is_fitted(self)
        X = self.as_fitted_on(X)
        X = self._check_features(X)
        head, atoms = self._fitted_head(), self._atoms()
        gates = None if self.gates_ is None else torch.from_numpy(self.gates_)
        activation = make_activation(self.activation, head, gates)
        # What was fitted on a GPU may be used where there is none.
        device = inputs.pick_device(self.device if torch.cuda.is_available() else "cpu")
        atoms, parts = atoms.to(device, torch.float64), []
        for chunk in inputs.token_chunks(X, n_channels=self.n_features_in_, n_tokens=self.n_tokens_):
            operator = Operator(chunk, head, activation, device=device, reuse=False)
            parts.append(operator.outputs(atoms).cpu().numpy())
        return np.concatenate(parts)

    def as_fitted_on(self, X: Any) -> Any:
        """Tokens as this head takes them: of a split of a store the view that it must read, all else unchanged.

        A head reads another store's tokens as they were stored, through the reduction that it was fitted behind, and
        the labels by the names of its own classes.

        Raises
        ------
        InputError
            The store's tokens are made otherwise than those that the head was fitted on.

        Warns
        -----
        UserWarning
            The head was fitted on arrays, or by an early version: nothing tells how its tokens were made.
        """
        X = inputs.resolve_store(X)
        if not hasattr(X, "read_as"):
            return X
        if self.origin_ is not None:
            return X.read_as(self.origin_)
        known = "this head was fitted on arrays, which do not say how their tokens were made"
        if self.reduction_ is not None:
            known = "this head was saved by an earlier version, which did not keep how its tokens were made"
            if X.reduction is None or X.reduction.identity != self.reduction_.identity:
                raise InputError(
                    f"{known}, and the reduction that it was fitted behind is not that of {X!r}: fit it again"
                )
        warnings.warn(
            f"{known}: that {X!r} holds such tokens is taken on trust, and its classes are matched by number",
            UserWarning,
            stacklevel=4,
        )
        return X

    def as_trained_on(self, X: Any) -> Any:
        """As `as_fitted_on`, and refuses a split of a store that does not hold the images of the training.

        A head that was trained on some images of the split gets a view of those.
        """
        X = inputs.resolve_store(X)
        if self.origin_ is not None and hasattr(X, "read_to_audit"):
            return X.read_to_audit(self.origin_)
        return self.as_fitted_on(X)

    def _check_features(self, X: Any) -> Any:
        """scikit-learn's checks (names, counts) for 2-D input; others are checked as tokens."""
        X = inputs.plain(inputs.resolve_store(X), "X")
        if inputs.is_table(X):
            with inputs.told_plainly():
                return validate_data(self, X, reset=False, dtype=(np.float64, np.float32))
        return X

    def _fit_tokens(self, X: Any) -> Tokens:
        X = inputs.plain(X, "X")
        if inputs.is_table(X):
            with inputs.told_plainly():
                X = validate_data(self, X, dtype=(np.float64, np.float32), ensure_min_samples=2)
        self.reduction_ = getattr(X, "reduction", None) if inputs.is_store(X) else None
        self.origin_ = X.origin() if hasattr(X, "origin") else None
        self._store_grid = X.grid if inputs.is_store(X) else None
        tokens = inputs.open_tokens(X)
        inputs.check_informative(tokens)
        return tokens

    @undisturbed()
    def to_module(self, dtype: torch.dtype = torch.float32, *, raw_tokens: bool = False) -> HeadModule:
        """The fitted head as an ordinary `torch.nn.Module`: tokens ``(b, s, d)`` -> outputs ``(b, c)``.

        Parameters
        ----------
        dtype : torch.dtype
            Of its weights.
        raw_tokens : bool
            Put the reduction of the token store that the head was fitted on in front, so that the module takes the
            backbone's tokens as they were stored.

        Raises
        ------
        InputError
            ``raw_tokens`` for a head that was not fitted on a store with a reduction.
        """
        check_is_fitted(self)
        reduction = getattr(self, "reduction_", None)
        if raw_tokens and reduction is None:
            raise InputError("this head was fitted on plain tokens, there is no reduction to put in front of it")
        gates = None if self.gates_ is None else torch.from_numpy(self.gates_)
        return HeadModule.from_atoms(
            self._fitted_head(),
            self.activation,
            gates,
            self._atoms(),
            intercept=bool(self.fit_intercept),
            reduction=reduction if raw_tokens else None,
            dtype=dtype,
        )

    @undisturbed()
    def save(self, path: str | Path) -> None:
        """Write a folder ``config.json`` + ``weights.safetensors``; read it back with `convexhead.load`."""
        from convexhead.persistence import save

        save(self, path)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "n_heads_")


class ConvexHeadClassifier(ClassifierMixin, _ConvexHead):
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
        Which tokens are read: their mean, or token 0.
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
    tol : float
        Certified relative gap to reach.
    max_heads : int or None
        Bound on the number of heads; the certificate then says what it costs.
    max_time : float or None
        Seconds; the best model so far is returned with its honest gap.
    max_memory : float or None
        Bytes that tokens and what is made of them may take; tokens beyond, of a store or memmap, are read again in
        each pass. None: half of what is free.
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
    certificate_ : Certificate
        How far from the global optimum the model is, at most.
    beta_, beta_max_ : float
        The weight used, and the smallest weight at which the optimum is zero.
    n_heads_ : int
        Heads found: the rank of the solution over all blocks.
    singular_values_ : list of ndarray
        Of each block's ``Z_j``, falling; for a ReLU ``‖U_k‖‖V_k‖`` of its heads.
    mixing_, values_ : lists of ndarray
        For each block ``(k, *mixing_shape)`` and ``(k, e, c)``: ``f = Σ mix(X, U_k) V_k``. The linear head has
        ``coef_ (d, c)`` instead.
    intercept_ : ndarray (c,)
    gates_ : ndarray or None
    classes_ : ndarray (c,)
    history_ : list of dict
        ``seconds``, ``objective``, ``gap`` (the solver's estimate), ``heads``.
    n_features_in_, n_tokens_ : int
        ``d`` and ``s``.
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
        self._fit(X, y, callback, checkpoint, checkpoint_minutes)
        return self

    def _read(self, X: Any, y: Any) -> Data:
        X = inputs.resolve_store(X)
        y = _labels_of(X, y)
        tokens = self._fit_tokens(X)
        if self.origin_ is not None and not np.array_equal(y, X.labels):
            self.origin_ = self.origin_.without_class_names()
        inputs.check_lengths(tokens, len(y))
        self.classes_, indices = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(
                f"only one class is present ({self.classes_[0]!r}): a classifier needs at least two classes"
            )
        if self.pool not in ("mean", "cls"):
            raise InputError(f"pool must be 'mean' or 'cls' for a classifier, got {self.pool!r}")
        return Data(tokens, inputs.one_hot(indices, len(self.classes_)), make_loss("cross-entropy"), y)

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Logits ``(n, c)``; for two classes their difference ``(n,)``, as scikit-learn has it."""
        f = self._outputs(X)[:, 0]
        return f[:, 1] - f[:, 0] if f.shape[1] == 2 else f

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Class probabilities ``(n, c)``."""
        return torch.softmax(torch.from_numpy(self._outputs(X)[:, 0]), -1).numpy()

    def predict(self, X: Any) -> NDArray[Any]:
        """Class labels ``(n,)``, numbered as in training whatever the store: see ``class_names_``."""
        f = self._outputs(X)[:, 0]
        return self.classes_[f.argmax(1)]

    @property
    def class_names_(self) -> list[str] | None:
        """The names of ``classes_``, of a head that was fitted on a store with the store's labels; else None."""
        if self.origin_ is None or self.origin_.class_names is None:
            return None
        return [self.origin_.class_names[int(label)] for label in self.classes_]

    def _score_fitted(self, problem: Problem) -> float:
        """Accuracy on the tokens of ``problem``."""
        f = problem.outputs(problem.enter(self._atoms()).to(problem.device, problem.dtype))
        return problem.mean((f.argmax(-1) == problem.Y.argmax(-1)).double().mean(1))

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Accuracy; ``y`` may be left out for a split of a store, whose classes are matched by name."""
        check_is_fitted(self)
        X = inputs.resolve_store(X)
        named = self.class_names_ is not None
        if inputs.is_store(X) and (y is None or (named and np.array_equal(y, X.labels))):
            y = self.labels_of(X)
        return super().score(X, _labels_of(X, y), sample_weight)

    def labels_of(self, X: Any) -> NDArray[Any]:
        """The labels of a split of a store as this head numbers them.

        Raises
        ------
        InputError
            The head's own labels were not a store's, or it was not trained on a class of this one.
        """
        X = self.as_fitted_on(X)
        if self.origin_ is not None and self.origin_.class_names is None:
            raise InputError("this head was fitted with labels of the user's own: pass such labels as y")
        return np.asarray(X.labels)


class ConvexHeadRegressor(RegressorMixin, _ConvexHead):
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
            Anything about the input that cannot be used.

        Warns
        -----
        ConvergenceWarning
            The requested gap was not reached.
        """
        self._fit(X, y, callback, checkpoint, checkpoint_minutes)
        return self

    def _read(self, X: Any, y: Any) -> Data:
        if y is None:
            raise InputError("This ConvexHeadRegressor estimator requires y to be passed, but the target y is None")
        X = inputs.resolve_store(X)
        tokens = self._fit_tokens(X)
        every_token = self.pool is None or self.pool == "none"
        targets = inputs.as_targets(y, n_tokens=tokens.shape[1], every_token=every_token)
        inputs.check_lengths(tokens, len(targets))
        self._target_shape = tuple(np.shape(inputs.plain(y, "y"))[1:])
        return Data(tokens, targets, make_loss(self.loss), targets)

    def predict(self, X: Any) -> NDArray[np.float64]:
        """Outputs in the shape of the targets that the head was fitted on."""
        f = self._outputs(X)
        return f.reshape(len(f), *self._target_shape)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _score_fitted(self, problem: Problem) -> float:
        """R² on the tokens of ``problem``."""
        from sklearn.metrics import r2_score

        f = problem.outputs(problem.enter(self._atoms()).to(problem.device, problem.dtype))
        both = torch.zeros(2, problem.n, f[0].numel(), dtype=f.dtype, device=f.device)
        both[:, problem.ranks.share(problem.n)] = torch.stack([problem.Y, f]).flatten(2)
        Y, f = problem.sum(both)[0].cpu()
        return float(r2_score(Y, f))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R², averaged over outputs (and tokens)."""
        from sklearn.metrics import r2_score

        y = np.asarray(y)
        return float(r2_score(y.reshape(len(y), -1), self.predict(X).reshape(len(y), -1), sample_weight=sample_weight))


def _labels_of(X: Any, y: Any) -> NDArray[Any]:
    if y is None:
        if not inputs.is_store(X):
            raise InputError("This estimator requires y to be passed, but the target y is None")
        return np.asarray(X.labels)
    with inputs.told_plainly():
        y = column_or_1d(inputs.plain(y, "y"), warn=True)
        if y.dtype == object and len({type(label) for label in y.tolist()}) > 1:
            raise InputError("y mixes labels of several types, or lacks some: give every sample a string, or a number")
        assert_all_finite(y, input_name="y")
        check_classification_targets(y)
    return y


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a real number; True and False are not meant as one."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, (bool, np.complexfloating))


def _print_progress(row: Progress) -> None:
    print(
        f"{row.seconds:8.2f} s  objective {row.objective:.6g}  gap {row.gap:.2g}  heads {row.heads}",
        flush=True,
    )


def atoms_from_blocks(
    head: Head,
    mixing: list[NDArray[Any]],
    values: list[NDArray[Any]],
    n_outputs: int,
    intercept: torch.Tensor,
) -> Atoms:
    """Atoms from the public form: for each block ``(k, *mixing_shape)`` and ``(k, e, c or c/B)``."""
    mask = head.output_mask(n_outputs)
    U, V, block = [], [], []
    for j, pair in enumerate(zip(mixing, values, strict=True)):
        u, v = (torch.as_tensor(np.asarray(w), dtype=torch.float64) for w in pair)
        full = v
        if mask is not None:
            full = v.new_zeros(len(v), head.value_rows, n_outputs)
            full[:, :, mask[j % head.n_groups]] = v
        U.append(u.reshape(-1, *head.mixing_shape))
        V.append(full)
        block.append(torch.full((len(u),), j))
    return Atoms(torch.cat(U), torch.cat(V), torch.cat(block), intercept)


def problem_beta_max(problem: Problem, generator: torch.Generator) -> float:
    """``β_max = max_j ‖𝒜_j*(R at Z = 0)‖₂``: the smallest weight at which the optimum is zero.

    For a ReLU it is the dual norm ``h(R)``, or the largest value that a search finds where there is no tight bound.
    """
    exact = problem.astype(torch.float64)
    f = exact.outputs(exact.empty())
    if exact.fit_intercept:
        f = f + solve_intercept(exact, f)
    R = exact.residual(f)
    if problem.activation.convex:
        largest = spectral_norm(exact.operator, R, generator, fast=problem.operator)
    else:
        oracle = NormOracle(exact)
        maxima = oracle.search(R, generator=generator)
        largest = oracle.bound(R, maxima).upper if oracle.tight else float(maxima.values[:1].sum())
    return problem.coordinates.user_beta_max(largest)
