"""Passes over the features of the linear head, for weights and intercept in one matrix.

    B = [Wᵀ b] (c, d + 1),    f = Φ Bᵀ,    Φ = [X 1] with a row for each row of outputs

The head's mixing weight is the number 1 and is not learned: its pooled tokens are ``X``. Every method is one pass over
the samples in batches, and what is summed over samples is summed over processes. Outputs lie in memory class by class,
which makes products and softmax of few classes several times faster.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from convexhead.program.atoms import Atoms
from convexhead.program.heads.base import Data
from convexhead.program.moments import Moments
from convexhead.program.operator import has_fast_bfloat16
from convexhead.program.problem import Problem
from convexhead.runtime.freed_memory import return_freed_memory

Weights = Float[Tensor, "c d1"]
LARGE = 1e8
"""Multiplications of a product from which bfloat16 is looked at. Chosen by hand: below it other work counts more."""

KEPT = 1 << 26
"""Bytes of features in bfloat16 that are kept beside those at hand. Chosen by hand: little memory, 64 MB."""


class LinearPasses:
    """Products with ``Φ`` and ``Φᵀ``; without an intercept the last column of ``B`` is 0.

    Parameters
    ----------
    problem : Problem
        Of the linear head.

    Attributes
    ----------
    problem : Problem
        The same with targets class by class; its precision is that of all products.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem.class_by_class()
        self.d = problem.head.d
        self._halves: dict[int, Tensor] = {}

    @cached_property
    def room(self) -> Float[Tensor, "n r c"]:
        """Room for one array of outputs, in the precision of products.

        It is used again and again: to free such arrays between others leaves holes that nothing fits into.
        """
        return self.zeros(self.problem.dtype)

    def give_up_room(self) -> None:
        """Free the `room`; it is made anew when it is needed."""
        vars(self).pop("room", None)

    def zeros(self, dtype: torch.dtype) -> Float[Tensor, "n r c"]:
        """Outputs, class by class."""
        n, r, c = len(self.problem.losses), self.problem.head.r, self.problem.c
        return torch.zeros(c, n, r, dtype=dtype, device=self.problem.device).movedim(0, 2)

    def outputs(
        self, B: Weights, dtype: torch.dtype | None = None, *, into: Float[Tensor, "n r c"] | None = None
    ) -> Float[Tensor, "n r c"]:
        """``Φ Bᵀ``, kept in another precision than that of the product where one is given."""
        out = self.zeros(dtype or self.problem.dtype) if into is None else into

        def make(rows: slice, data: Data) -> tuple[Tensor, ...]:
            out[rows] = self._pushed(data["queries"].flatten(0, 1), B)
            return ()

        self.problem.operator.over_batches(1, make)
        return out

    def outputs_of(self, atoms: Atoms, *, copy: bool = False) -> Float[Tensor, "n r c"]:
        """The same of a model, in float64: those that are kept, or made now; not to be changed without ``copy``."""
        recent = self.problem.operator.samples.recent
        kept = None if recent is None else recent.of(atoms)
        if kept is None:
            return self.outputs(as_matrix(atoms).to(self.problem.dtype), torch.float64)
        return kept.clone() if copy else kept

    def adjoint(self, R: Float[Tensor, "n r c"]) -> Weights:
        """``Rᵀ Φ``."""
        return self._summed(lambda rows, X: self._pulled(X, R[rows]))

    def gradient(self, f: Float[Tensor, "n r c"]) -> Weights:
        """``∇F = Rᵀ Φ``, from outputs in float64: what is left of a probability near 1 counts. It uses the `room`."""
        R, losses = self.room, self.problem.losses
        for rows in self.problem.rows:
            R[rows] = losses.at(rows).to(torch.float64).residual(f[rows]) / self.problem.n
        return self.adjoint(R).double()

    @cached_property
    def half_pays(self) -> bool:
        """Whether products in bfloat16 are much faster, in all processes."""
        problem = self.problem
        large = problem.n * problem.head.r * self.d * problem.c >= LARGE
        fast = large and problem.dtype == torch.float32 and has_fast_bfloat16(problem.device)
        return not problem.ranks.largest(not fast)[0]

    def curved(self, f: Float[Tensor, "n r c"], B: Weights, *, rough: bool = False) -> Weights:
        """``(1/n) (∇²ℓ(f) Φ Bᵀ)ᵀ Φ``; roughly, from products in bfloat16, which keep 8 bits of features and ``B``."""

        def multiply(rows: slice, X: Tensor) -> Tensor:
            if not rough:
                half, Z = None, self._pushed(X, B)
            else:
                half = self._half(rows, X)
                Z = self._as_outputs((B[:, :-1].bfloat16() @ half.T).float().add_(B[:, -1:]))
            return self._pulled(X, self.problem.losses.at(rows).hessian_times(f[rows], Z), half)

        return self._summed(multiply).div_(self.problem.n)

    def _half(self, rows: slice, X: Float[Tensor, "m d"]) -> BFloat16[Tensor, "m d"]:
        """Features in bfloat16, kept where all of them are small: to convert them takes as long as a product."""
        if rows.start in self._halves:
            return self._halves[rows.start]
        half = X.bfloat16()
        if 2 * self.problem.n * self.problem.head.r * self.d <= KEPT:
            self._halves[rows.start] = half
        return half

    def take(self, index: Int[Tensor, " m"], into: Float[Tensor, "m d1"]) -> None:
        """Copy the rows of ``Φ`` with these numbers, of this process's samples; without an intercept they end in 0."""
        r = self.problem.head.r
        into[:, -1] = float(self.problem.fit_intercept)

        def copy(rows: slice, data: Data) -> tuple[Tensor, ...]:
            X, first = data["queries"].flatten(0, 1), rows.start * r
            here = (index >= first) & (index < first + len(X))
            into[here, :-1] = X[index[here] - first]
            return ()

        self.problem.operator.over_batches(1, copy)

    def moments(self, *, diagonal: bool) -> Moments:
        """The second moments ``ΦᵀΦ / (n r)``, or their diagonal; made once for all problems with these samples."""
        kept = self.problem.operator.samples.moments
        if diagonal not in kept:
            kept[diagonal] = Moments(self._moments_of(diagonal), intercept=self.problem.fit_intercept)
            return_freed_memory(kept[diagonal].second.nbytes)
        return kept[diagonal]

    def _moments_of(self, diagonal: bool) -> Tensor:
        d, problem = self.d, self.problem
        second = torch.zeros((d,) if diagonal else (d, d), dtype=torch.float64, device=problem.device)
        first = torch.zeros(d, dtype=torch.float64, device=problem.device)

        def add(rows: slice, data: Data) -> tuple[Tensor, ...]:
            X = data["queries"].flatten(0, 1)
            return X.square().sum(0) if diagonal else X.T @ X, X.sum(0)

        problem.operator.over_batches(1, add, second, first)
        second, first = (part / (problem.n * problem.head.r) for part in problem.sum(second, first))
        if diagonal:
            return torch.cat([second, torch.ones_like(second[:1])])
        first = torch.cat([first, torch.ones_like(first[:1])])
        return torch.cat([torch.cat([second, first[None, :-1]]), first[:, None]], dim=1)

    def _pushed(self, X: Float[Tensor, "m d"], B: Weights) -> Float[Tensor, "b r c"]:
        return self._as_outputs(torch.addmm(B[:, -1:], B[:, :-1], X.T))

    def _as_outputs(self, f: Float[Tensor, "c m"]) -> Float[Tensor, "b r c"]:
        return f.unflatten(1, (-1, self.problem.head.r)).movedim(0, 2)

    def _pulled(
        self, X: Float[Tensor, "m d"], R: Float[Tensor, "b r c"], half: BFloat16[Tensor, "m d"] | None = None
    ) -> Weights:
        R = R.movedim(2, 0).flatten(1)
        last = R.sum(1, keepdim=True) if self.problem.fit_intercept else torch.zeros_like(R[:, :1])
        return torch.cat([R @ X if half is None else (R.bfloat16() @ half).float(), last], dim=1)

    def _summed(self, part: Callable[[slice, Tensor], Tensor]) -> Weights:
        out = torch.zeros(self.problem.c, self.d + 1, dtype=self.problem.dtype, device=self.problem.device)
        self.problem.operator.over_batches(1, lambda rows, data: (part(rows, data["queries"].flatten(0, 1)),), out)
        return self.problem.sum(out)[0]


def as_matrix(atoms: Atoms) -> Weights:
    """``B`` of the linear head's one atom, or a gradient in it."""
    return torch.cat([atoms.V[0], atoms.intercept.unsqueeze(0)]).T.contiguous()


def as_atoms(B: Weights, like: Atoms) -> Atoms:
    """Its atom, with the mixing weight that ``like`` has."""
    return Atoms(like.U.to(B.dtype), B[:, :-1].T.contiguous().unsqueeze(0), like.block, B[:, -1].clone())
