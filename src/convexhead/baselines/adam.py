"""The non-convex baseline: the same head with a fixed number of atoms, trained by Adam.

    min_{U,V,b}  Φ = F + (β/2) Σ_k (‖U_k‖² + ‖V_k‖²)                                                 (N)

With the L2 term in the loss, Adam minimises the problem that the convex program is equal to, at the same β:
its result lies at or above the certified optimum, and the distance says how far training stopped short. The
decoupled decay of AdamW shrinks the weights beside the loss and so minimises something else; it is offered
because many use it, and a `TrainingResult` says which of the two it was.

The queries of an attentive head are those of the problem, or trained as well, which is another problem: the one of the
field's attentive probes, with the tokens, maps over places, pooling and penalty of the certified head. See `passes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from convexhead.baselines.passes import ProblemPasses, QueryPasses, minibatches
from convexhead.errors import InputError, choose
from convexhead.modules import HeadModule
from convexhead.program.activations import GatedReLU
from convexhead.program.problem import Problem
from convexhead.runtime.clock import now

SCHEDULES = ("cosine", "constant")
OPTIMIZERS = {
    "l2": "Adam, L2 term in the loss",
    "decoupled": "AdamW, decoupled weight decay (a different objective)",
}
TRAINED_QUERIES = ", queries trained"
"""What is added to these where queries are trained."""
EVALUATIONS = 40
"""Largest number of full-data objectives that a run with minibatches records. Chosen by hand."""


@dataclass(frozen=True)
class TrainingRow:
    """One row of a run's history; recording it is not charged to ``seconds``."""

    seconds: float
    epoch: int
    objective: float

    def to_dict(self) -> dict[str, float]:
        """Return plain values, for JSON."""
        return asdict(self)


@dataclass
class TrainingResult:
    """What a training run left.

    Attributes
    ----------
    module : HeadModule
        The last iterate, as practised.
    objective : float
        Φ on all data in float64, infinite where the run diverged.
    convex_objective : float
        The convex program's objective at the same function: the factored penalty is replaced by the nuclear
        norm (for a ReLU by ``Σ_k ‖U_k‖‖V_k‖``), which balancing the factors reaches. Never above ``objective``.
    history : list of TrainingRow
        Φ along the run.
    seconds : float
        Of optimisation, evaluations of the history left out.
    optimizer : str
        What was run, in words.
    learning_rate : float
    seed : int
    """

    module: HeadModule
    objective: float
    convex_objective: float
    history: list[TrainingRow]
    seconds: float
    optimizer: str
    learning_rate: float
    seed: int


def train_adam(
    problem: Problem,
    beta: float,
    *,
    n_heads: int,
    lr: float,
    epochs: int,
    batch_size: int | None = None,
    seed: int = 0,
    schedule: str = "cosine",
    weight_decay_mode: str = "l2",
    train_queries: bool = False,
    callback: Callable[[TrainingRow], None] | None = None,
) -> TrainingResult:
    """Train the network of ``problem`` with ``n_heads`` atoms at weight ``beta``.

    Parameters
    ----------
    problem : Problem
        Its tokens, loss, intercept and precision are used; prepare it with ``reuse`` for speed.
    n_heads : int
        ``m``, atoms, spread evenly over the blocks of gates and channel groups. The linear head has one.
    lr : float
        Learning rate at the start; see `tune_learning_rate`.
    epochs : int
        Passes over the data.
    batch_size : int or None
        Samples a step; None takes all at once, without sampling noise.
    seed : int
        Of the start and of the order of samples.
    schedule : {"cosine", "constant"}
        ``cosine`` falls from ``lr`` to 0 over all steps.
    weight_decay_mode : {"l2", "decoupled"}
        ``l2``: β in the loss, the objective Φ. ``decoupled``: AdamW with weight decay β, not Φ.
    train_queries : bool
        Of an attentive head: queries, and log-weights of places where it has some, start at those of the problem and
        are trained. Φ is then no longer bounded by a certificate of the problem.
    callback : callable (TrainingRow) or None
        Called with every new row of the history.
    """
    size = min(batch_size or problem.n, problem.n)
    _check_options(n_heads, epochs, size, lr, beta)
    decoupled = choose("weight_decay_mode", weight_decay_mode, OPTIMIZERS) == "decoupled"
    module = make_network(problem, n_heads, seed)
    passes = (QueryPasses if train_queries else ProblemPasses)(module, problem)
    optimizer = _make_optimizer(module, lr, beta if decoupled else None)
    decay = _make_schedule(optimizer, schedule, epochs * math.ceil(problem.n / size))
    generator = torch.Generator().manual_seed(seed)
    clock, history = _Clock(), []
    every = max(1, math.ceil(epochs / EVALUATIONS))

    def record(epoch: int) -> float:
        with clock.paused():
            row = TrainingRow(clock.seconds(), epoch, passes.objective(beta))
            history.append(row)
            if callback is not None:
                callback(row)
        return row.objective

    record(0)
    for epoch in range(1, epochs + 1):
        for index in minibatches(problem.n, size, generator):
            passes.differentiate(index, 0.0 if decoupled else beta)
            optimizer.step()
            decay.step()
        if (epoch % every == 0 or epoch == epochs) and not math.isfinite(record(epoch)):
            break  # diverged: nothing will bring it back
    seconds = clock.seconds()
    module.zero_grad(set_to_none=True)
    objective, convex_objective = passes.objectives(beta)
    told = OPTIMIZERS[weight_decay_mode] + (TRAINED_QUERIES if train_queries else "")
    return TrainingResult(module, objective, convex_objective, history, seconds, told, lr, seed)


def _check_options(n_heads: int, epochs: int, batch_size: int, lr: float, beta: float) -> None:
    for what, number in (("n_heads", n_heads), ("epochs", epochs), ("batch_size", batch_size)):
        if not isinstance(number, int) or number < 1:
            raise InputError(f"{what} must be a positive integer, got {number!r}")
    if not (lr > 0 and beta > 0 and math.isfinite(lr) and math.isfinite(beta)):
        raise InputError(f"lr and beta must be positive and finite, got lr={lr!r}, beta={beta!r}")


def _make_optimizer(module: HeadModule, lr: float, weight_decay: float | None) -> torch.optim.Optimizer:
    """Adam, or AdamW with a decoupled decay."""
    if weight_decay is None:
        return torch.optim.Adam(module.parameters(), lr=lr)
    return torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)


def _make_schedule(optimizer: torch.optim.Optimizer, schedule: str, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate over ``steps`` steps, see `SCHEDULES`."""
    cosine = choose("schedule", schedule, SCHEDULES) == "cosine"
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: 0.5 + 0.5 * math.cos(math.pi * t / steps) if cosine else 1.0
    )


@dataclass
class Tuning:
    """The learning rate that a search chose: its run, and every run's ``(learning rate, score, seconds)``."""

    best: TrainingResult
    scores: list[tuple[float, float, float]]

    @property
    def learning_rate(self) -> float:
        return self.best.learning_rate

    @property
    def seconds(self) -> float:
        """Of all runs together: what tuning costs."""
        return sum(seconds for *_, seconds in self.scores)


def tune_learning_rate(
    train: Callable[[float], TrainingResult],
    learning_rates: Sequence[float],
    score: Callable[[TrainingResult], float] | None = None,
) -> Tuning:
    """Run ``train(lr)`` for every learning rate and keep the run with the highest score.

    Parameters
    ----------
    train : callable (float) -> TrainingResult
        For example ``lambda lr: train_adam(problem, beta, lr=lr, n_heads=20, epochs=100)``.
    learning_rates : sequence of float
    score : callable (TrainingResult) -> float, or None
        Higher is better: say, accuracy on a validation split. None: the lowest training objective.
    """
    if not learning_rates:
        raise InputError("give at least one learning rate")
    best: TrainingResult | None = None
    best_score, scores = -math.inf, []
    for lr in learning_rates:
        result = train(lr)
        diverged = not math.isfinite(result.objective)
        value = -math.inf if diverged else (score(result) if score is not None else -result.objective)
        scores.append((lr, value, result.seconds))
        if best is None or value > best_score:
            best, best_score = result, value
    assert best is not None
    return Tuning(best, scores)


def make_network(problem: Problem, n_heads: int, seed: int) -> HeadModule:
    """The untrained network of ``problem``: its start is scaled on up to 64 samples spread over the data."""
    activation = problem.activation
    module = HeadModule(
        problem.head,
        activation.name,
        activation.gates if isinstance(activation, GatedReLU) else None,
        n_heads,
        problem.c,
        intercept=problem.fit_intercept,
        dtype=problem.dtype,
        seed=None,
    ).to(problem.device)
    module.reset_parameters(seed, problem.operator.X[:: math.ceil(problem.n / 64)].to(problem.device))
    return module


class _Clock:
    """Time since it was made, without what ran inside ``paused``."""

    def __init__(self) -> None:
        self._began, self._paused_at = now(), 0.0

    def seconds(self) -> float:
        return (self._paused_at or now()) - self._began

    def paused(self) -> _Clock:
        return self

    def __enter__(self) -> None:
        self._paused_at = now()

    def __exit__(self, *_: object) -> None:
        self._began += now() - self._paused_at
        self._paused_at = 0.0
