"""The program restricted to some mixing directions, for heads whose values are few: a small dense problem.

    Z_j = A_j N_j:     minimise over N   F(Σ_j 𝒜_j(A_j N_j)) + β Σ_j ‖N_j‖_*

with orthonormal ``A_j (p, m)`` that span the model and the leading left singular directions of the gradient matrices,
the last round's beside this one's: with these the rounds converge much faster, as Krylov methods do.
Where one value has few entries, a gradient matrix ``(p, e·c)`` is cheap to form, all its singular directions are
known, and nothing has to be left out on the right side. What is left is solved as any small problem is: see
`convexhead.solvers.fista`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.linalg.krylov import independent
from convexhead.program.atoms import Atoms
from convexhead.program.problem import Problem
from convexhead.solvers.base import Stop
from convexhead.solvers.dense import DensePasses
from convexhead.solvers.fista import Fista
from convexhead.solvers.monitor import Monitor
from convexhead.solvers.pricing import Directions

MOST_VALUES = 128
"""Largest number of entries of a value for which gradient matrices are formed. Chosen by hand."""
MOST_FORMED = 5e7
"""Numbers that these gradient matrices may take. Chosen by hand."""
MOST_FEATURES = 2e7
"""Numbers that the features of the chosen directions may take. Chosen by hand."""
FIRST = 400
"""Directions of all blocks together that a model without atoms is solved over; later twice those of its widest block.
Far from the optimum most directions seem to matter and few will."""
MARGIN = 0.3
"""Relative margin: left singular directions with ``σ > (1 − MARGIN) β`` are taken. Chosen by hand."""
MOST_ITERATIONS = 3000
SINGLE = 1e-3
"""Relative gap down to which a restricted problem is solved with its features in single precision: further down line
searches would be misled by rounding."""


class Restriction(DensePasses):
    """Passes over ``N``; see the module's text.

    Parameters
    ----------
    problem : Problem
    left : Tensor (j, p, m)
        ``A``: orthonormal columns, or zero ones.
    dtype : torch.dtype
        Precision of the features.
    """

    def __init__(self, problem: Problem, left: Float[Tensor, "j p m"], dtype: torch.dtype) -> None:
        j, _, m = left.shape
        blocks = torch.arange(j, device=left.device).repeat_interleave(m)
        mixed = problem.operator.mixed(left.mT.reshape(-1, *problem.head.mixing_shape), blocks)
        self.problem, self.left = problem.astype(torch.float64).class_by_class(), left.double()
        self.features = mixed.flatten(0, 1).flatten(1).T.to(dtype).contiguous()
        mean = self._taken_off(self.features, 1)
        self.mean = None if mean is None else mean.flatten()
        e, c = problem.value_shape
        self.shape = (j, m, e * c)
        self.mask = self._output_mask()

    @staticmethod
    def affordable(problem: Problem, atoms: Atoms) -> bool:
        """Whether gradient matrices may be formed, and there is room for twice the model's directions."""
        q = problem.head.value_rows * problem.c
        if q > MOST_VALUES or problem.n_blocks * problem.head.mixing_size * q > MOST_FORMED:
            return False
        widest = max(1, int(torch.bincount(atoms.block, minlength=1).max()))
        return room(problem) >= 2 * widest

    def _rotate(self, atoms: Atoms) -> Atoms:
        U = atoms.U.new_zeros(len(atoms), self.left.shape[2])
        for j, mine in self._by_block(atoms):
            U[mine] = atoms.U[mine].flatten(1) @ self.left[j]
        return replace(atoms, U=U)

    def _rotate_back(self, atoms: Atoms) -> Atoms:
        U = atoms.U.new_zeros(len(atoms), self.left.shape[1])
        for j, mine in self._by_block(atoms):
            U[mine] = atoms.U[mine] @ self.left[j].T
        return replace(atoms, U=U.view(-1, *self.problem.head.mixing_shape))


def room(problem: Problem) -> int:
    """Directions a block for whose features there is room."""
    return int(MOST_FEATURES / (problem.n * problem.head.r * problem.head.value_rows * problem.n_blocks))


def all_directions(problem: Problem, R: Float[Tensor, "n r c"]) -> Directions:
    """Every singular triple of every gradient matrix, formed."""
    blocks = torch.arange(problem.n_blocks, device=R.device)
    G = problem.operator.gradient_matrices(R, blocks)
    values, right = torch.linalg.eigh((G.mT @ G).double())
    sigma, right = values.flip(1).clamp_min(0).sqrt(), right.flip(2).to(G.dtype)
    left = G @ right / sigma.unsqueeze(1).clamp_min(torch.finfo(G.dtype).tiny).to(G.dtype)
    return Directions(sigma.to(G.dtype), left, right)


def leading_left(directions: Directions, beta: float) -> Float[Tensor, "j p w"]:
    """The left directions that matter at weight ``beta``, largest first; zero columns where a block has fewer."""
    chosen = directions.sigma > (1 - MARGIN) * beta
    return (directions.left * chosen.unsqueeze(1))[:, :, : int(chosen.sum(1).max())]


def solve_restricted(
    problem: Problem, atoms: Atoms, left: Float[Tensor, "j p w"], beta: float, *, until: float, monitor: Monitor
) -> Atoms:
    """The model after a solve over its span and the directions ``left``, to the relative gap ``until`` there."""
    dtype = problem.dtype if until > SINGLE else torch.float64
    passes = Restriction(problem, _left_span(problem, atoms, left), dtype)
    start = atoms.to(problem.device, torch.float64)
    return solve_over(passes, start, beta, until=until, monitor=monitor).to(problem.device, problem.dtype)


def solve_over(passes: DensePasses, start: Atoms, beta: float, *, until: float, monitor: Monitor) -> Atoms:
    """The model after a solve over given features, to the relative gap ``until`` there.

    Where rounding of products hides the way, features in single precision become double ones.
    """
    own = replace(monitor, callback=None, save=None, history=[], dual=-torch.inf)  # bounds of the restriction alone
    while True:
        method = Fista(passes.problem, beta, start, own, dense=passes)
        method.most_steps = MOST_ITERATIONS // method.check_every
        rounding = method.advance(until) is Stop.STALLED and method.iterations < MOST_ITERATIONS
        start = method.atoms()
        if not rounding or passes.features.dtype == torch.float64:
            return start
        passes.features = passes.features.double()


def _left_span(problem: Problem, atoms: Atoms, left: Float[Tensor, "j p w"]) -> Float[Tensor, "j p m"]:
    """Orthonormal bases of the model's mixing weights and, up to a number, of directions that are not zero."""
    widest = int(torch.bincount(atoms.block, minlength=1).max())
    bases, most = [], min(room(problem), max(1, 2 * widest, FIRST // len(left)))
    for block, more in enumerate(left):
        weights = atoms.U[atoms.block == block].flatten(1).T
        more = more[:, more.any(0)][:, : max(0, most - weights.shape[1])]
        bases.append(independent(torch.cat([weights, more], dim=1)))
    span = left.new_zeros(len(bases), problem.head.mixing_size, max(basis.shape[1] for basis in bases))
    for out, basis in zip(span, bases, strict=True):
        out[:, : basis.shape[1]] = basis
    return span
