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
    separates: ClassVar[str] = "samples"
    """Of what ``ℓ`` is a sum, each with a weight of its own: "samples", "rows" of outputs, or "entries"."""

    @abstractmethod
    def value(self, f: Batch, y: Batch) -> Float[Tensor, " n"]:
        """``ℓ(f_i, y_i)``."""

    @abstractmethod
    def residual(self, f: Batch, y: Batch) -> Batch:
        """``∇_f ℓ(f_i, y_i)``."""

    @abstractmethod
    def conjugate(self, g: Batch, y: Batch) -> Float[Tensor, " n"]:
        """``ℓ*(g_i, y_i)``, ``+inf`` outside its domain."""

    def summed_hessian(self, f: Batch, y: Batch, weights: Tensor | None) -> Float[Tensor, "c c"]:
        """``Σ_i ω_i ∇²ℓ`` summed over rows: the Hessian of the losses in an intercept. By `hessian_times`, one output
        at a time; override where a formula is cheaper. ``weights``: ``ω``, broadcast to ``f``; None where all are 1."""
        units = torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
        weights = torch.ones_like(f[:1, :1, :1]) if weights is None else weights
        return torch.stack([(weights * self.hessian_times(f, y, e.expand_as(f))).sum((0, 1)) for e in units])

    def hessian_times(self, f: Batch, y: Batch, z: Batches) -> Batches:
        """``∇²ℓ(f_i, y_i) z_i`` for one ``z (n, r, c)`` or for many. By a forward derivative of `residual`, one ``z``
        after another; override where a formula is cheaper."""
        if z.ndim > f.ndim:
            return torch.stack([self.hessian_times(f, y, one) for one in z])
        return torch.func.jvp(lambda f: self.residual(f, y), (f,), (z,))[1]

    def curvature(self, f: Batch, y: Batch) -> Batch:
        """The diagonal of ``∇²ℓ(f_i, y_i)``. By `hessian_times`, once for a loss that is a sum over entries, else once
        for each of them; override where a formula is cheaper."""
        if self.separates == "entries":
            return self.hessian_times(f, y, torch.ones_like(f))
        out = torch.empty_like(f)
        for row in range(f.shape[1]):
            for k in range(f.shape[2]):
                unit = torch.zeros_like(f)
                unit[:, row, k] = 1.0
                out[:, row, k] = self.hessian_times(f, y, unit)[:, row, k]
        return out

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
        self, q: Batch, y: Batch, excess: Float[Tensor, " c"], targets: Float[Tensor, " c"], total: Float[Tensor, " c"]
    ) -> Batch:
        """Points near ``q``, in the domain of ``ℓ*``, whose weighted sum is less by ``excess``.

        Where the domain is not a whole space, subtracting the mean as here may lead out of it: override.

        Parameters
        ----------
        q, y : Tensor (n, r, c)
            Points and targets of some of the samples.
        excess, targets, total : Tensor (c,)
            ``Σ ω q``, ``Σ ω y`` and ``Σ ω`` over all samples and rows.
        """
        return q - excess / total

    def cost_of_sum(
        self,
        left: Float[Tensor, " c"],
        targets: Float[Tensor, " c"],
        total: Float[Tensor, " c"],
        value: float,
        reach: float,
        n: int,
    ) -> float:
        """How much ``(1/n) Σ_i ω_i ℓ*(q_i)`` rises, at most, as `without_sum` takes away a ``|Σ_i ω_i q_ik| ≤ left_k``.

        As ``ℓ*`` is convex, at most ``⟨f, Δ⟩`` for ``f ∈ ∂ℓ*`` at the point reached.

        Parameters
        ----------
        value : float
            ``|(1/n) Σ_i ω_i ℓ*(q_i)|``.
        reach : float
            A bound on such ``f``: ``y + q`` of squared and Huber losses, the outputs of any at the residual itself.
        """
        return reach * float(left.sum()) / n


class CrossEntropy(Loss):
    """``ℓ(f, y) = log Σ_k exp f_k − ⟨y, f⟩`` for a probability vector ``y`` (one-hot for class labels).

    ``ℓ*(g) = Σ_k p_k log p_k`` with ``p = y + g``, finite where ``p`` is a probability vector.
    """

    name = "cross-entropy"
    separates = "rows"

    # log Σ exp f − ⟨y, f⟩ = log1p(Σ_{k ≠ top} exp(f_k − f_top)) − Σ_k y_k (f_k − f_top): however small, nothing cancels
    def value(self, f: Tensor, y: Tensor) -> Tensor:
        f, y, dim = _classes_along(f, y)
        top, at = f.max(dim, keepdim=True)
        below = f - top
        others = below.exp().scatter(dim, at, 0.0).sum(dim)
        return (others.log1p() - (y * below).sum(dim)).sum(-1)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        # Of a class whose probability is nearly 1 the difference has lost what the others still know.
        g = _over_classes(torch.softmax, f) - y
        return torch.addcmul(g, y, g.sum(-1, keepdim=True), value=-1)

    def rough_value(self, f: Tensor, y: Tensor) -> Tensor:
        return -(y * _over_classes(torch.log_softmax, f)).sum((-2, -1))

    def value_and_residual(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        log_p = _over_classes(torch.log_softmax, f)
        return -(y * log_p).sum((-2, -1)), log_p.exp() - y

    def summed_hessian(self, f: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        p = _over_classes(torch.softmax, f)
        weighed = (p if weights is None else weights * p).flatten(0, 1)
        return torch.diag(weighed.sum(0)) - p.flatten(0, 1).T @ weighed

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

    def without_sum(self, q: Tensor, y: Tensor, excess: Tensor, targets: Tensor, total: Tensor) -> Tensor:
        # Of every class with too much probability each sample gives the same share, to the classes with too little.
        share = (excess.clamp_min(0) / (targets + excess)).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
        missing = excess.neg().clamp_min(0)
        if not missing.any():
            return q
        given = (y + q) * share
        return q - given + given.sum(-1, keepdim=True) * (missing / missing.sum())

    def cost_of_sum(self, left: Tensor, targets: Tensor, total: Tensor, value: float, reach: float, n: int) -> float:
        # Entropy falls by at most the share that a class gives, and by δ where a probability rises by δ.
        share = float(torch.where(left > 0, 2 * left / targets, 0.0).max())
        return min(1.0, share) * value + float(left.sum()) / n

    def hessian_times(self, f: Tensor, y: Tensor, z: Tensor) -> Tensor:
        p = _over_classes(torch.softmax, f)
        pz = p * z
        return torch.addcmul(pz, p, pz.sum(-1, keepdim=True), value=-1)

    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        p = _over_classes(torch.softmax, f)
        return p * (1 - p)

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


class BinaryCrossEntropy(Loss):
    """``ℓ(f, y) = Σ_k log(1 + exp f_k) − y_k f_k`` for ``y_k`` in [0, 1]: several labels at once, or none.

    ``ℓ*(g) = Σ_k p_k log p_k + (1 − p_k) log(1 − p_k)`` with ``p = y + g``, finite where ``p`` is in [0, 1]. A positive
    weight of the ones, ``ω y log(1 + exp −f) + (1 − y) log(1 + exp f)``, is a weight ``ω y + 1 − y`` of an entry whose
    target is its share ``ω y / (ω y + 1 − y)``: see `with_positive_weights`.
    """

    name = "binary-cross-entropy"
    separates = "entries"

    # softplus(f) − y f = log(1 + exp −|f|) + (1 − y) f where f > 0, − y f where not: nothing cancels
    def value(self, f: Tensor, y: Tensor) -> Tensor:
        tail = f.abs().neg().exp().log1p()
        return (tail + torch.where(f > 0, (1 - y) * f, -y * f)).sum((-2, -1))

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        # p − y = (1 − y) − (1 − p), of which the smaller of p and 1 − p is known
        small = torch.sigmoid(-f.abs())
        return torch.where(f > 0, (1 - y) - small, small - y)

    def value_and_residual(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.value(f, y), self.residual(f, y)

    def conjugate(self, g: Tensor, y: Tensor) -> Tensor:
        rest = 1 - y
        p, other = y + g, (rest - g) + ((1 - rest) - y)  # 1 − y to twice the precision: it may cancel
        tiny = 64 * torch.finfo(p.dtype).eps  # g / (1 + tiny) may be in the domain where g is not
        outside = ((p < -tiny * y) | (other < -tiny * (1 - y))).flatten(1).any(1)
        p, other = p.clamp(0, 1), other.clamp(0, 1)
        # The larger of the two is known to within the last bit of 1, and its logarithm from the smaller one.
        small = torch.minimum(p, other)
        entropy = torch.xlogy(small, small) + (1 - small) * torch.log1p(-small)
        return torch.where(outside, torch.inf, entropy.sum((-2, -1)))

    def scale_limit(self, g: Tensor, y: Tensor) -> float:
        # 0 ≤ y + τ g ≤ 1
        return float(torch.where(g == 0, torch.inf, torch.where(g < 0, y, 1 - y) / g.abs()).min())

    def without_sum(self, q: Tensor, y: Tensor, excess: Tensor, targets: Tensor, total: Tensor) -> Tensor:
        # Every sample gives the same share of what is too much: of p, or of 1 − p where the sum of p is too small.
        down = (excess.clamp_min(0) / (targets + excess)).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
        up = (excess.neg().clamp_min(0) / (total - targets - excess)).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
        return q - (y + q) * down + ((1 - y) - q) * up

    def cost_of_sum(self, left: Tensor, targets: Tensor, total: Tensor, value: float, reach: float, n: int) -> float:
        # h((1 − s) p) ≤ (1 − s) h(p) for h(p) = p log p + (1 − p) log(1 − p), since h(0) = 0; so for 1 − p
        room = torch.minimum(targets, total - targets) - 64 * torch.finfo(total.dtype).eps * total
        share = torch.where(room > 0, left / room, torch.inf)
        return min(1.0, float(torch.where(left > 0, share, 0.0).max())) * value

    def hessian_times(self, f: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return _variance(f) * z

    def hessian_root(self, f: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return _variance(f).sqrt() * z


def _variance(f: Tensor) -> Tensor:
    """``p (1 − p)`` for ``p`` the sigmoid of ``f``."""
    small = torch.sigmoid(-f.abs())
    return small * (1 - small)


def with_positive_weights(Y: Batch, positive: Float[Tensor, " c"]) -> tuple[Batch, Float[Tensor, "n r c"]]:
    """Targets and weights of entries for which `BinaryCrossEntropy` is the one with a weight of the ones."""
    weights = positive * Y + (1 - Y)
    return torch.where(weights > 0, positive * Y / weights, Y), weights


class Squared(Loss):
    """``ℓ(f, y) = ½‖f − y‖²``, ``ℓ*(g) = ½‖g‖² + ⟨g, y⟩``."""

    name = "squared"
    separates = "entries"

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
    separates = "entries"

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


LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in (CrossEntropy, BinaryCrossEntropy, Squared, Huber)}


def make_loss(loss: Any) -> Loss:
    """The loss called ``loss``, or the instance itself."""
    return loss if isinstance(loss, Loss) else LOSSES[choose("loss", loss, LOSSES)]()
