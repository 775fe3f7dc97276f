"""Audit: how far from the global optimum are weights that anyone trained?"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from sklearn.exceptions import NotFittedError
from sklearn.utils.multiclass import check_classification_targets

from convexhead import inputs
from convexhead.certificate.certify import Certificate, certify_atoms
from convexhead.errors import InputError, choose
from convexhead.estimators import _ConvexHead, _labels_of, atoms_from_blocks
from convexhead.modules import HeadModule
from convexhead.program.activations import ACTIVATIONS, make_activation
from convexhead.program.atoms import Atoms
from convexhead.program.coordinates import Coordinates
from convexhead.program.heads import Head, make_head
from convexhead.program.losses import Loss, make_loss
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.runtime.samples import default_memory
from convexhead.runtime.stored_tokens import Tokens
from convexhead.runtime.surroundings import undisturbed

OF_REFERENCE = "that of the reference"
"""How the ``bound`` of a certificate begins whose dual value is a reference's."""


@undisturbed()
def certify(
    weights: HeadModule | _ConvexHead | tuple[Sequence[Any], Sequence[Any]],
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
    weights : HeadModule, fitted estimator, or (mixing, values)
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
    for name, number in (("beta", beta), ("tol", tol)):
        if isinstance(number, bool) or not isinstance(number, numbers.Real) or not 0 < number < math.inf:
            raise InputError(f"{name} must be a positive number, got {number!r}")
    if lower_bound is not None and not isinstance(lower_bound, Certificate):
        raise InputError(
            f"lower_bound must be a Certificate, got {type(lower_bound).__name__}: a number does not say which problem "
            "it bounds; pass certificate_ of a fit of the same problem"
        )
    choose("activation", activation, ACTIVATIONS)
    X = inputs.plain(inputs.resolve_store(X), "X")
    classes = None
    if isinstance(weights, _ConvexHead):
        if not hasattr(weights, "certificate_"):
            raise NotFittedError("this estimator is not fitted yet: call fit before certify")
        whole, X = X, weights.as_trained_on(X)
        if y is not None and len(X) < len(whole) == len(y):  # trained on some of the split
            y = np.asarray(y)[X.rows]
        loss = loss or getattr(weights, "loss", None)
        classes = getattr(weights, "classes_", None)
        weights = weights.to_module(torch.float64)
    tokens = inputs.open_tokens(X)
    if isinstance(weights, HeadModule):
        if gates is not None or intercept is not None:
            raise InputError("gates and intercept go with factors: a module or an estimator has its own")
        if weights.reduction is not None:
            raise InputError(
                "this module takes raw tokens: audit one without the reduction (to_module() without raw_tokens) on the "
                "reduced tokens that it was trained on"
            )
        module_head, activation, atoms = cast(Head, weights.head), weights.activation_name, weights.to_atoms()
        gates, fit_intercept = weights.gates, weights.intercept is not None
    else:
        gates = None if gates is None else _numbers(gates, "gates")
        module_head, atoms = _from_factors(
            weights,
            tokens,
            head,
            "none" if pool is None else pool,
            grid,
            n_blocks,
            outputs,
            gates,
            activation,
            intercept,
        )
        fit_intercept = intercept is not None
    if tokens.shape[1:] != (module_head.s, module_head.d):
        raise InputError(
            f"tokens are {tuple(tokens.shape[1:])} a sample, but these weights are for {(module_head.s, module_head.d)}"
        )
    chosen = make_loss(loss or "cross-entropy")
    targets = _targets(chosen, X, y, module_head, atoms.V.shape[2], classes)
    inputs.check_lengths(tokens, len(targets))
    where = inputs.pick_device(device)
    chosen_activation = make_activation(activation, module_head, gates)
    problem = Problem(
        Operator(tokens, module_head, chosen_activation, reuse=False, device=where, memory=default_memory(where)),
        targets,
        chosen,
        fit_intercept=fit_intercept,
    )
    atoms = atoms.to(where, torch.float64)
    if not all(bool(torch.isfinite(part).all()) for part in (atoms.U, atoms.V, atoms.intercept)):
        raise InputError("the weights contain NaN or infinity: the training they come from diverged")
    if lower_bound is not None:
        lower_bound.check_is_of(problem.identity, float(beta))
    generator = None if random_state is None else torch.Generator().manual_seed(random_state)
    problem = problem.in_coordinates(
        Coordinates.of(tokens, targets, module_head, chosen_activation, chosen, fit_intercept)
    )
    return certify_atoms(
        problem,
        problem.enter(atoms),
        problem.coordinates.beta(float(beta)),
        tol=float(tol),
        known_dual=-math.inf if lower_bound is None else lower_bound.dual,
        known_failure=0.0 if lower_bound is None else lower_bound.failure_probability,
        known_from="" if lower_bound is None else f"{OF_REFERENCE}: {lower_bound.bound}",
        generator=generator,
    )


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


def _from_factors(
    factors: Any,
    tokens: Tokens,
    name: str,
    pool: str,
    grid: tuple[int, int] | None,
    n_blocks: int,
    outputs: str,
    gates: Any,
    activation: str,
    intercept: Any,
) -> tuple[Head, Atoms]:
    head = make_head(name, tokens.shape[1], tokens.shape[2], pool=pool, grid=grid, n_blocks=n_blocks, outputs=outputs)
    if not isinstance(factors, (tuple, list)) or len(factors) != 2:
        raise InputError("weights must be a HeadModule, a fitted estimator, or a pair (mixing, values)")
    if activation == "gated-relu" and gates is None:
        raise InputError("activation='gated-relu' needs the gates that the weights were trained with: pass gates=")
    if activation != "gated-relu" and gates is not None:
        raise InputError(f"gates go with activation='gated-relu', and not with {activation!r}")
    if gates is not None:
        make_activation(activation, head, gates)  # checks their shape
    mixing, values = factors
    if not head.learns_mixing:
        if mixing is not None:
            raise InputError("the linear head has no mixing weights: pass (None, coef)")
        coef = _numbers(values, "coef")
        if coef.shape[:1] != (head.d,) or coef.ndim != 2:
            raise InputError(f"the linear head's coef must be (d, c) = ({head.d}, c), got {tuple(coef.shape)}")
        b = _intercept(intercept, coef.shape[1])
        return head, Atoms(torch.ones(1).double(), coef[None], torch.zeros(1, dtype=torch.int64), b)
    count = head.n_groups * (len(gates) if activation == "gated-relu" else 1)
    if count == 1 and not isinstance(mixing, (list, tuple)):
        mixing, values = [mixing], [values]
    if not all(isinstance(part, (list, tuple)) for part in (mixing, values)):
        raise InputError(f"this head has {count} blocks: pass a list of mixing and a list of values weights")
    mixing, values = ([_numbers(w, "weights").numpy() for w in part] for part in (mixing, values))
    if len(mixing) != count or len(values) != count:
        raise InputError(
            f"this head has {count} blocks, got {len(mixing)} of mixing and {len(values)} of values weights"
        )
    share = head.n_groups if name == "block-fno" and outputs == "grouped" else 1
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
    n_outputs = columns.pop() * share
    return head, atoms_from_blocks(head, mixing, values, n_outputs, _intercept(intercept, n_outputs))


def _targets(
    loss: Loss, X: Any, y: Any, head: Head, n_outputs: int, classes: np.ndarray[Any, Any] | None
) -> torch.Tensor:
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
    labels = _labels_of(X, y)
    check_classification_targets(labels)
    present = np.unique(labels)
    names = (present if classes is None else classes).tolist()
    place = {name: i for i, name in enumerate(names)}
    foreign = [label for label in present.tolist() if label not in place]
    if foreign:
        raise InputError(
            f"labels {', '.join(map(repr, foreign[:5]))} are not among the classes of this head "
            f"({', '.join(map(repr, names[:5]))}{', …' if len(names) > 5 else ''})"
        )
    if len(present) != n_outputs:
        raise InputError(f"the labels have {len(present)} classes, but the weights have {n_outputs} outputs")
    return inputs.one_hot(np.array([place[label] for label in labels.tolist()]), n_outputs)
