"""A problem is solved in coordinates: its tokens and targets are moved and scaled where that changes nothing.

With ``X' = 2⁻ᵏ (X − 1 μᵀ)`` and ``Y' = Y − ν`` the program keeps its optimum, value for value:

* a power of two only renames the weights. Outputs are of degree ``g`` in the tokens (3 for self-attention, else 1), so
  ``Z' = 2^{kg} Z`` and ``β' = 2^{−kg} β``; for the linear head ``W' = 2^k W`` and ``β' = 2^{−2k} β``. Not so of the
  attentive head, whose scores would change (an origin does not change its maps);
* an origin ``μ`` of the tokens goes into an unpenalised intercept, ``b' = b + 𝒜(1 μᵀ)(Z)``, wherever outputs are linear
  in the tokens and those of constant tokens are the same for every sample and row: linear activation, every head but
  self-attention, and the Mixer only under one pooled output. A mask depends on the tokens, so gates forbid it;
* an origin ``ν`` of the targets goes there too, ``b' = b − ν``, if the loss depends on ``f − y`` alone.

Other changes of the channels (unequal scales, a rotation) change the penalty, hence the program: they are left to the
solvers. Coordinates are the plain ones wherever nothing is far from 0 and nothing very large or small.

Moved tokens are made in float64, so that they are the user's up to ``ε`` of what they are after the move, which is far
less than what outputs of the tokens as they came would lose. `Coordinates.rounding` bounds what the intercept loses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from convexhead.errors import InputError
from convexhead.program.activations import Activation, LinearActivation
from convexhead.program.atoms import Atoms
from convexhead.program.heads.base import Head
from convexhead.program.losses import Huber, Loss, Squared
from convexhead.runtime.stored_tokens import StoredTokens, Tokens

OF_DIFFERENCES = (Squared, Huber)
"""Losses of ``f − y`` alone. (A user's subclass of them need not be one.)"""
LOOKED_AT = 2e6
"""Numbers in the tokens that decide on coordinates, spread over the samples. Chosen by hand: any choice is exact."""
FEWEST_SAMPLES = 64
"""Least number of samples to look at, however many tokens they have. Chosen by hand."""
FAR = 1.0
"""Distance of the mean from 0, in standard deviations, above which an origin pays. Chosen by hand."""
PLAIN_EXPONENTS = 8
"""Exponent ``e``: tokens whose largest entry lies in ``2^−e .. 2^e`` are not scaled. Chosen by hand."""
IN_MEMORY = 1e8
"""Bytes of moved tokens up to which they are made at once; larger ones are made as they are read. Chosen by hand."""


@dataclass(frozen=True)
class Coordinates:
    """The change of coordinates of one problem; without arguments it changes nothing.

    Attributes
    ----------
    origin : Tensor (d,) or None
        ``μ``, float64.
    target_origin : Tensor (c,) or None
        ``ν``, float64.
    exponent : int
        ``k``, even, so that roots of powers of two are powers of two.
    degree : int
        ``g``.
    penalty_degree : int
        ``k`` times this is the exponent of ``β/β'``.
    n_tokens : int
        ``s``.
    """

    origin: Float[Tensor, " d"] | None = None
    target_origin: Float[Tensor, " c"] | None = None
    exponent: int = 0
    degree: int = 1
    penalty_degree: int = 1
    n_tokens: int = 1

    @classmethod
    def of(
        cls, X: Tokens, Y: Shaped[Tensor, "n r c"], head: Head, activation: Activation, loss: Loss, fit_intercept: bool
    ) -> Coordinates:
        """Those in which this problem is best solved."""
        each = math.prod(X.shape[1:])
        looked_at = min(len(X), max(FEWEST_SAMPLES, int(LOOKED_AT // each)))
        if looked_at == len(X) and isinstance(X, Tensor):
            tokens = X.double()
        else:
            tokens = X[torch.linspace(0, len(X) - 1, looked_at, dtype=torch.float64).long().unique()].double()
        tokens = tokens.flatten(0, 1)
        tokens = tokens[tokens.isfinite().all(1)] if math.isinf(head.absent) else tokens  # those that there are
        origin = _origin(tokens) if fit_intercept and moves_into_intercept(head, activation) else None
        size = float((tokens if origin is None else tokens - origin).abs().max())
        exponent = 2 * round(math.log2(size) / 2) if 0 < size < math.inf else 0
        return cls(
            origin,
            _origin(Y.double().flatten(0, 1)) if fit_intercept and type(loss) in OF_DIFFERENCES else None,
            exponent if head.homogeneous and abs(exponent) > PLAIN_EXPONENTS else 0,
            degree=3 if head.reads_tokens else 1,
            penalty_degree=2 if not head.learns_mixing else 3 if head.reads_tokens else 1,
            n_tokens=head.s,
        )

    def __bool__(self) -> bool:
        """Whether anything changes."""
        return self.origin is not None or self.target_origin is not None or self.exponent != 0

    # -- into the coordinates -----------------------------------------------------------------------------------------
    def tokens(self, X: Tokens) -> Tokens:
        """``X' = 2⁻ᵏ (X − 1 μᵀ)`` in float64; where that is much, a chunk at a time as it is read."""
        if self.origin is None and not self.exponent:
            return X
        if isinstance(X, Tensor) and 8 * math.prod(X.shape) <= IN_MEMORY:
            return self._moved(X)
        return StoredTokens(X, self._moved)

    def _moved(self, X: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        X = X.double()
        X = X if self.origin is None else X - self.origin
        return torch.ldexp(X, torch.tensor(-self.exponent)) if self.exponent else X

    def targets(self, Y: Shaped[Tensor, "n r c"]) -> Shaped[Tensor, "n r c"]:
        """``Y' = Y − ν``."""
        return Y if self.target_origin is None else Y.double() - self.target_origin

    def beta(self, beta: float) -> float:
        """``β'``."""
        return _scaled(beta, -self.penalty_degree * self.exponent, "beta")

    def enter(self, atoms: Atoms, activation: Activation) -> Atoms:
        """The same model here, given the user's weights."""
        if not self:
            return atoms
        b = atoms.intercept.double()
        b = b + self._of_origin(atoms, activation)
        b = b if self.target_origin is None else b - self.target_origin.to(b.device)
        return replace(self._times(atoms, self.exponent), intercept=b)

    # -- and out of them ----------------------------------------------------------------------------------------------
    def leave(self, atoms: Atoms, activation: Activation) -> Atoms:
        """The user's weights of a model here; inverse of `enter`."""
        if not self:
            return atoms
        atoms = self._times(atoms, -self.exponent)
        b = atoms.intercept.double()
        b = b - self._of_origin(atoms, activation)
        b = b if self.target_origin is None else b + self.target_origin.to(b.device)
        if not all(bool(torch.isfinite(part).all()) for part in (atoms.U, atoms.V, b)):
            raise InputError("the weights of this head leave the range of float64: bring the tokens to a scale near 1")
        return replace(atoms, intercept=b)

    def user_beta(self, beta: float) -> float:
        """``β`` of a ``β'``."""
        return _scaled(beta, self.penalty_degree * self.exponent, "beta")

    def user_beta_max(self, beta_max: float) -> float:
        """The user's ``β_max``, the spectral norm of a gradient: of the tokens' own degree for every head."""
        return _scaled(beta_max, self.degree * self.exponent, "beta_max")

    def rounding(self, atoms: Atoms, activation: Activation) -> Float[Tensor, " c"]:
        """How far the outputs of the user's weights, those that `leave` makes of these atoms, may lie from those here.

        ``b + t − ν − b'`` exactly, and what was lost in ``t = 𝒜(1 μᵀ)(Z)``, a sum of so many products.
        """
        outside = self.leave(atoms, activation)
        t = self._of_origin(outside, activation)
        parts = [outside.intercept, t, -atoms.intercept]
        parts += [] if self.target_origin is None else [-self.target_origin.to(t.device)]
        moved = [abs(math.fsum(column)) for column in torch.stack(parts, dim=1).tolist()]
        lost = torch.tensor(moved, dtype=torch.float64, device=t.device)
        if self.origin is None:
            return lost
        products = math.prod(outside.U.shape) + outside.V.shape[:2].numel() + 8
        positive = replace(outside, U=outside.U.abs(), V=outside.V.abs())
        size = self._of(self.origin.abs(), positive, activation)
        return lost + products * torch.finfo(torch.float64).eps * size

    def _of_origin(self, atoms: Atoms, activation: Activation) -> Float[Tensor, " c"]:
        """``𝒜(1 μᵀ)(Z)``; 0 where there is no ``μ``."""
        if self.origin is None:
            return torch.zeros_like(atoms.intercept, dtype=torch.float64)
        return self._of(self.origin, atoms, activation)

    def _of(self, token: Float[Tensor, " d"], atoms: Atoms, activation: Activation) -> Float[Tensor, " c"]:
        """Outputs of a sample whose tokens are all the same, without the intercept: the same for every row."""
        if not len(atoms):
            return torch.zeros_like(atoms.intercept, dtype=torch.float64)
        constant = token.to(atoms.V.device).expand(1, self.n_tokens, -1)
        mixed = activation.mix(activation.prepare(constant, reuse=False), atoms.U.double(), atoms.block)
        return (mixed.flatten(2) @ atoms.V.double().flatten(0, 1))[0, 0]

    def _times(self, atoms: Atoms, exponent: int) -> Atoms:
        """Weights whose products are ``2^{exponent · g}`` times these."""
        if not exponent:
            return atoms
        both = self.degree * exponent
        if self.penalty_degree == 2:  # the linear head, whose mixing weight is 1
            return replace(atoms, V=torch.ldexp(atoms.V.double(), torch.tensor(both)))
        U, V = (torch.ldexp(part.double(), torch.tensor(both // 2)) for part in (atoms.U, atoms.V))
        return replace(atoms, U=U, V=V)


def moves_into_intercept(head: Head, activation: Activation) -> bool:
    """Whether tokens can have another origin at the price of another intercept; see the module's text."""
    linear = isinstance(activation, LinearActivation) and not head.reads_tokens
    return linear and (head.name != "mlp-mixer" or head.r == 1)


def _origin(rows: Float[Tensor, "m d"]) -> Float[Tensor, " d"] | None:
    """The mean of the rows, if some column's is far from 0 beside what it varies by."""
    mean = rows[0] + (rows - rows[0]).mean(0)  # exact where all are the same
    spread = (rows - mean).square().mean(0).sqrt()
    far = bool((mean.abs() > FAR * spread).any())
    return mean if far and bool(torch.isfinite(mean).all()) else None


def _scaled(value: float, exponent: int, name: str) -> float:
    """``2^exponent`` times a positive number, which must not leave the range of float64."""
    try:
        scaled = math.ldexp(value, exponent)
    except OverflowError:
        scaled = math.inf
    if exponent and value > 0 and not 2.0**-1000 < scaled < 2.0**1000:
        raise InputError(
            f"{name} is about 1e{math.log10(value) + exponent * math.log10(2):+.0f} for tokens of this size, beyond "
            "float64: bring the tokens to a scale near 1, for example by standardising them"
        )
    return scaled
