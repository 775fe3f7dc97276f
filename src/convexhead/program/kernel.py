"""Inner products of the samples' features, for heads whose outputs are products with one feature vector a sample.

    f_i = φ_iᵀ Z + b,     K = Φ Φᵀ,  K_ij = φ_iᵀ φ_j

Whatever the number of features, ``K`` has as many rows as there are samples.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.program.operator import Operator

TOGETHER = 4096
"""Features whose products are summed in the precision of the features; sums of these are in float64. Chosen by hand."""
USUAL = 30
"""Features between ``2^-USUAL`` and ``2^USUAL`` are not scaled. Derived: their products are in the range of floats."""
SMALLEST = -120
"""Exponent of 2 below which features are not scaled further. Derived: in single precision one over it is a number."""
ROWS = 512
"""Rows of ``K`` that are made together. Chosen by hand: half of ``K`` is left out, as it is symmetric."""


def features_at_hand(operator: Operator) -> Float[Tensor, "n p"] | None:
    """``Φ`` if it is kept prepared; None where outputs are no such products, or features are made anew in each pass."""
    samples = operator.samples
    key = operator.head.feature_vector if operator.activation.name == "linear" else None
    return samples.data[key].flatten(1) if key is not None and samples.complete else None


def kernel_bytes(operator: Operator) -> int:
    """What `kernel_of` takes beside what is taken already."""
    return 0 if operator.dtype in operator.samples.kernels else 8 * len(operator) ** 2


def kernel_of(operator: Operator) -> Float[Tensor, "n n"]:
    """``K`` in float64, made once for all problems with these samples in one precision."""
    kernels = operator.samples.kernels
    if operator.dtype not in kernels:
        Phi = features_at_hand(operator)
        assert Phi is not None
        operator.budget.take(kernel_bytes(operator))
        # By a power of two, which rounds nothing: products of large or small features would leave the range of floats.
        exponent = math.frexp(float(torch.stack(Phi.aminmax()).abs().max()))[1]
        scale = 1.0 if abs(exponent) < USUAL else 2.0 ** -max(exponent, SMALLEST)
        K = torch.zeros(len(Phi), len(Phi), dtype=torch.float64, device=Phi.device)
        for i in range(0, len(Phi), ROWS):
            for j in range(0, Phi.shape[1], TOGETHER):
                part = Phi[i:, j : j + TOGETHER]
                part = part if scale == 1 else scale * part
                K[i:, i : i + ROWS] += part @ part[:ROWS].T
            own = K[i : i + ROWS, i : i + ROWS]
            own.copy_((own + own.T) / 2)
            K[i : i + ROWS, i + ROWS :] = K[i + ROWS :, i : i + ROWS].T
        kernels[operator.dtype] = K.div_(scale).div_(scale)
    return kernels[operator.dtype]
