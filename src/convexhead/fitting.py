"""From settings and data to a trained `Model`: pose the problem, solve it, keep what was found.

Several processes that share the samples do all of this together: they agree on data and settings first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from sklearn.exceptions import ConvergenceWarning

from convexhead import inputs
from convexhead.certificate.certificate import Certificate
from convexhead.drive import Solution, approach, solve
from convexhead.dual_norm.norm import NormOracle
from convexhead.errors import InputError, warn
from convexhead.linalg.deflation import spectral_norm
from convexhead.model import Model
from convexhead.program.activations import make_activation
from convexhead.program.atoms import Atoms
from convexhead.program.coordinates import Coordinates
from convexhead.program.heads import Head
from convexhead.program.intercept import solve_intercept
from convexhead.program.losses import make_loss
from convexhead.program.operator import Operator
from convexhead.program.patterns import all_gates, sample_patterns
from convexhead.program.problem import Problem
from convexhead.queries import make_queries, query_ball, token_draw, without_idle_queries
from convexhead.query_search import find_queries
from convexhead.reading import Data
from convexhead.runtime.checkpoint import Checkpoint
from convexhead.runtime.clock import after, never
from convexhead.runtime.ranks import SOFTWARE, Ranks, join_ranks
from convexhead.runtime.samples import default_memory
from convexhead.runtime.seeds import draw_seed
from convexhead.runtime.stored_tokens import Tokens
from convexhead.runtime.surroundings import undisturbed
from convexhead.scores import column_r_squared, share_right
from convexhead.solvers.monitor import Progress
from convexhead.spec import Spec
from convexhead.targets import is_multilabel

SMALL_TOKENS = 2e5
"""Numbers in all tokens up to which the solver works in float64 at any tolerance. Chosen by hand."""
TIGHT = 1e-4
"""Tolerance below which the solver always works in float64. Chosen by hand."""
TIGHT_PRODUCTS = 1e-6
"""The same for the linear head. Chosen by hand: products in float32 reached 1e-7."""


class Trainable(Protocol):
    """An estimator: a way to read data by its settings."""

    distributed: bool

    def read(self, X: Any, y: Any, sample_weight: Any = None) -> Data:
        """The settings and the data, checked: all that this process can do alone."""


def ranks_of(estimator: Trainable) -> Ranks:
    """The processes that share the samples."""
    return join_ranks() if estimator.distributed else Ranks()


@dataclass(eq=False)
class Task:
    """A problem to be trained, as settings and data pose it.

    Attributes
    ----------
    spec : Spec
    data : Data
    problem : Problem
        In the coordinates that serve a solver best, or as it is stated.
    generator : torch.Generator
        Of random starts; the gates were drawn from it.
    """

    spec: Spec
    data: Data
    problem: Problem
    generator: torch.Generator
    _reached: tuple[Model, torch.Tensor] | None = None  # the last model that was approached, and its outputs

    @cached_property
    def _late(self) -> Callable[[], bool]:
        """Whether to end what comes before a solve; all processes get the same answer."""
        late, ranks = after(self.spec.max_time), self.problem.ranks
        return lambda: bool(ranks.largest(late())[0])

    @cached_property
    def oracle(self) -> NormOracle | None:
        """Bounds the rewards of a ReLU: for `beta_max`, solvers and certificates. None for convex programs."""
        return None if self.problem.activation.convex else NormOracle(self.problem, late=self._late)

    @cached_property
    def beta_max(self) -> float:
        """The smallest weight at which the optimum is zero, of the problem as it is stated."""
        return beta_max_of(self.problem, self.generator, oracle=self.oracle, late=self._late)

    @property
    def beta(self) -> float:
        """The weight that the settings ask for."""
        largest = self.beta_max  # whatever β is: it is drawn for before the solver draws
        beta = self.spec.beta if self.spec.beta is not None else self.spec.beta_ratio * largest
        # Targets or features without signal have beta_max 0 and the zero model at any weight.
        return beta or self.problem.coordinates.user_beta(1.0)

    def at(self, beta_ratio: float) -> Task:
        """The same task at another ``β/β_max``, with the same `beta_max`."""
        _ = self.beta_max
        other = copy.copy(self)
        other.spec = replace(self.spec, beta_ratio=beta_ratio)
        return other

    @undisturbed()
    def solve(
        self,
        *,
        start: Atoms | None = None,
        callback: Callable[[Progress], None] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> tuple[Model, Solution]:
        """The certified model, and the solver's account.

        Warns
        -----
        ConvergenceWarning
            The requested gap was not reached.
        """
        limits = self._limits(start, callback)
        beta = self.problem.coordinates.beta(self.beta)
        solution = solve(self.problem, beta, tol=self.spec.tol, checkpoint=checkpoint, **limits)
        if not solution.certificate.converged:
            _warn(solution, self.spec.tol)
        history = [row.to_dict() for row in solution.history]
        model = self.model(self.problem.leave(solution.atoms), solution.certificate, history, solution.stop.value)
        return (without_idle_queries(model) if self.spec.searches_queries else model), solution

    @undisturbed()
    def approach(
        self, tol: float, *, start: Atoms | None = None, callback: Callable[[Progress], None] | None = None
    ) -> Model:
        """A model to be scored: its gap is about ``tol``, and it has no certificate."""
        limits = self._limits(start, callback)
        atoms, history, f = approach(self.problem, self.problem.coordinates.beta(self.beta), tol=tol, **limits)
        model = self.model(self.problem.leave(atoms), None, [row.to_dict() for row in history], "")
        self._reached = model, f.to(self.problem.dtype)
        return model

    def _limits(self, start: Atoms | None, callback: Callable[[Progress], None] | None) -> dict[str, Any]:
        """What a solver is told besides β and the tolerance."""
        quiet = not self.spec.verbose or self.problem.ranks.rank != 0
        return {
            "start": None if start is None else self.problem.enter(start),
            "solver": self.spec.solver,
            "max_heads": self.spec.max_heads,
            "max_time": self.spec.max_time,
            "callback": callback or (None if quiet else _print_progress),
            "generator": self.generator,
            "oracle": self.oracle,
        }

    def model(
        self,
        atoms: Atoms,
        certificate: Certificate | None,
        history: list[dict[str, float]],
        stop_reason: str,
        optimizer: str | None = None,
    ) -> Model:
        """The model of the user's ``atoms``, however they were trained."""
        activation = self.problem.activation
        gates = getattr(activation, "gates", None)
        order = torch.argsort(atoms.block, stable=True)
        return Model(
            spec=self.spec,
            head=self.problem.head,
            gates=None if gates is None else gates.cpu(),
            atoms=atoms.select(order).to("cpu", torch.float64),
            beta=self.beta,
            beta_max=self.beta_max,
            certificate=certificate,
            history=history,
            stop_reason=stop_reason,
            optimizer=optimizer,
            **self.data.meaning(),
        )

    def score(self, model: Model) -> float:
        """Accuracy or R² on the tokens of the training, by all processes together."""
        problem, f = self.problem, self._outputs(model)
        counts, mine = self.data.counts, problem.ranks.share(problem.n)
        if model.classes is not None:
            right = share_right(f, problem.Y, is_multilabel(self.spec)).double()
            if counts is None:
                return problem.mean(right.mean(1))
            w = counts[mine].to(right).expand_as(right)
            hits, total = problem.sum(torch.stack([(w * right).sum(), w.sum()]))[0].tolist()
            return float(hits / total)
        both = torch.zeros(2, problem.n, *f.shape[1:], dtype=f.dtype, device=f.device)
        both[:, mine] = torch.stack([problem.Y, f])
        Y, f = problem.sum(both)[0].cpu()
        return column_r_squared(Y, f, self.data.weights)

    def _outputs(self, model: Model) -> torch.Tensor:
        """``f`` on the tokens of the training, which may be known."""
        if self._reached is not None and self._reached[0] is model:
            return self._reached[1]
        atoms, problem = self.problem.enter(model.atoms), self.problem
        f = None if (recent := problem.operator.samples.recent) is None else recent.of(atoms)
        return problem.outputs(atoms.to(problem.device, problem.dtype)) if f is None else f


# -- from an estimator and data to a task ------------------------------------------------------------------------------
@undisturbed()
def pose(
    estimator: Trainable, X: Any, y: Any, sample_weight: Any = None, *, to_solve: bool = False, **run: Any
) -> Task:
    """The task of these data, the same in all processes.

    Parameters
    ----------
    estimator : Trainable
    X, y, sample_weight
        As for its ``fit``.
    to_solve : bool
        In the coordinates that serve a solver best; else as it is stated.
    **run
        What else the processes must agree on, as JSON values.
    """
    data = _agreed(estimator, X, y, sample_weight, **run)
    spec, ranks = data.spec, ranks_of(estimator)
    if spec.searches_queries:
        raise InputError("queries='search' finds queries for one β: fit with it, and sample queries for all else")
    return _task(data, ranks, draw_seed(spec.random_state, ranks), to_solve)


@undisturbed()
def fit(
    estimator: Trainable,
    X: Any,
    y: Any,
    sample_weight: Any = None,
    *,
    callback: Callable[[Progress], None] | None = None,
    checkpoint: str | Path | None = None,
    minutes: float = 10.0,
) -> Model:
    """Train to the certified optimum; parameters as of ``ConvexHeadClassifier.fit``."""
    ranks = ranks_of(estimator)
    with ranks.all_or_none():
        folder = None if checkpoint is None else str(checkpoint)
        data = _agreed(estimator, X, y, sample_weight, run="fit", checkpoint=folder)
        spec = data.spec
        if checkpoint is None:
            return _task(data, ranks, draw_seed(spec.random_state, ranks), True).solve(callback=callback)[0]
        if spec.searches_queries:
            raise InputError("queries='search' has no checkpoints: leave checkpoint out")
        saved = Checkpoint(checkpoint, {**spec.facts(), **data.fingerprint}, minutes=minutes, ranks=ranks)
        task = _task(data, ranks, saved.notes.setdefault("seed", draw_seed(spec.random_state, ranks)), True)
        if "beta_max" in saved.notes:
            task.beta_max = saved.notes["beta_max"]
        saved.notes["beta_max"] = task.beta_max
        return task.solve(callback=callback, checkpoint=saved)[0]


def _agreed(estimator: Trainable, X: Any, y: Any, sample_weight: Any, **run: Any) -> Data:
    """The data, once all processes have the same data and settings, and the same ``run``."""

    def facts(data: Data) -> dict[str, Any]:
        # What is small, such as a decomposition, each process computes for itself: all must round alike.
        threads = {"number of threads": torch.get_num_threads()}
        device = inputs.pick_device(data.spec.device).type
        return {**run, **SOFTWARE, **threads, "device": device, **data.spec.facts(), **data.fingerprint}

    return ranks_of(estimator).agree(lambda: estimator.read(X, y, sample_weight), facts)


def _task(data: Data, ranks: Ranks, seed: int, to_solve: bool) -> Task:
    generator, spec = torch.Generator().manual_seed(seed), data.spec
    if spec.searches_queries:
        return _searched_task(data, ranks, generator)
    head = spec.make_head(*data.tokens.shape[1:], grid=data.grid, queries=make_queries(spec, data, generator))
    return Task(spec, data, _problem(data, ranks, head, generator, to_solve), generator)


def _searched_task(data: Data, ranks: Ranks, generator: torch.Generator) -> Task:
    """The task over the queries that a search finds at the β of the settings."""
    spec = data.spec
    if ranks.size > 1:
        raise InputError("queries='search' finds queries in one process: start it without torchrun")
    draw = token_draw(data)
    ball = query_ball(spec, data, draw)

    def pose_for(queries: torch.Tensor) -> Problem:
        head = spec.make_head(*data.tokens.shape[1:], grid=data.grid, queries=queries, ball=ball)
        return _problem(data, ranks, head, generator, True)

    def beta_of(largest: float) -> float:
        return spec.beta if spec.beta is not None else spec.beta_ratio * largest

    found, largest = find_queries(pose_for, ball, draw, beta_of, spec.tol, generator, after(spec.max_time))
    task = Task(spec, data, pose_for(ball.queries(found.z, found.place)), generator)
    task.beta_max = largest
    return task


def _problem(data: Data, ranks: Ranks, head: Head, generator: torch.Generator, to_solve: bool) -> Problem:
    """The problem of a head; where it is ``to_solve``, in the coordinates that serve a solver best."""
    spec = data.spec
    Y, loss, device = data.targets, make_loss(spec.loss), inputs.pick_device(spec.device)
    X = data.tokens if data.padded is None else data.padded.scaled(head)
    gates = _make_gates(spec, head, X, generator)
    activation, coordinates = make_activation(spec.activation, head, gates), Coordinates()
    if to_solve:
        coordinates = Coordinates.of(X, Y, head, activation, loss, spec.fit_intercept)
    rows = ranks.share(len(X))
    operator = Operator(
        X[rows] if isinstance(X, torch.Tensor) else X.share(rows),
        head,
        activation,
        dtype=precision(X.shape, spec.tol, head),
        reuse=not coordinates,
        device=device,
        memory=default_memory(device) if spec.max_memory is None else spec.max_memory,
        ranks=ranks,
    )
    weights = None if data.weights is None else data.weights[rows]
    problem = Problem(operator, Y[rows], loss, weights=weights, fit_intercept=spec.fit_intercept)
    return problem.in_coordinates(coordinates)


def precision(shape: Sequence[int], tol: float, head: Head) -> torch.dtype:
    """What a solver computes in, for tokens of this shape."""
    if not head.learns_mixing:  # its solver keeps in float64 all but the products
        return torch.float64 if tol < TIGHT_PRODUCTS else torch.float32
    return torch.float64 if math.prod(shape) <= SMALL_TOKENS or tol < TIGHT else torch.float32


def _make_gates(spec: Spec, head: Head, X: Tokens, generator: torch.Generator) -> torch.Tensor | None:
    if spec.activation != "gated-relu":
        return None
    if spec.gates is not None:
        return inputs.as_weights(spec.gates, "gates")
    if spec.n_gates == "all":
        return all_gates(head, X if isinstance(X, torch.Tensor) else X.read())
    return sample_patterns(head, X, int(spec.n_gates), generator)


# -- what a problem and a solution tell -------------------------------------------------------------------------------
def beta_max_of(
    problem: Problem,
    generator: torch.Generator,
    *,
    oracle: NormOracle | None = None,
    late: Callable[[], bool] = never,
) -> float:
    """``β_max = max_j ‖𝒜_j*(R at Z = 0)‖₂``: the smallest weight at which the optimum is zero.

    For a ReLU it is the dual norm ``h(R)``, or the largest value that a search finds where there is no tight bound,
    or it is ``late`` before there is one.
    """
    exact = problem.astype(torch.float64)
    f = exact.outputs(exact.empty())
    if exact.fit_intercept:
        f += solve_intercept(exact, f)
    R = exact.residual(f, out=f)  # one array of outputs, where they may be most of what is in memory
    if problem.activation.convex:
        largest = spectral_norm(exact.operator, R, generator, fast=problem.operator)
    else:
        oracle = (oracle or NormOracle(exact, late=late)).on(exact)
        maxima = oracle.search(R, generator=generator, late=late)
        largest = float(maxima.values[:1].sum())
        if oracle.tight:
            norm = oracle.bound(R, maxima, late=late)
            largest = norm.lower if norm.loose else norm.upper
    return problem.coordinates.user_beta_max(largest)


def _warn(solution: Solution, tol: float) -> None:
    certificate = solution.certificate
    told = f"certified relative gap {certificate.relative_gap:.2g} > tol={tol:g}"
    if certificate.scope == "estimated":
        told = f"estimated relative gap {certificate.estimated_gap:.2g}, tol={tol:g}"
    warn(f"{told}: {solution.stop.value}", ConvergenceWarning)


def _print_progress(row: Progress) -> None:
    print(
        f"{row.seconds:8.2f} s  objective {row.objective:.6g}  gap {row.gap:.2g}  heads {row.heads}",
        flush=True,
    )
