"""``convexhead adam``: the same head trained the usual, non-convex way."""

from __future__ import annotations

import functools
import warnings
from typing import Annotated, Any

from rich.markup import escape
from typer import Option

from convexhead.cli.entry import command
from convexhead.cli.options import (
    Activation,
    Beta,
    BetaRatio,
    Blocks,
    Device,
    FitIntercept,
    Gates,
    Head,
    Json,
    KeyDim,
    Out,
    Outputs,
    Overwrite,
    Pool,
    Queries,
    QueryNorm,
    QueryPosition,
    QueryScale,
    Seed,
    Store,
    Whiten,
    pool_of,
)
from convexhead.cli.output import emit, typed_command
from convexhead.cli.progress import shown_progress

Heads = Annotated[int, Option("--heads", help="Heads (atoms) of the network.")]
LearningRate = Annotated[float, Option(help="Learning rate of Adam.")]
Epochs = Annotated[int, Option(help="Passes over the images.")]
BatchSize = Annotated[int, Option(help="Images in a step.")]
KEPT = "Adam had not finished, and nothing was written; run the same command again"


@command(KEPT)
def adam(
    store: Store,
    out: Out,
    head: Head = "self-attention",
    activation: Activation = "linear",
    beta_ratio: BetaRatio = 0.05,
    beta: Beta = None,
    n_heads: Heads = 20,
    lr: LearningRate = 0.01,
    epochs: Epochs = 60,
    batch_size: BatchSize = 256,
    pool: Pool = "mean",
    whiten: Whiten = 0.0,
    n_gates: Gates = 50,
    n_blocks: Blocks = 4,
    outputs: Outputs = "shared",
    n_queries: Queries = 192,
    query_scale: QueryScale = 2.0,
    query_position: QueryPosition = True,
    key_dim: KeyDim = None,
    query_norm: QueryNorm = "all",
    fit_intercept: FitIntercept = False,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train the same head by Adam, the usual non-convex way; `audit` then says how far from optimal it stopped."""
    from convexhead import runs

    with shown_progress(as_json) as notify:
        clf, result = runs.adam(
            store, out, n_heads=n_heads, lr=lr, epochs=epochs, batch_size=batch_size, head=head, activation=activation,
            beta=beta, beta_ratio=beta_ratio, pool=pool_of(pool), whiten=whiten, n_gates=n_gates, n_blocks=n_blocks,
            outputs=outputs, n_queries=n_queries, query_scale=query_scale,
            query_position=query_position, key_dim=key_dim, query_norm=query_norm,
            fit_intercept=fit_intercept, random_state=seed, device=device, overwrite=overwrite,
            notify=notify,
            command=typed_command(),
        )  # fmt: skip
    folder = escape(str(out))
    emit(
        {"run": str(out), "objective": result.objective, "seconds": result.seconds, "beta": clf.beta_},
        as_json,
        f"objective {result.objective:.6g} after {epochs} epochs, {result.seconds:.1f} s, saved in [bold]{folder}[/]",
        f"next: convexhead audit {folder} {escape(str(store))}",
    )


@command(KEPT, name="twin", hidden=True)
@functools.wraps(adam)
def adam_by_its_old_name(**arguments: Any) -> None:
    """The name of `adam` until version 0.1."""
    warnings.warn(
        "`convexhead twin` is now called `convexhead adam`; the old name goes with 0.3, after May 2027",
        FutureWarning,
        stacklevel=2,
    )
    adam(**arguments)
