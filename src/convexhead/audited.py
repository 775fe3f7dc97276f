"""Weights in any form that an audit takes, as atoms, and the problem that they were trained for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from convexhead import inputs
from convexhead.errors import InputError
from convexhead.foreign.attentive import AttentiveProbe
from convexhead.foreign.linear_head import numbers
from convexhead.model import Model
from convexhead.modules import HeadModule
from convexhead.padding import Padded, padded_like
from convexhead.program.activations import make_activation
from convexhead.program.atoms import Atoms
from convexhead.program.blocks import atoms_from_blocks
from convexhead.program.coordinates import Coordinates
from convexhead.program.heads import Head
from convexhead.program.heads.attentive import Attentive
from convexhead.program.identity import describe_loss
from convexhead.program.losses import BinaryCrossEntropy, CrossEntropy, Loss, make_loss
from convexhead.program.operator import Operator
from convexhead.program.problem import Problem
from convexhead.reading import supervision, tokens_of
from convexhead.runtime.content import content_hash
from convexhead.runtime.ranks import SOFTWARE, Ranks
from convexhead.runtime.samples import default_memory
from convexhead.runtime.stored_tokens import StoredTokens, Tokens
from convexhead.spec import Spec
from convexhead.targets import Targets, as_labels, every_token, read_classes, read_numbers

OF_CLASSES = (CrossEntropy.name, BinaryCrossEntropy.name)
"""Losses of classes; the others are of measurements."""


@dataclass(frozen=True, eq=False)
class Audited:
    """Weights and what they are of; ``classes`` are the labels of the outputs, None: the sorted labels.

    Of ``spec`` only the loss counts, and what else makes targets of labels.
    """

    head: Head
    activation: str
    gates: torch.Tensor | None
    atoms: Atoms
    fit_intercept: bool
    spec: Spec = field(default_factory=Spec)
    classes: NDArray[Any] | None = None

    def problem(
        self, X: Any, y: Any, sample_weight: Any, loss: str | Loss | None, device: torch.device, ranks: Ranks
    ) -> Problem:
        """The problem that they were trained for, in the coordinates that serve its certificate best.

        Processes that share the samples agree on them, and on the weights, first.
        """

        def facts(read: tuple[Tokens, Targets, Loss]) -> dict[str, Any]:
            atoms, (tokens, targets, judge) = self.atoms, read
            numbers = (targets.Y, targets.weights, describe_loss(judge))
            return {
                **SOFTWARE,
                "head": [self.head.name, self.activation, self.fit_intercept, device.type],
                "weights of the head": f"sha256:{content_hash(atoms.state(), self.gates, self.head.queries)}",
                "data (tokens)": inputs.tokens_hash(tokens),
                "data (targets and weights)": f"sha256:{content_hash(*numbers)}",
            }

        tokens, targets, judge = ranks.agree(lambda: self._read(X, y, sample_weight, loss), facts)
        rows, activation = ranks.share(len(tokens)), make_activation(self.activation, self.head, self.gates)
        mine = tokens[rows] if isinstance(tokens, torch.Tensor) else tokens.share(rows)
        memory = default_memory(device)
        operator = Operator(mine, self.head, activation, reuse=False, device=device, memory=memory, ranks=ranks)
        weights = None if targets.weights is None else targets.weights[rows]
        problem = Problem(operator, targets.Y[rows], judge, weights=weights, fit_intercept=self.fit_intercept)
        return problem.in_coordinates(
            Coordinates.of(tokens, targets.Y, self.head, activation, judge, self.fit_intercept)
        )

    def _read(self, X: Any, y: Any, sample_weight: Any, loss: str | Loss | None) -> tuple[Tokens, Targets, Loss]:
        """All tokens, targets and weights of the training, checked, and its loss."""
        tokens, mask = tokens_of(X)
        if tokens.shape[1:] != (self.head.s, self.head.d):
            raise InputError(
                f"tokens are {tuple(tokens.shape[1:])} a sample, but these weights are for {(self.head.s, self.head.d)}"
            )
        if not all(bool(torch.isfinite(part).all()) for part in (self.atoms.U, self.atoms.V, self.atoms.intercept)):
            raise InputError("the weights contain NaN or infinity: the training they come from diverged")
        spec = replace(self.spec, loss=loss or self.spec.loss, pool=self.head.pool)
        y, sample_weight = supervision(X, y, sample_weight, spec)
        targets = self._targets(tokens, mask, y, spec, sample_weight)
        if isinstance(X, Padded):
            tokens = X.scaled(self.head)
        if targets.kept is not None:
            stored = isinstance(tokens, StoredTokens)
            left = inputs.some_samples(X if stored else tokens, targets.kept)
            tokens = inputs.open_tokens(left) if stored else left
        return tokens, targets, make_loss(spec.loss)

    def _targets(
        self, tokens: Tokens, mask: NDArray[np.bool_] | None, y: Any, spec: Spec, sample_weight: Any
    ) -> Targets:
        """Those that they were trained on."""
        n_outputs, classified = self.atoms.V.shape[2], make_loss(spec.loss).name in OF_CLASSES
        if every_token(spec):
            y = padded_like(mask, y, spec.ignore_index if classified else 0.0)
        inputs.check_lengths(tokens, len(inputs.plain(y, "y")))
        if classified:
            targets = read_classes(
                as_labels(y, spec, sample_weight), spec, self.head.s, sample_weight, self.classes, mask
            )
            present = targets.Y.shape[2]
            if targets.Y.dtype == torch.bool and self.head.r == 1:  # the training saw all of them
                present = int(targets.Y.flatten(0, 1).any(0).sum())
            if present != n_outputs:
                raise InputError(f"the labels have {present} classes, but the weights have {n_outputs} outputs")
        else:
            targets = read_numbers(y, self.head.s, sample_weight, every_token=every_token(spec), mask=mask)
        if targets.Y.shape[1:] != (self.head.r, n_outputs):
            raise InputError(
                f"targets {tuple(np.shape(y))} do not fit outputs (n, {self.head.r}, {n_outputs}) of these weights"
            )
        return targets


def plainly(X: Any) -> Any:
    """``X`` as `inputs.plain` takes it, or with its mask as it is."""
    return X if isinstance(X, Padded) else inputs.plain(X, "X")


def understood(weights: Any, spec: Spec, shape: tuple[int, ...], gates: Any, intercept: Any) -> Audited:
    """The weights, in whichever form they come; ``shape`` is that of the tokens of a sample."""
    if not isinstance(weights, (Model, HeadModule)):
        queries = None if spec.queries is None else _numbers(spec.queries, "queries")
        return _of_factors(weights, spec.make_head(*shape, queries=queries), spec.activation, gates, intercept)
    if any(given is not None for given in (gates, spec.queries, intercept)):
        raise InputError("gates, queries and intercept go with factors: a module or an estimator has its own")
    if isinstance(weights, Model):
        of = weights.spec
        head = weights.head.of_length(shape[0]) if weights.any_length else weights.head
        return Audited(head, of.activation, weights.gates, weights.atoms, of.fit_intercept, of, weights.classes)
    if weights.reduction is not None:
        raise InputError(
            "this module takes raw tokens: audit one without the reduction (to_module() without raw_tokens) on the "
            "reduced tokens that it was trained on"
        )
    has_intercept = weights.intercept is not None
    return Audited(weights.head, weights.activation_name, weights.gates, weights.to_atoms(), has_intercept)


def of_probe(probe: AttentiveProbe, shape: tuple[int, ...]) -> Audited:
    """The values of an attentive probe of others, for its queries."""
    J, d, m = probe.V.shape
    if d != shape[1]:
        raise InputError(f"{probe.name} reads tokens of {d} channels, but these have {shape[1]}")
    head = Attentive(shape[0], d, queries=probe.queries, query_norm="each")
    b = probe.W.new_zeros(probe.W.shape[2]) if probe.intercept is None else probe.intercept
    block = torch.arange(J).repeat_interleave(m)
    atoms = Atoms(probe.V.mT.reshape(J * m, d), probe.W.reshape(J * m, 1, -1), block, b)
    return Audited(head, "linear", None, atoms, probe.intercept is not None)


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
