"""What ``convexhead compare`` does: every head on a token store, beside Adam and a linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from convexhead.errors import InputError, choose, require
from convexhead.experiments.cells import AdamSettings, PathSettings
from convexhead.experiments.comparison import run
from convexhead.experiments.query_settings import QuerySettings
from convexhead.experiments.results import write_results
from convexhead.experiments.rows import Results
from convexhead.experiments.splits import splits_of_store
from convexhead.experiments.training import Settings, cells_of
from convexhead.program.activations import ACTIVATIONS
from convexhead.program.heads import HEADS
from convexhead.runtime.progress import Notify, silent
from convexhead.tokens import TokenStore


def compare_heads(
    store: str | Path,
    out: str | Path,
    *,
    heads: Sequence[str] = (),
    activations: Sequence[str] = ("linear", "gated-relu"),
    beta_ratios: Sequence[float] = (0.3, 0.1, 0.03, 0.01, 0.003),
    n_gates: int = 8,
    n_queries: int = 192,
    query_scale: float = 2.0,
    query_position: bool = True,
    key_dim: int | None = None,
    query_norm: str = "all",
    seeds: int = 3,
    tol: float = 1e-3,
    notify: Notify = silent,
    command: Sequence[str] = (),
) -> Results:
    """Train heads on a store and write tables, figures and a page into ``out``; the same call goes on where it stopped.

    Parameters
    ----------
    store, out : path
        Folders of a token store and of the comparison.
    heads, activations : sequence of str
        What to compare; no heads: all of them.
    beta_ratios : sequence of float
        The grid over ``β/β_max`` that validation chooses from.
    n_gates : int
        Of the gated ReLU.
    n_queries, query_scale, query_position, key_dim, query_norm
        Of the attentive head, see `ConvexHeadClassifier`.
    seeds : int
        Runs of Adam for each head; 0: none.
    tol : float
        Certified relative gap of the chosen heads.
    notify : callable
        Told of progress, see `convexhead.runtime.progress`.
    command : sequence of str
        What the page says to type to have it again.
    """
    require("jinja2", "report")
    require("matplotlib", "report")
    out = Path(out)
    chosen = [choose("head", head, HEADS) for head in heads] or list(HEADS)
    queries = QuerySettings(n_queries, query_scale, query_position, key_dim, query_norm)
    queries.check_used(chosen)
    cells = tuple(cells_of(chosen, [choose("activation", name, ACTIVATIONS) for name in activations]))
    if not cells:
        raise InputError("no head is left to train: linear and attentive heads have the linear activation only")
    settings = Settings(
        cells=cells,
        path=PathSettings(beta_ratios=tuple(beta_ratios), n_gates=n_gates, queries=queries, tol=tol),
        adam=AdamSettings(seeds=tuple(range(seeds))),
    )
    splits = splits_of_store(TokenStore.open(store))
    results = run(splits, settings, out, title=f"Every head on {Path(store).name}", notify=notify)
    results["reproduce"] = [list(command)] if command else []
    write_results(results, out)
    return results
