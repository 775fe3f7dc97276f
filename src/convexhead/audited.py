"""Weights in any form that an audit takes, as atoms, and the problem that they were trained for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from convexhead import inputs
from convexhead.errors import InputError
from convexhead.foreign.linear_head import numbers
from convexhead.model import Model
from convexhead.modules import HeadModule
from convexhead.program.activations import make_activation
from convexhead.program.atoms import Atoms
from convexhead.program.blocks import atoms_from_blocks
from convexhead.program.coordinates import Coordinates
from convexhead.program.heads import Head
from convexhead.program.losses import Loss
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.reading import labels_of, targets_of
from convexhead.runtime.samples import default_memory
from convexhead.runtime.stored_tokens import Tokens
from convexhead.spec import Spec


@dataclass(frozen=True, eq=False)
class Audited:
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


def understood(weights: Any, spec: Spec, shape: tuple[int, ...], gates: Any, intercept: Any) -> Audited:
    """The weights, in whichever form they come; ``shape`` is that of the tokens of a sample."""
    if not isinstance(weights, (Model, HeadModule)):
        return _of_factors(weights, spec.make_head(*shape), spec.activation, gates, intercept)
    if gates is not None or intercept is not None:
        raise InputError("gates and intercept go with factors: a module or an estimator has its own")
    if isinstance(weights, Model):
        of = weights.spec
        return Audited(
            weights.head, of.activation, weights.gates, weights.atoms, of.fit_intercept, of.loss, weights.classes
        )
    if weights.reduction is not None:
        raise InputError(
            "this module takes raw tokens: audit one without the reduction (to_module() without raw_tokens) on the "
            "reduced tokens that it was trained on"
        )
    has_intercept = weights.intercept is not None
    return Audited(weights.head, weights.activation_name, weights.gates, weights.to_atoms(), has_intercept)


def _numbers(values: Any, what: str) -> torch.Tensor:
    """Weights that a user passes, as float64 on the CPU."""
    return torch.as_tensor(numbers(values, what))


def _intercept(values: Any, n_outputs: int) -> torch.Tensor:
    """``b (c,)``; zeros where none was trained."""
    if values is None:
        return torch.zeros(n_outputs, dtype=torch.float64)
    b = _numbers(values, "the intercept")
    if b.shape != (n_outputs,):
        raise InputError(f"the intercept has shape {tuple(b.shape)}, {n_outputs} outputs need ({n_outputs},)")
    return b


def _of_factors(factors: Any, head: Head, activation: str, gates: Any, intercept: Any) -> Audited:
    if not isinstance(factors, (tuple, list)) or len(factors) != 2:
        raise InputError(
            "weights must be a HeadModule, a fitted estimator, a torch.nn.Linear, a state dict, the path of a file, "
            "or a pair (mixing, values)"
        )
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
    return Audited(head, activation, gates, atoms, intercept is not None)


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
