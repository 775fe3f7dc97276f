"""One cell of a table: a head with an activation, trained to a certified optimum and, beside it, the usual way.

1. `fit_path`: a warm-started path over β, whose validation accuracy chooses β;
2. `train_with_adam`: the same head with m atoms by Adam at that β, the learning rate chosen, over several seeds.

Every fit and every training run is a piece of its own, kept in the run's folder.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from convexhead.baselines.adam import train_adam
from convexhead.estimators import ConvexHeadClassifier
from convexhead.experiments.query_settings import QuerySettings
from convexhead.experiments.splits import Part, Splits
from convexhead.experiments.tuning import Tuned, tune
from convexhead.fitting import pose
from convexhead.modules import HeadModule
from convexhead.path import best, regularization_path
from convexhead.persistence import load
from convexhead.program.heads.attentive import Attentive
from convexhead.program.problem import Problem
from convexhead.runtime.run_folder import Piece, RunFolder
from convexhead.tokens.store.view import SplitView

Array = NDArray[Any]
SCORED = 500
"""Number of images that a network scores at a time. Chosen by hand."""


@dataclass(frozen=True)
class Cell:
    """A head with an activation."""

    head: str
    activation: str
    outputs: str = "shared"

    @property
    def title(self) -> str:
        """The head's name in tables."""
        return self.head if self.outputs == "shared" else f"{self.head} {self.outputs}"

    @property
    def name(self) -> str:
        """Its name in files."""
        return f"{self.title}-{self.activation}".replace(" ", "-")


@dataclass(frozen=True)
class PathSettings:
    """How the convex heads are trained.

    Attributes
    ----------
    beta_ratios : tuple of float
        The path over ``β/β_max``.
    patience : int
        It ends after this many fits in a row without a better validation score.
    tol : float
        Certified relative gap of the fit that validation chooses.
    search_tol : float
        Relative gap, as the solver estimates it, at which the others end.
    n_gates : int
        Of the gated ReLU.
    queries : QuerySettings
        Of the attentive head.
    relu_seconds : float
        After which a fit of a true ReLU head, which need not end, keeps its best weights.
    seed : int
        Of gates and random starts.
    """

    beta_ratios: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01, 0.003)
    patience: int = 2
    tol: float = 1e-3
    search_tol: float = 2e-2
    n_gates: int = 8
    queries: QuerySettings = field(default_factory=QuerySettings)
    relu_seconds: float = 40.0
    seed: int = 0


@dataclass(frozen=True)
class AdamSettings:
    """How the same heads are trained by Adam.

    Attributes
    ----------
    heads : tuple of int
        ``m``, the numbers of atoms; none: as many as the convex head found, and at least ``spare_heads``.
    seeds : tuple of int
        Of start and order; none: no runs.
    tuning_seeds : int
        Seeds that every learning rate is tried with; the others are run at the best one only.
    learning_rates : tuple of float
    chosen_by : {"objective", "validation"}
        What the best learning rate has: the lowest training objective, or the highest validation accuracy.
    trained_queries : int
        Queries of a probe of the attentive head whose queries are trained too: the head's first, from which it starts.
        0: no such runs.
    adamw : bool
        Whether AdamW, whose decoupled decay minimises something else, is run too, with as many atoms as validation
        prefers for Adam with the L2 term in the loss.
    epochs, batch_size : int
    """

    heads: tuple[int, ...] = ()
    spare_heads: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: int = 1
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    chosen_by: str = "objective"
    trained_queries: int = 16
    adamw: bool = False
    epochs: int = 100
    batch_size: int = 256

    def more(self, cell: Cell) -> list[str]:
        """Ways to train a cell beside Adam with the L2 term in the loss, each with one number of atoms."""
        queries = cell.head == "attentive" and self.trained_queries > 0
        return ["decoupled"] * self.adamw + ["queries"] * queries

    def runs(self, options: int) -> int:
        """How many runs it takes to tune one of ``options``."""
        tuning = min(self.tuning_seeds, len(self.seeds))
        return options * tuning + len(self.seeds) - tuning


# -- the convex head --------------------------------------------------------------------------------------------------
def fit_path(splits: Splits, settings: PathSettings, cell: Cell, folder: RunFolder) -> Piece:
    """Train along the path and keep what validation chooses: the record of the path, and the estimator on disk."""
    channels = splits.train.tokens.shape[2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the table shows every gap
        path = regularization_path(
            splits.train.tokens,
            splits.train.labels,
            beta_ratios=settings.beta_ratios,
            X_val=splits.validation.tokens,
            y_val=splits.validation.labels,
            patience=settings.patience,
            search_tol=settings.search_tol,
            head=cell.head,
            activation=cell.activation,
            outputs=cell.outputs,
            n_blocks=channel_groups(channels, len(splits.class_names) if cell.outputs == "grouped" else 0),
            grid=splits.grid,
            tol=settings.tol,
            n_gates=settings.n_gates,
            **asdict(settings.queries),
            max_time=settings.relu_seconds if cell.activation == "relu" else None,
            random_state=settings.seed,
        )
    chosen = best(path)
    model = chosen["model"]
    model.save(folder.model(cell.name))
    weights = [model.coef_] if hasattr(model, "coef_") else [*model.mixing_, *model.values_]
    kept = ("beta_ratio", "objective", "relative_gap", "seconds")
    return Piece(
        {
            "head": cell.title,
            "activation": cell.activation,
            "beta_ratio": chosen["beta_ratio"],
            "beta": chosen["beta"],
            "validation_accuracy": chosen["val_score"],
            "certificate": model.certificate_.to_dict(),
            "heads": model.n_heads_,
            "seconds": sum(point["seconds"] for point in path),
            "fit_seconds": chosen["seconds"],
            "parameters": int(sum(w.size for w in weights)),
            "history": model.history_,
            "singular_values": [block.tolist() for block in model.singular_values_],
            "path": [
                {key: point[key] for key in kept}
                | {"validation_accuracy": point["val_score"], "heads": point["n_heads"]}
                for point in path
            ],
        }
    )


def channel_groups(channels: int, outputs: int = 0, wanted: int = 4) -> int:
    """The most groups, up to ``wanted``, that divide the channels (and the outputs, where these are grouped too)."""
    return max(b for b in range(1, wanted + 1) if channels % b == 0 and outputs % b == 0)


# -- the same head by Adam -------------------------------------------------------------------------------------------
@dataclass
class AdamRuns:
    """The runs of one way to train (``"l2"``, ``"decoupled"`` or ``"queries"``) with ``n_heads`` atoms.

    ``"queries"``: Adam with the L2 term in the loss, and queries that are trained too.
    """

    optimizer: str
    n_heads: int
    tuned: Tuned


def train_with_adam(splits: Splits, settings: AdamSettings, cell: Cell, folder: RunFolder) -> list[AdamRuns]:
    """One `AdamRuns` for each number of atoms, and those of `AdamSettings.more`, at the β of the chosen convex head."""
    if not settings.seeds:
        return []
    model = load(folder.model(cell.name))
    problem = cache(lambda queries: problem_of(model, splits.train, queries))  # prepared if something is left to run
    numbers = settings.heads or (max(settings.spare_heads, model.n_heads_),)
    if cell.head == "linear":
        numbers = (1,)  # it has no atoms to number

    def runs(how: str, m: int) -> AdamRuns:
        queries = settings.trained_queries if how == "queries" else None
        tuned = tune(
            folder,
            settings.learning_rates,
            settings.seeds,
            tuning_seeds=settings.tuning_seeds,
            name=lambda lr: f"{cell.name}/{how}-{m}-lr{lr:g}",
            run=lambda lr, seed: _train(problem(queries), model, splits.validation, settings, how, m, lr, seed),
            chosen_by=settings.chosen_by,
        )
        return AdamRuns(how, m, tuned)

    coupled = [runs("l2", m) for m in numbers]
    m = preferred(coupled).n_heads
    return coupled + [runs(how, m) for how in settings.more(cell)]


def preferred(adam: list[AdamRuns]) -> AdamRuns:
    """Those of the same objective whose number of atoms validation prefers."""
    same = [runs for runs in adam if runs.optimizer == "l2"]
    return max(same, key=lambda runs: mean(runs.tuned.runs, "validation_accuracy"))


def mean(pieces: Sequence[Piece], key: str) -> float:
    """Mean of the finite values; minus infinity where there is none."""
    values = [value for piece in pieces if (value := piece.record.get(key)) is not None]
    return statistics.fmean(values) if values else -math.inf


def problem_of(model: ConvexHeadClassifier, train: Part, queries: int | None = None) -> Problem:
    """The training problem of a fitted head, with its gates or its first ``queries``; None: with all of them."""
    own = None if model.queries_ is None else model.queries_[:queries]
    same = ConvexHeadClassifier(**{**model.get_params(), "gates": model.gates_, "queries": own})
    return pose(same, train.tokens, train.labels).problem


def _train(
    problem: Problem,
    model: ConvexHeadClassifier,
    validation: Part,
    settings: AdamSettings,
    how: str,
    n_heads: int,
    lr: float,
    seed: int,
) -> Piece:
    result = train_adam(
        problem,
        model.beta_,
        n_heads=n_heads,
        lr=lr,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=seed,
        weight_decay_mode="decoupled" if how == "decoupled" else "l2",
        train_queries=how == "queries",
    )
    scores = network_scores(result.module, validation.tokens)
    return Piece(
        {
            "seed": seed,
            "learning_rate": lr,
            "optimizer": result.optimizer,
            "n_heads": n_heads,
            "beta": model.beta_,
            "identity": None if how == "queries" else problem.identity,
            "objective": finite(result.objective),
            "convex_objective": finite(result.convex_objective),
            "validation_accuracy": top(scores, model.classes_, validation.labels),
            "seconds": result.seconds,
            "parameters": sum(p.numel() for p in result.module.parameters()),
            "history": [{"seconds": h.seconds, "objective": finite(h.objective)} for h in result.history],
        },
        {name: value.cpu() for name, value in result.module.state_dict().items() if name != "gates"},
    )


def restore_network(model: ConvexHeadClassifier, weights: dict[str, torch.Tensor]) -> HeadModule:
    """The network that a run of `train_with_adam` left, from its weights and the gates of its convex head.

    Where it trained queries of its own they are among the weights, and may be fewer than the convex head's.
    """
    gates, head = model.model_.gates, model.model_.head
    if "queries" in weights:
        head = Attentive(head.s, head.d, queries=weights["queries"], query_norm=model.query_norm)
    module = HeadModule(
        head,
        model.activation,
        gates,
        weights["block"],
        weights["values"].shape[-1],
        intercept="intercept" in weights,
        dtype=weights["values"].dtype,
        seed=None,
    )
    state = weights if gates is None else {**weights, "gates": gates}
    module.load_state_dict(state)
    return module


# -- scores -----------------------------------------------------------------------------------------------------------
def network_scores(module: torch.nn.Module, tokens: SplitView | Array) -> Array:
    """Logits ``(n, c)`` of a network, not differentiated."""
    weights = next(module.parameters())
    parts = (torch.from_numpy(tokens[start : start + SCORED]).to(weights) for start in range(0, len(tokens), SCORED))
    with torch.no_grad():
        return np.concatenate([module(part).cpu().numpy() for part in parts])


def top(scores: Array, classes: Array, labels: Array, k: int = 1) -> float:
    """Share of the images whose label is among the ``k`` classes with the highest ``scores (n, c)``."""
    ranked = classes[np.argsort(-np.nan_to_num(scores, nan=-np.inf), axis=1, kind="stable")[:, :k]]
    return float((ranked == labels[:, None]).any(1).mean())


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
