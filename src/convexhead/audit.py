"""Audit: how far from the global optimum are weights that anyone trained?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import NotFittedError

from convexhead import inputs
from convexhead.certificate.certificate import Certificate
from convexhead.certificate.certify import certify_atoms
from convexhead.errors import InputError
from convexhead.estimator_base import HeadEstimator
from convexhead.model import Model
from convexhead.modules import HeadModule
from convexhead.program.activations import make_activation
from convexhead.program.atoms import Atoms
from convexhead.program.blocks import atoms_from_blocks
from convexhead.program.coordinates import Coordinates
from convexhead.program.heads import Head
from convexhead.program.losses import Loss, make_loss
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.reading import labels_of, split_for, targets_of
from convexhead.runtime.samples import default_memory
from convexhead.runtime.stored_tokens import Tokens
from convexhead.runtime.surroundings import undisturbed
from convexhead.spec import Spec

OF_REFERENCE = "that of the reference"
"""First words of ``bound`` in a certificate whose dual value comes from a reference."""


@undisturbed()
def certify(
    weights: HeadModule | HeadEstimator | Model | tuple[Sequence[Any], Sequence[Any]],
    X: Any,
    y: Any = None,
    *,
    beta: float,
    head: str = "self-attention",
    activation: str = "linear",
    pool: str | None = "mean",
    grid: tuple[int, int] | None = None,
    gates: Any = None,
    n_blocks: int = 4,
    outputs: str = "shared",
    intercept: Any = None,
    loss: str | Loss | None = None,
    tol: float = 1e-3,
    lower_bound: Certificate | None = None,
    device: str = "auto",
    random_state: int | None = None,
) -> Certificate:
    """Certificate of a trained head for the convex program at weight ``beta`` on the data it was trained on.

    The gap is rigorous but rests on the dual point that the weights themselves give, which is poor for weights far
    from optimal. With a ``lower_bound`` from a fit of the same problem it is the true distance, up to that fit's gap.

    What the problem is is never guessed from the weights' values: a module has an intercept if it has that parameter,
    an estimator if it was fitted with one, factors if ``intercept`` is given, be it zero or not.

    Parameters
    ----------
    weights : HeadModule, fitted estimator, Model, or (mixing, values)
        Factors are lists with one entry a block, ``(k, *mixing_shape)`` and ``(k, e, c)`` as in ``mixing_`` and
        ``values_``, or for a head of one block the two arrays themselves. The linear head: ``(None, coef)``. They
        need not be balanced: the certificate is for the products, whose penalty is never more than the factors'.
    X, y
        The training data, as for `ConvexHeadClassifier.fit` (labels) or `ConvexHeadRegressor.fit` (float targets with
        ``loss`` other than cross-entropy). Labels are matched by name with an estimator's ``classes_``; the outputs of
        modules and factors are those of the sorted labels.
    beta : float
        ``β`` of the objective. For weights trained with weight decay ``λ`` in the loss ``(λ/2)‖θ‖²``, ``β = λ``.
    head, activation, pool, grid, gates, n_blocks, outputs, intercept
        What the factors are of; a module or an estimator knows. ``intercept (c,)``: the bias that was trained with
        them, None where there was none.
    loss : str, Loss or None
        None: cross-entropy, or the regressor's own.
    tol : float
        Relative gap for ``converged``.
    lower_bound : Certificate or None
        Of the same problem at the same β, as ``certificate_`` of a fit: its ``dual`` bounds the optimum from below. A
        plain number is refused, since nothing says which problem it is of.

    Raises
    ------
    InputError
        Shapes, labels or options that do not fit together; a lower bound of another problem, with what differs.
    """
    spec = Spec(
        head=head, activation=activation, loss=loss or "cross-entropy", beta=beta, pool=pool, grid=grid,
        n_blocks=n_blocks, outputs=outputs, tol=tol, device=device,
    )  # fmt: skip
    _check_reference(beta, lower_bound)
    model = as_model(weights)
    if model is not None:
        X, y = _images_of_training(model, inputs.plain(inputs.resolve_store(X), "X"), y)
    else:
        X = inputs.plain(split_for(X, *_head_and_pool(weights, spec)), "X")
    tokens = inputs.open_tokens(X)
    audited = _understood(weights if model is None else model, spec, tokens.shape[1:], gates, intercept)
    problem = audited.problem(tokens, X, y, make_loss(loss or audited.loss), inputs.pick_device(device))
    if lower_bound is not None:
        lower_bound.check_is_of(problem.identity, float(beta))
    return certify_atoms(
        problem,
        problem.enter(audited.atoms.to(problem.device, torch.float64)),
        problem.coordinates.beta(float(beta)),
        tol=spec.tol,
        known_dual=-math.inf if lower_bound is None else lower_bound.dual,
        known_failure=0.0 if lower_bound is None else lower_bound.failure_probability,
        known_from="" if lower_bound is None else f"{OF_REFERENCE}: {lower_bound.bound}",
        generator=None if random_state is None else torch.Generator().manual_seed(random_state),
    )


def _check_reference(beta: Any, lower_bound: Any) -> None:
    if beta is None:
        raise InputError("beta must be a positive number, got None: an audit is at the weight of the training")
    if lower_bound is not None and not isinstance(lower_bound, Certificate):
        raise InputError(
            f"lower_bound must be a Certificate, got {type(lower_bound).__name__}: a number does not say which problem "
            "it bounds; pass certificate_ of a fit of the same problem"
        )


def as_model(weights: Any) -> Model | None:
    """The `Model` of a fitted estimator, or the model itself; None for anything else.

    Raises
    ------
    NotFittedError
        An estimator that is not fitted.
    """
    if isinstance(weights, HeadEstimator):
        if not hasattr(weights, "model_"):
            raise NotFittedError("this estimator is not fitted yet: call fit before certify")
        return weights.model_
    return weights if isinstance(weights, Model) else None


def _head_and_pool(weights: Any, spec: Spec) -> tuple[str, str | None]:
    return (weights.head.name, weights.head.pool) if isinstance(weights, HeadModule) else (spec.head, spec.pool)


def _images_of_training(model: Model, X: Any, y: Any) -> tuple[Any, Any]:
    """The images that the model was trained on, and their targets."""
    whole, X = X, model.as_trained_on(X)
    if y is not None and len(X) < len(whole) == len(y):  # trained on some of the split
        y = np.asarray(y)[X.rows]
    return X, y


@dataclass(frozen=True, eq=False)
class _Audited:
    """Weights and what they are of; ``classes`` are the labels of the outputs, None: the sorted labels."""

    head: Head
    activation: str
    gates: torch.Tensor | None
    atoms: Atoms
    fit_intercept: bool
    loss: str | Loss = "cross-entropy"
    classes: NDArray[Any] | None = None

    def problem(self, tokens: Tokens, X: Any, y: Any, loss: Loss, device: torch.device) -> Problem:
        """The problem that they were trained for, in the coordinates that serve its certificate best."""
        if tokens.shape[1:] != (self.head.s, self.head.d):
            raise InputError(
                f"tokens are {tuple(tokens.shape[1:])} a sample, but these weights are for {(self.head.s, self.head.d)}"
            )
        if not all(bool(torch.isfinite(part).all()) for part in (self.atoms.U, self.atoms.V, self.atoms.intercept)):
            raise InputError("the weights contain NaN or infinity: the training they come from diverged")
        targets = _targets(loss, X, y, self.head, self.atoms.V.shape[2], self.classes)
        inputs.check_lengths(tokens, len(targets))
        activation = make_activation(self.activation, self.head, self.gates)
        memory = default_memory(device)
        operator = Operator(tokens, self.head, activation, reuse=False, device=device, memory=memory)
        problem = Problem(operator, targets, loss, fit_intercept=self.fit_intercept)
        return problem.in_coordinates(Coordinates.of(tokens, targets, self.head, activation, loss, self.fit_intercept))


def _understood(weights: Any, spec: Spec, shape: tuple[int, ...], gates: Any, intercept: Any) -> _Audited:
    """The weights, in whichever form they come; ``shape`` is that of the tokens of a sample."""
    if not isinstance(weights, (Model, HeadModule)):
        return _of_factors(weights, spec.make_head(*shape), spec.activation, gates, intercept)
    if gates is not None or intercept is not None:
        raise InputError("gates and intercept go with factors: a module or an estimator has its own")
    if isinstance(weights, Model):
        of = weights.spec
        return _Audited(
            weights.head, of.activation, weights.gates, weights.atoms, of.fit_intercept, of.loss, weights.classes
        )
    if weights.reduction is not None:
        raise InputError(
            "this module takes raw tokens: audit one without the reduction (to_module() without raw_tokens) on the "
            "reduced tokens that it was trained on"
        )
    has_intercept = weights.intercept is not None
    return _Audited(weights.head, weights.activation_name, weights.gates, weights.to_atoms(), has_intercept)


def _numbers(values: Any, what: str) -> torch.Tensor:
    """Weights that a user passes, as float64 on the CPU."""
    if isinstance(values, torch.Tensor) and not values.is_complex():
        return values.detach().cpu().double()
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} cannot be read as an array of numbers: {error}") from error
    if array.dtype.kind not in "buif":
        raise InputError(f"{what} must be real numbers, got an array of {array.dtype}")
    return torch.as_tensor(array.astype(np.float64))


def _intercept(values: Any, n_outputs: int) -> torch.Tensor:
    """``b (c,)``; zeros where none was trained."""
    if values is None:
        return torch.zeros(n_outputs, dtype=torch.float64)
    b = _numbers(values, "the intercept")
    if b.shape != (n_outputs,):
        raise InputError(f"the intercept has shape {tuple(b.shape)}, {n_outputs} outputs need ({n_outputs},)")
    return b


def _of_factors(factors: Any, head: Head, activation: str, gates: Any, intercept: Any) -> _Audited:
    if not isinstance(factors, (tuple, list)) or len(factors) != 2:
        raise InputError("weights must be a HeadModule, a fitted estimator, or a pair (mixing, values)")
    if activation == "gated-relu" and gates is None:
        raise InputError("activation='gated-relu' needs the gates that the weights were trained with: pass gates=")
    if activation != "gated-relu" and gates is not None:
        raise InputError(f"gates go with activation='gated-relu', and not with {activation!r}")
    if gates is not None:
        gates = _numbers(gates, "gates")
        make_activation(activation, head, gates)  # checks their shape
    mixing, values = factors
    if head.learns_mixing:
        atoms = _mixing_atoms(head, mixing, values, 1 if gates is None else len(gates), intercept)
    else:
        atoms = _linear_atoms(head, mixing, values, intercept)
    return _Audited(head, activation, gates, atoms, intercept is not None)


def _linear_atoms(head: Head, mixing: Any, values: Any, intercept: Any) -> Atoms:
    if mixing is not None:
        raise InputError("the linear head has no mixing weights: pass (None, coef)")
    coef = _numbers(values, "coef")
    if coef.shape[:1] != (head.d,) or coef.ndim != 2:
        raise InputError(f"the linear head's coef must be (d, c) = ({head.d}, c), got {tuple(coef.shape)}")
    b = _intercept(intercept, coef.shape[1])
    return Atoms(torch.ones(1).double(), coef[None], torch.zeros(1, dtype=torch.int64), b)


def _mixing_atoms(head: Head, mixing: Any, values: Any, n_gates: int, intercept: Any) -> Atoms:
    count = head.n_groups * n_gates
    if count == 1 and not isinstance(mixing, (list, tuple)):
        mixing, values = [mixing], [values]
    if not all(isinstance(part, (list, tuple)) for part in (mixing, values)):
        raise InputError(f"this head has {count} blocks: pass a list of mixing and a list of values weights")
    mixing, values = ([_numbers(w, "weights").numpy() for w in part] for part in (mixing, values))
    if len(mixing) != count or len(values) != count:
        raise InputError(
            f"this head has {count} blocks, got {len(mixing)} of mixing and {len(values)} of values weights"
        )
    columns = {v.shape[2] for v in values if v.ndim == 3}
    shape = ", ".join(map(str, head.mixing_shape))
    for u, v in zip(mixing, values, strict=True):
        if u.shape[1:] != head.mixing_shape or v.ndim != 3 or v.shape[1] != head.value_rows or len(u) != len(v):
            raise InputError(
                f"a block has mixing {u.shape} and values {v.shape}, needed are (k, {shape}) "
                f"and (k, {head.value_rows}, c)"
            )
    if len(columns) != 1:
        raise InputError(f"blocks disagree on the number of outputs: {sorted(columns)}")
    n_outputs = columns.pop() * (head.n_groups if getattr(head, "outputs", "shared") == "grouped" else 1)
    return atoms_from_blocks(head, mixing, values, n_outputs, _intercept(intercept, n_outputs))


def _targets(loss: Loss, X: Any, y: Any, head: Head, n_outputs: int, classes: NDArray[Any] | None) -> torch.Tensor:
    """``(n, r, c)``: one-hot rows of labels in the order of ``classes`` (None: sorted), or float targets as given."""
    if loss.name != "cross-entropy":
        if y is None:
            raise InputError("targets y are needed with this loss")
        targets = inputs.as_targets(y, n_tokens=head.s, every_token=head.pool == "none")
        if targets.shape[1:] != (head.r, n_outputs):
            raise InputError(
                f"targets {tuple(np.shape(y))} do not fit outputs (n, {head.r}, {n_outputs}) of these weights"
            )
        return targets
    if head.r != 1:
        raise InputError("labels are one a sample, but these weights have an output for every token (pool=None)")
    labels = labels_of(X, y)
    return targets_of(np.unique(labels) if classes is None else classes, labels, n_outputs)
