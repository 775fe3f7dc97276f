"""Convex losses: value, residual and conjugate, all a batch at a time.

A loss is a function ``ℓ(f, y)`` of one sample's outputs ``f (r, c)`` and targets ``y (r, c)``, convex in ``f``. The
library needs three things of it, each over a batch:

    value(f, y)      ℓ(f_i, y_i)                      (n, r, c), (n, r, c) -> (n,)
    residual(f, y)   ∇_f ℓ(f_i, y_i)                  (n, r, c), (n, r, c) -> (n, r, c)
    conjugate(g, y)  ℓ*(g_i, y_i) = sup_f ⟨g, f⟩ − ℓ   (n, r, c), (n, r, c) -> (n,), +inf outside the domain

and ``scaled_domain(f, y)``: the largest τ for which ``τ ∇ℓ`` surely stays in the domain of the conjugate (1 is always
right for a loss bounded below). To use a loss of your own, subclass `Loss` and pass an instance as ``loss=``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.errors import InputError, choose

Batch = Float[Tensor, "n r c"]
Batches = Float[Tensor, "... n r c"]
FEW_CLASSES = 16
"""Largest number of classes for which softmax runs on a copy with the classes along columns. Chosen by hand."""


class Loss(ABC):
    """A convex loss of one sample's outputs; see the module's text for the contract."""

    name: ClassVar[str]

    @abstractmethod
    def value(self, f: Batch, y: Batch) -> Float[Tensor, " n"]:
        """``ℓ(f_i, y_i)``."""

    @abstractmethod
    def residual(self, f: Batch, y: Batch) -> Batch:
        """``∇_f ℓ(f_i, y_i)``."""

    @abstractmethod
    def conjugate(self, g: Batch, y: Batch) -> Float[Tensor, " n"]:
        """``ℓ*(g_i, y_i)``, ``+inf`` outside its domain."""

    def mean_hessian(self, f: Batch, y: Batch) -> Float[Tensor, "c c"]:
        """``(1/n) Σ_i ∇²ℓ`` summed over rows: the Hessian of the data term in an intercept. By `hessian_times`, one
        output at a time; override where a formula is cheaper."""
        units = torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
        return torch.stack([self.hessian_times(f, y, e.expand_as(f)).sum(1).mean(0) for e in units])

    def hessian_times(self, f: Batch, y: Batch, z: Batches) -> Batches:
        """``∇²ℓ(f_i, y_i) z_i`` for one ``z (n, r, c)`` or for many. By a forward derivative of `residual`, one ``z``
        after another; override where a formula is cheaper."""
        if z.ndim > f.ndim:
            return torch.stack([self.hessian_times(f, y, one) for one in z])
        return torch.func.jvp(lambda f: self.residual(f, y), (f,), (z,))[1]

    def hessian_root(self, f: Batch, y: Batch, z: Batch) -> Batch | None:
        """``L_i z_i`` with ``L_i L_iᵀ = ∇²ℓ(f_i, y_i)``: draws ``z`` of mean 0 and covariance 1 become draws whose
        covariance is the Hessian. None where that is not known, and solvers do without."""
        return None

    def value_and_residual(self, f: Batch, y: Batch) -> tuple[Tensor, Batch]:
        """Both at once, for losses that can share work between them."""
        return self.value(f, y), self.residual(f, y)

    def rough_value(self, f: Batch, y: Batch) -> Float[Tensor, " n"]:
        """``ℓ(f_i, y_i)`` as `value_and_residual` rounds it, to compare with that; override where it is cheaper."""
        return self.value_and_residual(f, y)[0]

    def scaled_domain(self, f: Batch, y: Batch) -> float:
        """The largest known ``τ ≥ 1`` with ``τ ∇ℓ(f_i, y_i)`` in the domain of ``ℓ*`` for every ``i``."""
        return max(1.0, self.scale_limit(self.residual(f, y), y))

    def scale_limit(self, g: Batch, y: Batch) -> float:
        """The largest known ``τ`` with ``τ g_i`` in the domain of ``ℓ*`` for every ``i``, if it holds ``g``."""
        return 1.0

    # -- dual points of a problem with an intercept: see `convexhead.certificate.dual` ---------------------------------
    def without_sum(
        self, g: Batch, y: Batch, excess: Float[Tensor, " c"], targets: Float[Tensor, " c"], rows: int
    ) -> Batch:
        """Points near ``g``, in the domain of ``ℓ*``, whose sum is less by ``excess``.

        Where the domain is not a whole space, subtracting the mean as here may lead out of it: override.

        Parameters
        ----------
        g, y : Tensor (n, r, c)
            Points and targets of some of the samples.
        excess, targets : Tensor (c,)
            Sums of ``g`` and of ``y`` over all samples and rows.
        rows : int
            How many there are.
        """
        return g - excess / rows

    def cost_of_sum(
        self, left: Float[Tensor, " c"], targets: Float[Tensor, " c"], value: float, reach: float, n: int
    ) -> float:
        """How much ``(1/n) Σ_i ℓ*(g_i)`` rises, at most, as `without_sum` takes away a sum of ``|Σ_i g_ik| ≤ left_k``.

        As ``ℓ*`` is convex, at most ``⟨f, Δ⟩`` for ``f ∈ ∂ℓ*`` at the point reached.

        Parameters
        ----------
        value : float
            ``|(1/n) Σ_i ℓ*(g_i)|``.
        reach : float
            A bound on such ``f``: ``y + g`` of squared and Huber losses, the outputs of any at the residual itself.
        """
        return reach * float(left.sum()) / n


class CrossEntropy(Loss):
    """``ℓ(f, y) = log Σ_k exp f_k − ⟨y, f⟩`` for a probability vector ``y`` (one-hot for class labels).

    ``ℓ*(g) = Σ_k p_k log p_k`` with ``p = y + g``, finite where ``p`` is a probability vector.
    """

    name = "cross-entropy"

    # log Σ exp f − ⟨y, f⟩ = log1p(Σ_{k ≠ top} exp(f_k − f_top)) + Σ_k y_k (f_top − f_k): however small, nothing cancels
    def value(self, f: Tensor, y: Tensor) -> Tensor:
        f, y, dim = _classes_along(f, y)
        top, at = f.max(dim, keepdim=True)
        below = top - f
        others = below.neg().exp().scatter(dim, at, 0.0).sum(dim)
        return (others.log1p() + (y * below).sum(dim)).sum(-1)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        # Of a class whose probability is nearly 1 the difference has lost what the others still know.
        g = _over_classes(torch.softmax, f) - y
        return g - y * g.sum(-1, keepdim=True)

    def rough_value(self, f: Tensor, y: Tensor) -> Tensor:
        return -(y * _over_classes(torch.log_softmax, f)).sum((-2, -1))

    def value_and_residual(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        log_p = _over_classes(torch.log_softmax, f)
        return -(y * log_p).sum((-2, -1)), log_p.exp() - y

    def mean_hessian(self, f: Tensor, y: Tensor) -> Tensor:
        p = _over_classes(torch.softmax, f).flatten(0, 1)
        return (torch.diag(p.sum(0)) - p.T @ p) / len(f)

    def conjugate(self, g: Tensor, y: Tensor) -> Tensor:
        p = y + g
        tiny = 64 * torch.finfo(p.dtype).eps  # g / (1 + tiny) may be in the domain where g is not
        outside = (torch.add(p, y, alpha=tiny).amin(-1) < 0) | ((p.sum(-1) - 1).abs() > tiny * p.shape[-1])
        # Where p is nearly 1, what y + g was rounded by is much of −p log p. It is known exactly, and d(p log p) ≈ dp.
        rounded = (y - p).add_(g)
        terms = rounded.sub_(torch.special.entr(p.clamp_min_(0)))
        return torch.where(outside, torch.inf, terms.sum(-1)).sum(-1)

    def scale_limit(self, g: Tensor, y: Tensor) -> float:
        # p = y + τ g ≥ 0 wherever g < 0
        return float(torch.where(g < 0, y / -g, torch.inf).min())

    def without_sum(self, g: Tensor, y: Tensor, excess: Tensor, targets: Tensor, rows: int) -> Tensor:
        # Of every class with too much probability each sample gives the same share, to the classes with too little.
        share = (excess.clamp_min(0) / (targets + excess)).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
        missing = excess.neg().clamp_min(0)
        if not missing.any():
            return g
        given = (y + g) * share
        return g - given + given.sum(-1, keepdim=True) * (missing / missing.sum())

    def cost_of_sum(self, left: Tensor, targets: Tensor, value: float, reach: float, n: int) -> float:
        # Entropy falls by at most the share that a class gives, and by δ where a probability rises by δ.
        share = float(torch.where(left > 0, 2 * left / targets, 0.0).max())
        return min(1.0, share) * value + float(left.sum()) / n

    def hessian_times(self, f: Tensor, y: Tensor, z: Tensor) -> Tensor:
        p = _over_classes(torch.softmax, f)
        return p * (z - (p * z).sum(-1, keepdim=True))

    def hessian_root(self, f: Tensor, y: Tensor, z: Tensor) -> Tensor:
        # (D^½ − p√pᵀ)(D^½ − √p pᵀ) = D − ppᵀ for D = diag(p), Σ p = 1
        p = _over_classes(torch.softmax, f)
        rooted = p.sqrt() * z
        return rooted - p * rooted.sum(-1, keepdim=True)


def _over_classes(function: Callable[[Tensor, int], Tensor], f: Batch) -> Batch:
    """`torch.softmax` or `torch.log_softmax` of every row of outputs, in the layout that is fast for it."""
    if f.shape[-1] > FEW_CLASSES and f.stride(-1) == 1:
        return function(f, -1)
    return function(f.movedim(-1, 0), 0).movedim(0, -1)


def _classes_along(f: Batch, y: Batch) -> tuple[Tensor, Tensor, int]:
    """Both in the layout in which sums over classes are fast, and the dimension of the classes in it."""
    if f.shape[-1] > FEW_CLASSES and f.stride(-1) == 1:
        return f, y, -1
    return f.movedim(-1, 0).contiguous(), y.movedim(-1, 0), 0


class Squared(Loss):
    """``ℓ(f, y) = ½‖f − y‖²``, ``ℓ*(g) = ½‖g‖² + ⟨g, y⟩``."""

    name = "squared"

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).square().sum((-2, -1)) / 2

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return f - y

    def hessian_times(self, f: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return z

    hessian_root = hessian_times

    def conjugate(self, g: Tensor, y: Tensor) -> Tensor:
        return (g.square() / 2 + g * y).sum((-2, -1))

    def scale_limit(self, g: Tensor, y: Tensor) -> float:
        return float("inf")


class Huber(Loss):
    """``ℓ(f, y) = Σ h(f − y)``, ``h(t) = t²/2`` for ``|t| ≤ δ`` else ``δ|t| − δ²/2``.

    ``ℓ*(g) = ½‖g‖² + ⟨g, y⟩`` where every ``|g| ≤ δ``.

    Parameters
    ----------
    delta : float
        ``δ > 0``, the residual beyond which the loss grows linearly, in units of the targets.
    """

    name = "huber"

    def __init__(self, delta: float = 1.0) -> None:
        if not delta > 0:
            raise InputError(f"huber's delta must be positive, got {delta}")
        self.delta = float(delta)

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        t = (f - y).abs()
        inner = t.clamp_max(self.delta)
        return (inner * (t - inner / 2)).sum((-2, -1))

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).clamp(-self.delta, self.delta)

    def hessian_times(self, f: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return z * ((f - y).abs() <= self.delta)

    hessian_root = hessian_times  # zeros and ones

    def conjugate(self, g: Tensor, y: Tensor) -> Tensor:
        inside = (g.abs() <= self.delta * (1 + 8 * torch.finfo(g.dtype).eps)).all(-1).all(-1)
        return torch.where(inside, (g.square() / 2 + g * y).sum((-2, -1)), torch.inf)

    def scale_limit(self, g: Tensor, y: Tensor) -> float:
        largest = float(g.abs().max())
        return self.delta / largest if largest > 0 else float("inf")


LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in (CrossEntropy, Squared, Huber)}


def make_loss(loss: Any) -> Loss:
    """The loss called ``loss``, or the instance itself."""
    return loss if isinstance(loss, Loss) else LOSSES[choose("loss", loss, LOSSES)]()
