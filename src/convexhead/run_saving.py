"""A run is saved as a folder: the model, and beside it what a report shows of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convexhead.estimator_choice import Estimator
from convexhead.reading import LOSSES
from convexhead.report import evidence
from convexhead.tokens import TokenStore


def save_run(
    model: Estimator,
    out: Path,
    store: str | Path,
    command: Sequence[str],
    **choice: Any,
) -> None:
    """The model, and beside it what a report shows of it; ``choice`` says how β was chosen."""
    model.save(out)
    pooled = model.pool is not None
    if model.loss != LOSSES["classes"][0] or (pooled and model.model_.any_length):  # a report shows classes on a grid
        return
    evidence.write(evidence.collect(model, TokenStore.open(store), command=command, **choice), out)
