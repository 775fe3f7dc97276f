"""A loss of the user's own, tried on a few numbers: a certificate is as right as its conjugate.

For random outputs ``f, f'``, targets ``y`` of the data, ``g = ∇ℓ(f, y)`` and ``τ ∈ [0, 1]``

    ℓ(f', y) ≥ ℓ(f, y) + ⟨g, f' − f⟩                      convex, and the residual is its (sub)gradient
    ℓ(f', y) + ℓ*(τ g, y) ≥ ⟨τ g, f'⟩                     Fenchel and Young: the conjugate is large enough
    ℓ(f, y) + ℓ*(g, y) = ⟨g, f⟩                            and no larger

The first is tried at distances from 1e-4 up, so that a wrong derivative cannot hide behind convexity.
"""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor

from convexhead.errors import InputError
from convexhead.program.losses import LOSSES, Loss

SAMPLES = 8
"""Number of targets that a loss is tried on."""
SCALES = (0.1, 1.0, 3.0)
"""Distances between the outputs tried and the targets, in units of ``1 + max |y|``. Chosen by hand."""
TOLERANCE = 1e-9
"""Largest relative difference of the two sides of a formula. Chosen by hand: far more than rounding."""


def check_loss(loss: Loss, Y: Shaped[Tensor, "n r c"]) -> None:
    """Raise `InputError` with what fails, and where, unless ``loss`` is one of the library's or keeps the contract."""
    if type(loss) in LOSSES.values() or not len(Y):
        return
    name = type(loss).__name__
    y = Y[:: max(1, len(Y) // SAMPLES)][:SAMPLES].cpu().double()
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(y.shape, generator=generator, dtype=torch.float64)

    def must(holds: Tensor, what: str, f: Tensor) -> None:
        if not bool(holds.all()):
            i = int((~holds).nonzero()[0, 0])
            raise InputError(
                f"loss {name} cannot be certified: {what}, at outputs {_few(f[i])} and targets {_few(y[i])}"
            )

    try:
        for scale in SCALES:
            unit = scale * (1 + float(y.abs().max()))
            f = y + unit * normal()
            value, g = loss.value(f, y), loss.residual(f, y)
            for result, method, shape in ((value, "value", y.shape[:1]), (g, "residual", y.shape)):
                if result.shape != shape:
                    raise InputError(f"loss {name}: {method} returned {tuple(result.shape)}, needed is {tuple(shape)}")
            must(torch.isfinite(value) & torch.isfinite(g).flatten(1).all(1), "value or residual is not finite", f)
            both = loss.value_and_residual(f, y)
            same = torch.isclose(both[0], value) & torch.isclose(both[1], g).flatten(1).all(1)
            must(same, "value_and_residual differs from value and residual", f)
            for far in (1e-4, 1e-2, 1.0):
                other = f + far * unit * normal()
                rise, slope = loss.value(other, y) - value, _inner(g, other - f)
                size = value.abs() + loss.value(other, y).abs() + (g * (other - f)).abs().flatten(1).sum(1)
                must(rise >= slope - TOLERANCE * size, "it is not convex, or residual is not its gradient", f)
            conjugate = loss.conjugate(g, y)
            if conjugate.shape != y.shape[:1]:
                raise InputError(f"loss {name}: conjugate returned {tuple(conjugate.shape)}, needed is ({len(y)},)")
            must(torch.isfinite(conjugate), "conjugate is not finite at the residual", f)
            size = value.abs() + conjugate.abs() + ((f.abs() + y.abs()) * g.abs()).flatten(1).sum(1)
            touching = (value + conjugate - _inner(g, f)).abs() <= TOLERANCE * size
            must(touching, "value + conjugate is not <residual, outputs> at the residual", f)
            limit = loss.scaled_domain(f, y)
            must(torch.tensor([limit >= 1.0]), "scaled_domain is below 1", f)
            for tau in (0.0, 0.3, 0.9, min(limit, 2.0)):
                conjugate = loss.conjugate(tau * g, y)
                must(torch.isfinite(conjugate), f"conjugate is not finite at {tau:g} times the residual", f)
                for far in (0.1, 1.0):
                    other = f + far * unit * normal()
                    value_there, inner = loss.value(other, y), tau * _inner(g, other)
                    size = value_there.abs() + conjugate.abs() + tau * (g * other).abs().flatten(1).sum(1)
                    young = value_there + conjugate >= inner - TOLERANCE * size
                    must(young, f"value + conjugate is below <g, outputs> for g = {tau:g} times a residual", other)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"loss {name} fails on float64 tensors (n, r, c) = {tuple(y.shape)}: {error}") from error


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _few(x: Tensor) -> str:
    numbers = [f"{value:.4g}" for value in x.flatten()[:4].tolist()]
    return "[" + ", ".join(numbers) + (", ...]" if x.numel() > 4 else "]")
