"""``convexhead fit`` and ``convexhead path``: heads to a certified optimum, at one β or along a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from rich.markup import escape
from typer import Option

from convexhead.cli.entry import AGAIN, Stopped, command
from convexhead.cli.options import (
    Activation,
    Beta,
    BetaRatio,
    BetaRatios,
    Blocks,
    ClassWeight,
    Device,
    FitIntercept,
    Gates,
    Groups,
    Head,
    Json,
    KeyDim,
    Log,
    Loss,
    Out,
    Outputs,
    Overwrite,
    Pool,
    PosWeight,
    Queries,
    QueryNorm,
    QueryPosition,
    QueryScale,
    Seed,
    Smoothing,
    Solver,
    Store,
    Tol,
    Whiten,
    pool_of,
    ratios,
)
from convexhead.cli.output import certificate_line, emit, gaps_are_shown, speaks_for_all, typed_command
from convexhead.cli.progress import shown_progress
from convexhead.interrupts import interrupts

MaxHeads = Annotated[int | None, Option(help="The largest number of heads; the certificate then says what that costs.")]
MaxTime = Annotated[float | None, Option(help="Seconds after which the best head so far is kept, with its gap.")]
MaxMemory = Annotated[
    float | None,
    Option(
        help="Gigabytes for tokens; tokens beyond that are read again in each pass. Default: half of the free memory."
    ),
]
Checkpoint = Annotated[
    float | None,
    Option(help="Minutes between checkpoints, kept in OUT.checkpoint. The same command goes on from the last one."),
]
BestOut = Annotated[Path | None, Option("--out", help="Folder to save the best head in; default: save nothing.")]
Folds = Annotated[
    int | None,
    Option("--cv", help="Choose β by cross-validation with this many folds, 5 say, and then train on all images."),
]
Refit = Annotated[bool, Option(help="Train the head that is kept again on all training images, held-out ones too.")]
Validation = Annotated[
    float | None,
    Option(
        help="Share of the training images that is held out to choose β by. Default: the val split chooses it, or "
        "where there is none a share of 0.2."
    ),
]


@command(
    "no head was trained yet; with --checkpoint MINUTES the same command goes on from the last checkpoint", shares=True
)
def fit(
    store: Store,
    out: Out,
    head: Head = "self-attention",
    activation: Activation = "linear",
    loss: Loss = None,
    beta_ratio: BetaRatio = 0.05,
    beta: Beta = None,
    cv: Folds = None,
    groups: Groups = None,
    pool: Pool = "mean",
    whiten: Whiten = 0.0,
    tol: Tol = 1e-3,
    n_gates: Gates = 50,
    n_blocks: Blocks = 4,
    outputs: Outputs = "shared",
    n_queries: Queries = 192,
    query_scale: QueryScale = 2.0,
    query_position: QueryPosition = True,
    key_dim: KeyDim = None,
    query_norm: QueryNorm = "all",
    fit_intercept: FitIntercept = False,
    class_weight: ClassWeight = None,
    label_smoothing: Smoothing = 0.0,
    pos_weight: PosWeight = None,
    solver: Solver = "auto",
    max_heads: MaxHeads = None,
    max_time: MaxTime = None,
    max_memory: MaxMemory = None,
    checkpoint: Checkpoint = None,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    log: Log = None,
    as_json: Json = False,
) -> None:
    """Train a head on the training images to a certified global optimum; under torchrun, with all its processes."""
    from convexhead import runs

    if cv is not None:
        interrupts.kept = f"finished fits of the folds are kept in {out}.folds; {AGAIN}"
    with shown_progress(as_json) as notify, gaps_are_shown():
        clf = runs.fit(
            store, out, head=head, activation=activation, loss=loss, beta=beta, beta_ratio=beta_ratio, cv=cv,
            groups=groups, pool=pool_of(pool), whiten=whiten, tol=tol, n_gates=n_gates, n_blocks=n_blocks,
            outputs=outputs, n_queries=n_queries, query_scale=query_scale, query_position=query_position,
            key_dim=key_dim, query_norm=query_norm, fit_intercept=fit_intercept, class_weight=class_weight,
            label_smoothing=label_smoothing, pos_weight=pos_weight, solver=solver, max_heads=max_heads,
            max_time=max_time, max_memory=None if max_memory is None else 1e9 * max_memory, random_state=seed,
            device=device, checkpoint_minutes=checkpoint, overwrite=overwrite, log=log, notify=notify,
            command=typed_command(),
        )  # fmt: skip
    if not speaks_for_all():
        return
    certificate = clf.certificate_
    result = {
        "run": str(out),
        "certificate": certificate.to_dict(),
        "beta": clf.beta_,
        "beta_max": clf.beta_max_,
        "heads": clf.n_heads_,
        "seconds": clf.history_[-1]["seconds"] if clf.history_ else 0.0,
        "stopped": clf.stop_reason_,
    }
    summary = (
        f"{clf.n_heads_} heads, β = {clf.beta_:.4g} (β_max {clf.beta_max_:.4g}), {result['seconds']:.1f} s, "
        f"saved in [bold]{escape(str(out))}[/]"
    )
    chosen = [] if cv is None else [_choice(clf, cv)]
    if cv is not None:
        result |= {"beta_ratio": clf.beta_ratio_, "beta_ratios": clf.beta_ratios_.tolist()}
        result |= {"scores": clf.scores_.tolist()} | ({"C": clf.C_} if hasattr(clf, "C_") else {})
    emit(result, as_json, *chosen, certificate_line(certificate), summary)
    if interrupts.received is not None:
        if certificate.converged:
            raise Stopped(f"the head was finished and is saved in {out}")
        more = "the same command with --overwrite trains it anew"
        if checkpoint is not None:
            more = "the same command goes on from its checkpoint"
        raise Stopped(f"the best head so far is saved in {out}, with the gap that it has; {more}")


@command("no β was solved yet, and no head was written; run the same command again", shares=True)
def path(
    store: Store,
    out: BestOut = None,
    head: Head = "self-attention",
    activation: Activation = "linear",
    loss: Loss = None,
    beta_ratios: BetaRatios = "0.5,0.25,0.12,0.06,0.03,0.015",
    validation: Validation = None,
    groups: Groups = None,
    refit: Refit = False,
    pool: Pool = "mean",
    whiten: Whiten = 0.0,
    tol: Tol = 1e-3,
    n_gates: Gates = 50,
    n_blocks: Blocks = 4,
    outputs: Outputs = "shared",
    n_queries: Queries = 192,
    query_scale: QueryScale = 2.0,
    query_position: QueryPosition = True,
    key_dim: KeyDim = None,
    query_norm: QueryNorm = "all",
    fit_intercept: FitIntercept = False,
    class_weight: ClassWeight = None,
    label_smoothing: Smoothing = 0.0,
    pos_weight: PosWeight = None,
    solver: Solver = "auto",
    max_memory: MaxMemory = None,
    checkpoint: Checkpoint = None,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    log: Log = None,
    as_json: Json = False,
) -> None:
    """Train a head at each β of a falling grid, each from the one before, and choose β on held-out images."""
    from rich.table import Table

    from convexhead import runs

    with shown_progress(as_json) as notify, gaps_are_shown():
        found = runs.path(
            store, out, beta_ratios=ratios(beta_ratios), validation=validation, groups=groups, refit=refit,
            head=head, activation=activation, loss=loss, pool=pool_of(pool), whiten=whiten, tol=tol, n_gates=n_gates,
            n_blocks=n_blocks, outputs=outputs, n_queries=n_queries, query_scale=query_scale,
            query_position=query_position, key_dim=key_dim, query_norm=query_norm,
            fit_intercept=fit_intercept, class_weight=class_weight, label_smoothing=label_smoothing,
            pos_weight=pos_weight, solver=solver, max_memory=None if max_memory is None else 1e9 * max_memory,
            checkpoint_minutes=checkpoint, random_state=seed, device=device, overwrite=overwrite, log=log,
            notify=notify, command=typed_command(),
        )  # fmt: skip
    if not speaks_for_all():
        return
    best, held = found.chosen["beta_ratio"], found.n_held_out
    n, own = found.n_train + held if found.refitted else found.n_train, found.chosen_on != "train"
    validated = "validation mAP" if found.kept.loss == "binary-cross-entropy" else "validation"
    weight = ["C"] if "C" in found.chosen else []
    table = Table("β/β_max", *weight, validated, "train", "heads", "objective", "certified gap", "seconds")
    for row in found.rows:
        table.add_row(*_cells(row, found))
    result = {
        "rows": [{key: value for key, value in row.items() if key != "model"} for row in found.rows],
        "best": best,
        "at_edge": found.at_edge,
        "trained_on": {"split": "train", "images": n, "held_out": 0 if found.refitted or own else held},
        "chosen_on": {"split": found.chosen_on, "images": held},
    }
    if found.refitted:
        kept = found.kept
        result["refit"] = {"certificate": kept.certificate_.to_dict(), "beta": kept.beta_, "heads": kept.n_heads_}
    emit(result, as_json, table, *_trained_on(found, n, held, own))
    if interrupts.received is not None:
        saved = "nothing was saved without --out" if out is None else f"the best head so far is saved in {out}"
        saved += ", not trained on the held-out images" if refit and not found.refitted else ""
        again = "" if out is None or checkpoint is not None else " with --overwrite"
        solved = f"{len(found.rows)} of {found.n_ratios} β are done"
        raise Stopped(f"{solved}, {saved}; run the same command again{again} for all")


def _trained_on(found: Any, n: int, held: int, own: bool) -> list[str]:
    """Which images trained the head of a path and which chose β, in words."""
    from convexhead.path import EDGES

    ratio = found.chosen["beta_ratio"]
    beta = f"β/β_max {ratio:g}"
    lines = [f"trained on {n} of the {n + held} training images; the other {held} chose {beta}"]
    if own:
        lines = [f"trained on all {n} training images; the {held} images of the split {found.chosen_on} chose {beta}"]
    if found.refitted:
        lines = [f"{held} of the {n} training images chose {beta}; the head that is kept was then trained on all {n}"]
    lines.append(certificate_line(found.kept.certificate_))
    if found.at_edge is not None:
        lines.append(f"[yellow]β/β_max {ratio:g} {EDGES[found.at_edge]}: try more with --beta-ratios[/]")
    return lines


def _cells(row: dict[str, Any], found: Any) -> list[str]:
    """A row of the table of a path, the chosen one marked."""
    mark = "[bold]" if row is found.chosen else ""
    scores = [_score(row[f"{of}_score"], found.kept) for of in ("val", "train")]
    rest = [f"{row['objective']:.5g}", f"{row['relative_gap']:.1e}", f"{row['seconds']:.1f}"]
    weight = [f"{row['C']:.3g}"] if "C" in row else []
    return [f"{mark}{row['beta_ratio']:g}", *weight, *scores, str(row["n_heads"]), *rest]


def _choice(clf: Any, cv: int) -> str:
    """How cross-validation chose β."""
    best = clf.scores_[:, clf.beta_ratios_.tolist().index(clf.beta_ratio_)].mean()
    of = " mean average precision" if clf.loss == "binary-cross-entropy" else ""
    return (
        f"β/β_max {clf.beta_ratio_:.3g} was chosen by cross-validation: {_score(best, clf)}{of} on {cv} folds; "
        f"the head was then trained on all {clf.origin_.images} training images"
    )


def _score(value: float, head: Any) -> str:
    """What chose β, in words: a share in percent, or R²."""
    return f"{100 * value:.1f}%" if hasattr(head, "classes_") else f"R² {value:.3f}"
