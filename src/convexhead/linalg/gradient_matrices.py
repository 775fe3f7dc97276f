"""The gradient matrices ``𝒜_j*(R)`` as operators, and formed where that is cheap.

    𝒜_j*(R) V  = mix_adjoint(R Vᵀ)  (p, b)        𝒜_j*(R)ᵀ U = Σ_i (P mix(X_i, U))ᵀ R_i  (q, b)

A product is one pass over the tokens. Where all entries cost less than a Krylov space would, the matrices are formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.program.operator import Operator

FORMED = 5_000_000
"""Numbers that the gradient matrices formed at a time may take. Chosen by hand: 40 MB in float64."""
MOST_FORMED = 5e7
"""Numbers of a gradient matrix up to which it is formed to be decomposed, outside of the budget. Chosen by hand."""
FORMED_BYTES = 4e9
"""Bytes that gradient matrices may take which stay formed, whatever the budget. Chosen by hand."""
MOST_PRODUCTS = 300
"""Products with a vector that a Krylov space takes in any case: forming a matrix pays up to this cost. Chosen by
hand."""
FORMED_ORDER = 2500
"""Largest order of a cheaply formed matrix of which all singular values are computed. Chosen by hand."""


class GradientMatrices:
    """``G_j = 𝒜_j*(R)`` for every block ``j`` as linear operators on batches of vectors.

    Parameters
    ----------
    operator : Operator
    R : Tensor (n, r, c)
        Residuals.
    form : bool
        Whether they may be formed.

    Notes
    -----
    Vectors are columns: ``V (j, q, b)`` and ``U (j, p, b)`` hold ``b`` of them for each of the ``j`` blocks named by
    ``blocks``; ``p = mixing_size`` and ``q = value_rows · c``.
    """

    def __init__(self, operator: Operator, R: Float[Tensor, "n r c"], *, form: bool = True) -> None:
        self.operator, self.R, self._form = operator, R, form
        self.value_shape = operator.head.value_rows, R.shape[-1]
        self.p, self.q = operator.head.mixing_size, math.prod(self.value_shape)
        free = operator.head.value_size(R.shape[-1])
        self.on_values = free <= self.p
        """Whether the Gram operator acts on the value side, the smaller one."""
        self.order = min(self.p, free)

    @cached_property
    def formed(self) -> Float[Tensor, "j p q"] | None:
        """Form the matrices where that costs less than a Krylov space, and there is room."""
        operator = self.operator
        size = operator.n_blocks * self.p * self.q * operator.dtype.itemsize
        if not self._form or operator.product_dtype != operator.dtype or not _cheap_to_form(self):
            return None
        if operator.ranks.largest(float(size > min(FORMED_BYTES, operator.budget.left)))[0]:
            return None
        operator.budget.lend(size, self)
        return operator.gradient_matrices(self.R, torch.arange(operator.n_blocks, device=self.R.device))

    def _product(self, x: Tensor, blocks: Tensor, shape: tuple[int, ...], times: Callable[..., Tensor]) -> Tensor:
        j, _, b = x.shape
        flat = x.transpose(1, 2).reshape(j * b, *shape)
        out = times(self.R, flat, blocks.repeat_interleave(b))
        return out.reshape(j, b, -1).transpose(1, 2)

    def times(self, V: Float[Tensor, "j q b"], blocks: Tensor) -> Float[Tensor, "j p b"]:
        """``G_j V_j``."""
        if self.formed is not None:
            return torch.stack([self.formed[j] @ x for j, x in zip(blocks.tolist(), V, strict=True)])
        return self._product(V, blocks, self.value_shape, self.operator.adjoint_times_values)

    def transpose_times(self, U: Float[Tensor, "j p b"], blocks: Tensor) -> Float[Tensor, "j q b"]:
        """``G_jᵀ U_j``."""
        if self.formed is not None:
            return torch.stack([self.formed[j].T @ x for j, x in zip(blocks.tolist(), U, strict=True)])
        return self._product(U, blocks, self.operator.head.mixing_shape, self.operator.adjoint_times_mixing)

    def gram(self, x: Float[Tensor, "j m b"], blocks: Tensor) -> Float[Tensor, "j m b"]:
        """``G_jᵀG_j x`` or ``G_jG_jᵀ x``, on the smaller side."""
        if self.on_values:
            return self.transpose_times(self.times(x, blocks), blocks)
        return self.times(self.transpose_times(x, blocks), blocks)

    def random_start(self, blocks: Tensor, b: int, generator: torch.Generator) -> Float[Tensor, "j m b"]:
        """Draw independent Gaussian vectors on the smaller side, in the subspace that the blocks write."""
        m = self.q if self.on_values else self.p
        x = torch.randn(len(blocks) * b, m, generator=generator, dtype=torch.float64)
        x = x.to(self.R.device, self.R.dtype)
        if self.on_values:
            x = x.view(-1, *self.value_shape)
            x = self.operator.head.mask_values(x, blocks.repeat_interleave(b)).flatten(1)
        return x.view(len(blocks), b, m).transpose(1, 2)


def worth_decomposing(G: GradientMatrices) -> bool:
    """Forming takes `order` products a block at most, and a decomposition; Krylov iteration some tens to hundreds."""
    if _cheap_to_form(G):
        return G.order <= FORMED_ORDER and G.p * G.q <= MOST_FORMED  # formed block by block
    return G.order <= 128 and G.p * G.q * G.operator.n_blocks <= MOST_FORMED


def _cheap_to_form(G: GradientMatrices) -> bool:
    cost = G.operator.gradient_cost(G.R.shape[-1])
    return cost is not None and cost.products <= MOST_PRODUCTS


def formed_norm(G: GradientMatrices) -> float:
    """Return ``max_j ‖G_j‖₂`` from eigenvalues of Gram matrices, some blocks at a time to save memory."""
    blocks = torch.arange(G.operator.n_blocks, device=G.R.device).split(max(1, FORMED // (G.p * G.q)))
    return max(_largest(G.operator.gradient_matrices(G.R, some)) for some in blocks)


def rounding_of_norm(p: int, q: int) -> float:
    """Bound the relative amount by which `formed_norm` may miss the norm of formed matrices ``(p, q)``, by LAPACK.

    With ``m`` the smaller side, ``l`` the larger one and ``u = 2⁻⁵³``, the error of the largest eigenvalue ``σ²`` is

    * ``2 u ‖G‖²_F`` of scaling and ``l u ‖G‖²_F`` of the Gram matrix, in any order of the sums; ``‖G‖²_F ≤ m σ²``;
    * ``16 m^2.5 u σ²`` of its tridiagonal form: ``m`` reflections from either side, each to within ``8 m u`` times the
      Frobenius norm, at most ``√m σ²`` (Higham, *Accuracy and Stability of Numerical Algorithms*, 2002, section 19.3);
    * ``180 m² u σ²`` of the QL iteration: at most ``30 m`` sweeps of ``m`` rotations, each to within ``6 u`` times σ².

    The error of ``σ`` is half of it all; the other half is in reserve.
    """
    m, unit = min(p, q), torch.finfo(torch.float64).eps / 2
    return unit * ((max(p, q) + 2) * m + 16 * m**2.5 + 180 * m**2)


def _largest(G: Float[Tensor, "j p q"]) -> float:
    """The largest singular value of all; scaled first, since squares of tiny entries would vanish."""
    scale = float(G.abs().max())
    G = G / (scale or 1.0)
    gram = G.mT @ G if G.shape[1] > G.shape[2] else G @ G.mT
    return scale * float(torch.linalg.eigvalsh(gram)[:, -1].max().clamp_min(0).sqrt())
