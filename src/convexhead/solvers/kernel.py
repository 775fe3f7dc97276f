"""Column generation among combinations of the samples' features, for heads that have more features than samples.

    f = Φ Z + b,     Z = Z₀ + Φᵀ A,     K = Φ Φᵀ (n, n)

A gradient ``ΦᵀR`` is a combination of the samples' features, and so is every direction that is added to the model
``Z₀`` of the start. Directions are kept as their coefficients ``A``: their features are ``K A``, and the singular
values of the gradient are roots of the eigenvalues of ``RᵀKR (c, c)``. ``K`` costs as much as products with all
features for ``n/2`` outputs. After it a round costs one product ``K R``, however many features there are. What is
solved over the directions at hand is that of `convexhead.solvers.restriction`.

This is the kernel trick of kernel ridge regression with another penalty: a nuclear norm depends on inner products
alone, too (Abernethy, Bach, Evgeniou & Vert, JMLR 2009).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from convexhead.dual_norm.norm import NormOracle
from convexhead.errors import InputError
from convexhead.program.atoms import Atoms
from convexhead.program.kernel import features_at_hand, kernel_bytes, kernel_of
from convexhead.program.problem import Problem
from convexhead.solvers.base import Solver, Stop, scaled_dual
from convexhead.solvers.dense import DensePasses
from convexhead.solvers.monitor import State
from convexhead.solvers.restriction import MARGIN, MOST_VALUES, SINGLE, solve_over

KEPT = 128
"""Directions up to which those of all rounds are kept: with few outputs a round has few. Chosen by hand."""
LATE = 1e-2
"""Relative gap below which solves also take the last round's directions. Chosen by hand."""
DEPENDENT = 1e-10
"""Eigenvalue of the Gram matrix of unit directions below which they say the same. Chosen by hand: smaller ones would
need large coefficients, whose products in single precision are rounded as much more."""
LARGEST = 1e50
"""Norms of features, and one over them, stay below it. Derived: their fourth powers are then finite and not 0."""
PRODUCTS = 64
"""Products with all features, an output each, that a solve takes otherwise. Chosen by hand."""


@dataclass
class Combinations:
    """``m`` directions ``U₀ᵀ C + Φᵀ A (p, m)``: all fields are linear in them.

    Attributes
    ----------
    of_start : Tensor (k0, m)
        ``C``.
    of_samples : Tensor (n, m)
        ``A``.
    along_start : Tensor (k0, m)
        Inner products with the start's mixing weights ``U₀``.
    features : Tensor (n, m)
        Inner products with the samples' features.
    """

    of_start: Float[Tensor, "k0 m"]
    of_samples: Float[Tensor, "n m"]
    along_start: Float[Tensor, "k0 m"]
    features: Float[Tensor, "n m"]

    def __len__(self) -> int:
        return self.features.shape[1]

    def _fields(self) -> tuple[Tensor, ...]:
        return self.of_start, self.of_samples, self.along_start, self.features

    def __matmul__(self, T: Float[Tensor, "m l"]) -> Combinations:
        return Combinations(*(field @ T for field in self._fields()))

    def beside(self, other: Combinations) -> Combinations:
        """These, then the ``other``."""
        return Combinations(*(torch.cat(pair, dim=1) for pair in zip(self._fields(), other._fields(), strict=True)))

    def gram(self, other: Combinations) -> Float[Tensor, "m l"]:
        """All inner products."""
        return self.of_start.T @ other.along_start + self.of_samples.T @ other.features

    def orthonormal(self) -> Combinations:
        """Orthonormal directions with the same span."""
        S = self.gram(self)
        lengths = S.diagonal().clamp_min(torch.finfo(S.dtype).tiny).sqrt()
        values, Q = torch.linalg.eigh(S / lengths / lengths.unsqueeze(1))
        kept = values > DEPENDENT
        return self @ (Q[:, kept] / values[kept].sqrt() / lengths.unsqueeze(1))


class GivenFeatures(DensePasses):
    """Passes over the coefficients of orthonormal directions, given the features ``(n, m)`` of these."""

    def __init__(self, problem: Problem, features: Float[Tensor, "n m"], dtype: torch.dtype) -> None:
        self.problem = problem.class_by_class()
        self.features = features.T.to(dtype, copy=True).contiguous()
        mean = self._taken_off(self.features, 1)
        self.mean = None if mean is None else mean.flatten()
        self.shape = (1, features.shape[1], problem.c)
        self.mask = None

    def _rotate(self, atoms: Atoms) -> Atoms:
        return atoms

    def _rotate_back(self, atoms: Atoms) -> Atoms:
        return atoms


class KernelColumnGeneration(Solver):
    """Rounds that look for new directions, and then solve over all at hand.

    1. ``R = ∇F/n`` at the model, ``RᵀKR = W diag(σ²) Wᵀ``; stop where the gap between the model and the dual point of
       ``R`` is small.
    2. Solve over the span of the model and of the gradient's left singular directions ``Φᵀ R w/σ`` with
       ``σ > (1 − MARGIN) β``. Those of earlier rounds stay while they are few, and in the end the last round's.

    One `step` is one round. Parameters are those of `Solver`.
    """

    name = "kernel"
    bounds_heads = False
    most_steps = 200
    patience = 30
    """Rounds without a better gap after which a precision has given what it can."""

    _past: Combinations | None

    def _set_up(self, start: Atoms) -> None:
        # A run that is resumed is not asked before: it may have less memory now, or several processes.
        if (reason := self.lacks(self.problem, None)) is not None:
            raise InputError(
                f"solver={self.name!r}, which this run began with, needs {reason}: begin anew, or as before"
            )
        self.K, self.exact = kernel_of(self.problem.operator), self.problem.astype(torch.float64)
        self._begin_at(start)

    @classmethod
    def lacks(cls, problem: Problem, oracle: NormOracle | None) -> str | None:
        """Features that are kept, few outputs, one process, and memory for ``K``."""
        if problem.ranks.size > 1:
            return "a single process"
        if features_at_hand(problem.operator) is None:
            return "the attentive head with one norm for all queries, and memory for its features"
        if problem.c > MOST_VALUES:
            return f"at most {MOST_VALUES} outputs"
        if not 1 / LARGEST < float(problem.operator.samples.mix_bounds.max()) < LARGEST:
            return "features whose fourth powers are in the range of floating point"
        size, left = kernel_bytes(problem.operator), problem.operator.budget.left
        return f"{size / 1e9:.3g} GB where max_memory leaves {left / 1e9:.3g} GB" if size > left else None

    @classmethod
    def pays(cls, problem: Problem) -> bool:
        """Whether ``K`` takes less than what it saves: measured on CPUs alone."""
        return problem.device.type == "cpu" and problem.n <= min(problem.head.mixing_size, PRODUCTS * problem.c)

    def _begin_at(self, start: Atoms) -> None:
        """Take the mixing weights of ``start`` for directions."""
        n, k = self.problem.n, len(start)
        U = start.U.flatten(1).double()
        self._U0, self._past = start.U, None
        self._features0 = self.problem.operator.mixed(start.U, start.block).view(n, k).double()
        self._basis = Combinations(torch.eye(k).to(U), U.new_zeros(n, k), U @ U.T, self._features0).orthonormal()
        self._model = replace(start.to(U.device, torch.float64), U=self._basis.along_start)

    def begin(self) -> None:
        """Forget how the rounds went."""
        self._best, self._since = math.inf, 0

    def step(self) -> Stop | None:
        """Take one round."""
        problem, beta = self.exact, self.beta
        f = self._outputs()
        R = problem.residual(f)[:, 0]
        if problem.fit_intercept:
            R = R - R.mean(0)  # as if features had mean 0; what the intercept leaves is charged by itself
        KR = self.K @ R
        values, W = torch.linalg.eigh(R.T @ KR)
        sigma = values.clamp_min(0).sqrt()
        norm = float(sigma.max())
        objective = problem.data_term(f) + beta * problem.penalty(self._model)
        dual = scaled_dual(problem, f, norm, beta, self._model.intercept)
        gap = self.monitor.record(objective, dual, len(self._model))
        if gap <= self.target:
            return Stop.CONVERGED
        self._best, self._since = (gap, 0) if gap < 0.95 * self._best else (self._best, self._since + 1)
        chosen = sigma > (1 - MARGIN) * beta
        if self._since > self.patience or not chosen.any():
            return Stop.STALLED
        T = W[:, chosen] / sigma[chosen]
        none = R.new_zeros(len(self._U0), T.shape[1])
        self._solve_over(Combinations(none, R @ T, self._features0.T @ (R @ T), KR @ T), gap)
        return None

    def _solve_over(self, new: Combinations, gap: float) -> None:
        """Solve over the span of the model and of ``new`` directions."""
        model = self._basis @ self._model.U.T
        both = self._basis if len(self._basis) + len(new) <= KEPT else model
        if both is model and self._past is not None and gap <= LATE:
            both = both.beside(self._past)
        both = both.beside(new)
        basis, until = both.orthonormal(), 0.25 * gap
        passes = GivenFeatures(self.exact, basis.features, self.problem.dtype if until > SINGLE else torch.float64)
        start = replace(self._model, U=model.gram(basis))
        # All at once, or what is read after an interruption would not fit together.
        solved = solve_over(passes, start, self.beta, until=until, monitor=self.monitor)
        self._basis, self._model, self._past = basis, solved, new

    def _outputs(self) -> Float[Tensor, "n 1 c"]:
        model = self._model
        return (self._basis.features @ (model.U.T @ model.V[:, 0]) + model.intercept).unsqueeze(1)

    def atoms(self) -> Atoms:
        """Return the current model as atoms of the head."""
        problem, model = self.problem, self._model
        if not len(model):
            return replace(problem.empty(), intercept=model.intercept.to(problem.device, problem.dtype))
        of_start, of_samples = (part @ model.U.T for part in (self._basis.of_start, self._basis.of_samples))
        block = torch.zeros(1, dtype=torch.int64, device=problem.device)
        U = problem.operator.gradient_matrices(of_samples.to(problem.dtype).unsqueeze(1), block)[0].T
        U = U + of_start.T.to(problem.dtype) @ self._U0.flatten(1)
        here = model.to(problem.device, problem.dtype)
        return replace(here, U=U.reshape(-1, *problem.head.mixing_shape), block=block.expand(len(U)))

    def state(self) -> tuple[State, State]:
        """Return the model, the directions that it is made of, those of the last round, and how the rounds went."""
        going = torch.tensor([self._best, self._since], dtype=torch.float64)
        shared: State = {**self._model.state(), "round": going, "U0": self._U0}
        rows: State = {"features0": self._features0}
        for name, directions in (("basis", self._basis), ("past", self._past)):
            if directions is not None:
                shared |= {f"{name}.of_start": directions.of_start, f"{name}.along_start": directions.along_start}
                rows |= {f"{name}.of_samples": directions.of_samples, f"{name}.features": directions.features}
        return shared, rows

    def _restore(self, shared: State, rows: State) -> None:
        def directions(name: str) -> Combinations:
            fields = ("of_start", "of_samples", "along_start", "features")
            return Combinations(*((shared | rows)[f"{name}.{field}"] for field in fields))

        self._best, since = shared["round"].tolist()
        self._since, self._model = int(since), Atoms.restored(shared)
        self._U0, self._features0, self._basis = shared["U0"], rows["features0"], directions("basis")
        self._past = directions("past") if "past.features" in rows else None
