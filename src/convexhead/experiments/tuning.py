"""Tuning by trial: every option with the first seeds, the best one with the others; every run is kept in the folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from convexhead.runtime.run_folder import Piece, RunFolder

Option = TypeVar("Option")


@dataclass
class Tuned:
    """What a search left.

    Attributes
    ----------
    runs : list of Piece
        Of the chosen option, one a seed.
    tried : list of Piece
        All runs, these included: what the search cost.
    """

    runs: list[Piece]
    tried: list[Piece]

    @property
    def seconds(self) -> float:
        """Of all runs together."""
        return float(sum(piece.record["seconds"] for piece in self.tried))


def tune(
    folder: RunFolder,
    options: Sequence[Option],
    seeds: Sequence[int],
    *,
    tuning_seeds: int,
    name: Callable[[Option], str],
    run: Callable[[Option, int], Piece],
    chosen_by: str = "validation",
) -> Tuned:
    """Run every option with the first ``tuning_seeds`` seeds, and the best of them with all.

    Parameters
    ----------
    options
        Learning rates, for example.
    seeds
        At least one.
    name
        Of an option's runs, in files.
    run
        Trains; its record has ``validation_accuracy`` and ``objective``, None where the run diverged.
    chosen_by : {"validation", "objective"}
        The highest mean validation accuracy over the seeds, or the lowest objective.
    """

    def runs(option: Option, some: Sequence[int]) -> list[Piece]:
        return [folder.once(f"{name(option)}-seed{seed}", lambda seed=seed: run(option, seed)) for seed in some]  # type: ignore[misc]

    first, others = seeds[:tuning_seeds], seeds[tuning_seeds:]
    tried = [runs(option, first) for option in options]
    best = max(range(len(options)), key=lambda i: _score([piece.record for piece in tried[i]], chosen_by))
    more = runs(options[best], others)
    return Tuned(tried[best] + more, [piece for group in tried for piece in group] + more)


def _score(records: list[dict[str, Any]], chosen_by: str) -> float:
    """Mean over seeds, higher is better; what diverged is worse than everything else."""
    if any(record["objective"] is None for record in records):
        return -math.inf
    if chosen_by == "validation":
        return float(np.mean([record["validation_accuracy"] for record in records]))
    return -float(np.mean([record["objective"] for record in records]))
