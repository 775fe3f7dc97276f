"""The losses of all samples, each with its weight.

    F = (1/n) Σ_i Σ_(r, k) ω_irk ℓ_irk

A weight is one of a sample ``(n, 1, 1)``, of a row of outputs ``(n, r, 1)`` or of an entry ``(n, r, c)``, as far as the
loss is a sum over rows or entries (`Loss.separates`). A *dual point* ``q`` is written without the weights: the residual
is ``R = ω q / n``, and the conjugate of ``ω ℓ`` at ``ω q`` is ``ω ℓ*(q)``. Where ``ω`` is 0, so is the residual.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from convexhead.errors import InputError
from convexhead.program.losses import Loss

Weights = Float[Tensor, "n wr wc"]
"""``ω``; a side of length 1 stands for all rows, or all outputs."""
FAN = 8
"""Terms that a level of `pairwise_sum` adds. Chosen by hand: with two it takes three times as many calls."""


class SampleLosses:
    """Loss, targets and weights of some samples.

    Parameters
    ----------
    loss : Loss
    Y : Tensor (n, r, c)
        Targets; those of bytes, an eighth of the memory, become numbers for the samples that are looked at.
    weights : Tensor (n, r or 1, c or 1) or None
        ``ω``; None where all are 1.
    dtype : torch.dtype or None
        Of all numbers; None: of the targets.

    Raises
    ------
    InputError
        Weights that are finer than what the loss is a sum of.
    """

    def __init__(
        self,
        loss: Loss,
        Y: Shaped[Tensor, "n r c"],
        weights: Weights | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.loss, self._Y, self.weights, self.dtype = loss, Y, weights, dtype or Y.dtype
        self._part: tuple[int, ...] = ()
        if weights is None or weights.shape[1:] == (1, 1):
            return
        whole_rows = weights.shape[2] == 1
        self._part = (1, Y.shape[2] if whole_rows else 1)
        if loss.separates not in (("rows", "entries") if whole_rows or Y.shape[2] == 1 else ("entries",)):
            whole = {"samples": "sample", "rows": "row of outputs"}[loss.separates]
            raise InputError(
                f"the loss {loss.name} takes one weight for all of a {whole}: weigh whole ones, or use a loss that is "
                "a sum over outputs"
            )

    def __len__(self) -> int:
        return len(self._Y)

    @property
    def Y(self) -> Float[Tensor, "n r c"]:
        """Targets as numbers: a copy of those of bytes."""
        return self._Y.to(self.dtype)

    def empty(self) -> Float[Tensor, "n r c"]:
        """Room for outputs, as the targets lie."""
        return torch.empty_like(self._Y, dtype=self.dtype)

    def at(self, rows: Any) -> SampleLosses:
        """Those of some samples."""
        weights = None if self.weights is None else self.weights[rows]
        return SampleLosses(self.loss, self._Y[rows].to(self.dtype), weights)

    def class_by_class(self) -> SampleLosses:
        """The same with targets that lie in memory as dense passes make outputs: a column for every class."""
        Y = self._Y.movedim(2, 0).contiguous().movedim(0, 2)
        return SampleLosses(self.loss, Y, self.weights, dtype=self.dtype)

    def to(self, dtype: torch.dtype) -> SampleLosses:
        """The same in another precision."""
        if self.dtype == dtype:
            return self
        return SampleLosses(self.loss, self._Y.to(dtype), None if self.weights is None else self.weights.to(dtype))

    # -- primal: at outputs f -----------------------------------------------------------------------------------------
    def value(self, f: Float[Tensor, "n r c"]) -> Float[Tensor, " n"]:
        """``Σ ω_i ℓ(f_i, y_i)``."""
        if self.weights is None:
            return self.loss.value(f, self.Y)
        return self._weighed(self.loss.value(self._apart(f), self._apart(self.Y)))

    def rough_value(self, f: Float[Tensor, "n r c"]) -> Float[Tensor, " n"]:
        """`value`, rounded as `value_and_residual` rounds it: see `Loss.rough_value`."""
        if self.weights is None:
            return self.loss.rough_value(f, self.Y)
        return self._weighed(self.loss.rough_value(self._apart(f), self._apart(self.Y)))

    def residual(self, f: Float[Tensor, "n r c"]) -> Float[Tensor, "n r c"]:
        """``ω_i ∇ℓ(f_i, y_i)``."""
        return self.weigh(self.loss.residual(f, self.Y))

    def value_and_residual(self, f: Float[Tensor, "n r c"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n r c"]]:
        """Both at once."""
        if self.weights is None:
            return self.loss.value_and_residual(f, self.Y)
        value, q = self.loss.value_and_residual(self._apart(f), self._apart(self.Y))
        return self._weighed(value), self.weigh(q.view(f.shape))

    def hessian_times(self, f: Float[Tensor, "n r c"], z: Float[Tensor, "... n r c"]) -> Float[Tensor, "... n r c"]:
        """``ω_i ∇²ℓ(f_i, y_i) z_i``."""
        return self.weigh(self.loss.hessian_times(f, self.Y, z))

    def curvature(self, f: Float[Tensor, "n r c"]) -> Float[Tensor, "n r c"]:
        """The diagonal of ``ω_i ∇²ℓ(f_i, y_i)``."""
        return self.weigh(self.loss.curvature(f, self.Y))

    def hessian_root(self, f: Float[Tensor, "n r c"], z: Float[Tensor, "n r c"]) -> Float[Tensor, "n r c"] | None:
        """Draws whose covariance is the Hessian: see `Loss.hessian_root`."""
        root = self.loss.hessian_root(f, self.Y, z)
        return root if root is None or self.weights is None else self.weights.sqrt() * root

    def summed_hessian(self, f: Float[Tensor, "n r c"]) -> Float[Tensor, "c c"]:
        """``Σ_i ω_i ∇²ℓ`` summed over rows: the Hessian in an intercept."""
        return self.loss.summed_hessian(f, self.Y, self.weights)

    # -- dual: at points q --------------------------------------------------------------------------------------------
    def dual_point(self, f: Float[Tensor, "n r c"]) -> Float[Tensor, "n r c"]:
        """``q_i = ∇ℓ(f_i, y_i)``."""
        return self.loss.residual(f, self.Y)

    def weigh(self, q: Float[Tensor, "... n r c"]) -> Float[Tensor, "... n r c"]:
        """``ω q``."""
        return q if self.weights is None else self.weights * q

    def summed(self, q: Float[Tensor, "n r c"]) -> Float[Tensor, " c"]:
        """``Σ ω q`` over samples and rows, by `pairwise_sum`."""
        return pairwise_sum(self.weigh(q).flatten(0, 1))

    def unweigh(self, g: Float[Tensor, "n r c"]) -> Float[Tensor, "n r c"]:
        """``q`` of ``ω q``, and 0 where ``ω`` is 0."""
        return g if self.weights is None else torch.where(self.weights > 0, g / self.weights, 0.0)

    def conjugate(self, q: Float[Tensor, "n r c"]) -> Float[Tensor, " n"]:
        """``Σ ω_i ℓ*(q_i, y_i)``; infinite outside the domain of ``ℓ*``, but where ``ω`` is 0."""
        if self.weights is None:
            return self.loss.conjugate(q, self.Y)
        return self._weighed(self.loss.conjugate(self._apart(q), self._apart(self.Y)))

    def scaled_domain(self, f: Float[Tensor, "n r c"]) -> float:
        """The largest known ``τ ≥ 1`` for which ``τ ∇ℓ(f_i)`` stays in the domain of ``ℓ*``."""
        return self.loss.scaled_domain(f, self.Y)

    def scale_limit(self, q: Float[Tensor, "n r c"]) -> float:
        """The largest known ``τ`` with ``τ q`` in the domain of ``ℓ*``."""
        return self.loss.scale_limit(q, self.Y)

    # -- sums ---------------------------------------------------------------------------------------------------------
    @property
    def largest(self) -> Float[Tensor, " n"] | float:
        """``max ω_i`` of every sample: a bound on the curvature of its loss, if that of ``ℓ`` is at most 1."""
        return 1.0 if self.weights is None else self.weights.flatten(1).amax(1)

    def _apart(self, x: Shaped[Tensor, "n r c"]) -> Shaped[Tensor, "m a b"]:
        """Every row, or entry, as a sample of its own, where it has its own weight."""
        return x.reshape(-1, *self._part) if self._part else x

    def _weighed(self, values: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
        """``Σ ω v`` of each sample; whatever ``v`` is where ``ω`` is 0."""
        assert self.weights is not None
        values = values.view(len(self), *self.weights.shape[1:])
        return torch.where(self.weights > 0, self.weights * values, 0.0).flatten(1).sum(1)


def pairwise_sum(x: Float[Tensor, "m ..."]) -> Tensor:
    """Sum over the first dimension, in which each term passes through few additions: see `pairwise_additions`."""
    dim = 0
    if x.stride(0) == 1:  # such sums are several times faster along the last dimension
        x, dim = x.movedim(0, -1), x.ndim - 1
    while x.shape[dim] > FAN:
        whole = x.shape[dim] // FAN * FAN
        rest, x = x.narrow(dim, whole, x.shape[dim] - whole), x.narrow(dim, 0, whole)
        x = x.unflatten(dim, (FAN, -1)).sum(dim)
        x.select(dim, 0).add_(rest.sum(dim))
    return x.sum(dim)


def pairwise_additions(m: int) -> int:
    """Bound the additions that a term of `pairwise_sum` passes through: ``FAN`` in each of ``⌈log m / log FAN⌉``
    levels."""
    levels = 1
    while m > FAN:
        m, levels = m // FAN, levels + 1
    return FAN * levels
