"""Audit: how far from the global optimum are weights that anyone trained?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from sklearn.exceptions import NotFittedError

from convexhead import inputs
from convexhead.activation import ACTIVATIONS, make_activation
from convexhead.certificate import Certificate, certify_atoms
from convexhead.errors import InputError, choose
from convexhead.estimators import _ConvexHead, _labels_of, atoms_from_blocks
from convexhead.heads import Head, make_head
from convexhead.losses import Loss, make_loss
from convexhead.modules import HeadModule
from convexhead.problem import Atoms, Problem
from convexhead.samples import default_memory
from convexhead.stored_tokens import Tokens


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
    lower_bound: float | Certificate | None = None,
    device: str = "auto",
    random_state: int | None = None,
) -> Certificate:
    """Certificate of a trained head for the convex program at weight ``beta`` on the data it was trained on.

    The gap is rigorous but rests on the dual point that the weights themselves give, which is poor for weights far
    from optimal. With a ``lower_bound`` from a fit of the same problem it is the true distance, up to that fit's gap.

    Parameters
    ----------
    weights : HeadModule, fitted estimator, or (mixing, values)
        Factors are lists with one entry a block, ``(k, *mixing_shape)`` and ``(k, e, c)`` as in ``mixing_`` and
        ``values_``, or for a head of one block the two arrays themselves. The linear head: ``(None, coef)``. They
        need not be balanced: the certificate is for the products, whose penalty is never more than the factors'.
    X, y
        The training data, as for `ConvexHeadClassifier.fit` (labels) or `ConvexHeadRegressor.fit` (float targets with
        ``loss`` other than cross-entropy).
    beta : float
        ``β`` of the objective. For weights trained with weight decay ``λ`` in the loss ``(λ/2)‖θ‖²``, ``β = λ``.
    head, activation, pool, grid, gates, n_blocks, outputs, intercept
        What the factors are of; a module or an estimator knows.
    loss : str, Loss or None
        None: cross-entropy, or the regressor's own.
    tol : float
        Relative gap for ``converged``.
    lower_bound : float, Certificate or None
        Known lower bound on the optimum of the same problem.

    Raises
    ------
    ValueError
        Shapes, labels or options that do not fit together.
    """
    if not (isinstance(beta, (int, float, np.floating)) and 0 < beta < math.inf):
        raise InputError(f"beta must be a positive number, got {beta!r}")
    choose("activation", activation, ACTIVATIONS)
    X = inputs.resolve_store(X)
    if isinstance(weights, _ConvexHead):
        if not hasattr(weights, "certificate_"):
            raise NotFittedError("this estimator is not fitted yet: call fit before certify")
        whole, X = X, weights.as_trained_on(X)
        if y is not None and len(X) < len(whole) == len(y):  # trained on some of the split
            y = np.asarray(y)[X.rows]
        loss = loss or getattr(weights, "loss", None)
        weights = weights.to_module(torch.float64)
    tokens = inputs.open_tokens(X)
    module_head: Head
    if isinstance(weights, HeadModule):
        module_head, activation, atoms = cast(Head, weights.head), weights.activation_name, weights.to_atoms()
        gates = weights.gates
    else:
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
    if tokens.shape[1:] != (module_head.s, module_head.d):
        raise InputError(
            f"tokens are {tuple(tokens.shape[1:])} a sample, but these weights are for {(module_head.s, module_head.d)}"
        )
    chosen = make_loss(loss or "cross-entropy")
    targets = _targets(chosen, X, y, module_head, atoms.V.shape[2])
    inputs.check_lengths(tokens, len(targets))
    where = inputs.pick_device(device)
    gates = None if gates is None else torch.as_tensor(np.asarray(gates), dtype=torch.float64)
    problem = Problem(
        tokens,
        targets,
        module_head,
        make_activation(activation, module_head, gates),
        chosen,
        fit_intercept=bool((atoms.intercept != 0).any()),
        reuse=False,
        device=where,
        memory=default_memory(where),
    )
    atoms = atoms.to(where, torch.float64)
    if not all(bool(torch.isfinite(part).all()) for part in (atoms.U, atoms.V, atoms.intercept)):
        raise InputError("the weights contain NaN or infinity: the training they come from diverged")
    known = lower_bound.dual if isinstance(lower_bound, Certificate) else lower_bound
    known_failure = lower_bound.failure_probability if isinstance(lower_bound, Certificate) else 0.0
    generator = None if random_state is None else torch.Generator().manual_seed(random_state)
    return certify_atoms(
        problem,
        atoms,
        float(beta),
        tol=tol,
        known_dual=-math.inf if known is None else float(known),
        known_failure=known_failure,
        generator=generator,
    )


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
    mixing, values = factors
    if not head.learns_mixing:
        coef = torch.as_tensor(np.asarray(values), dtype=torch.float64)
        if coef.shape[:1] != (head.d,) or coef.ndim != 2:
            raise InputError(f"the linear head's coef must be (d, c) = ({head.d}, c), got {tuple(coef.shape)}")
        b = torch.zeros(coef.shape[1]) if intercept is None else torch.as_tensor(np.asarray(intercept))
        return head, Atoms(torch.ones(1).double(), coef[None], torch.zeros(1, dtype=torch.int64), b.double())
    count = head.n_groups * (len(gates) if activation == "gated-relu" else 1)
    if count == 1 and not isinstance(mixing, (list, tuple)):
        mixing, values = [mixing], [values]
    mixing, values = ([np.asarray(w, dtype=np.float64) for w in part] for part in (mixing, values))
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
    b = torch.zeros(n_outputs) if intercept is None else torch.as_tensor(np.asarray(intercept))
    return head, atoms_from_blocks(head, mixing, values, n_outputs, b.double())


def _targets(loss: Loss, X: Any, y: Any, head: Head, n_outputs: int) -> torch.Tensor:
    if loss.name == "cross-entropy":
        classes, indices = np.unique(_labels_of(X, y), return_inverse=True)
        if len(classes) != n_outputs:
            raise InputError(f"the labels have {len(classes)} classes, but the weights have {n_outputs} outputs")
        return inputs.one_hot(indices, n_outputs)
    if y is None:
        raise InputError("targets y are needed with this loss")
    targets = torch.as_tensor(np.asarray(y), dtype=torch.float64)
    try:
        return targets.reshape(len(targets), head.r, n_outputs)
    except RuntimeError as error:
        raise InputError(
            f"targets {tuple(targets.shape)} do not fit outputs (n, {head.r}, {n_outputs}) of these weights"
        ) from error
