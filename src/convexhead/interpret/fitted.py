"""What the functions of `interpret` take: a fitted head, in any of the forms that the library has it in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead import inputs
from convexhead.errors import InputError
from convexhead.model import Model
from convexhead.modules import HeadModule
from convexhead.padding import Padded, is_ragged
from convexhead.program.activations import Activation, LinearActivation, make_activation
from convexhead.program.atoms import Atoms
from convexhead.program.heads.base import Head


@dataclass(frozen=True)
class FittedHead:
    """A head, its activation and its weights in float64: ``f_i = Σ_k P mix(X_i, U_k) V_k + b``."""

    head: Head
    activation: Activation
    atoms: Atoms
    read: Callable[[Any], Any] = lambda X: X
    """Makes of a split of a store what the head reads, see `Model.as_fitted_on`."""

    @property
    def is_linear(self) -> bool:
        return isinstance(self.activation, LinearActivation)

    @property
    def group(self) -> Tensor:
        """Channel group of every atom."""
        return self.atoms.block % self.head.n_groups

    @property
    def features(self) -> Atoms:
        """The atoms, numbered by the feature map that they act on: their block, and for a ReLU each its own."""
        own_masks = not self.is_linear and not hasattr(self.activation, "gates")
        return replace(self.atoms, block=torch.arange(len(self.atoms))) if own_masks else self.atoms

    def mask_weights(self) -> Float[Tensor, "k ..."] | None:
        """The ``g_k`` in ``D_k = 1[pre(X, g_k) ≥ 0]``: gates of a gated ReLU, the mixing weights of a ReLU."""
        if self.is_linear:
            return None
        gates = getattr(self.activation, "gates", None)
        if gates is None:
            return self.atoms.U
        return gates.double().reshape(-1, *self.head.mixing_shape)[self.atoms.block]

    def chunks(self, X: Any) -> Iterator[Float[Tensor, "b s d"]]:
        """``X`` checked, in float64, some samples at a time: those of a store are never in memory together.

        Raises
        ------
        InputError
            Samples of different length: only those as long as the longest of the training can be passed.
        """
        X = self.read(X)
        if isinstance(X, Padded) or is_ragged(X) or getattr(X, "lengths", None) is not None:
            raise InputError(
                f"interpretation reads samples of the same length: pass those of {self.head.s} tokens, as many as the "
                "longest of the training has, as an array (n, s, d)"
            )
        for chunk in inputs.token_chunks(X, n_channels=self.head.d, n_tokens=self.head.s):
            yield chunk.double()


def as_fitted(model: Any) -> FittedHead:
    """A fitted estimator, a `Model`, a `HeadModule` or a `FittedHead` as the last.

    Raises
    ------
    InputError
        Anything else, or an estimator that was not fitted.
    """
    if isinstance(model, FittedHead):
        return model
    if isinstance(model, HeadModule):
        activation = make_activation(model.activation_name, model.head, model.gates)
        return FittedHead(model.head, activation, model.to_atoms().to("cpu", torch.float64))
    model = getattr(model, "model_", model)
    if not isinstance(model, Model):
        raise InputError(f"{type(model).__name__} is not a fitted head: fit it first")
    return FittedHead(model.head, model.activation, model.atoms, model.as_fitted_on)
