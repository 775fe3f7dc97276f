"""The command line: ``convexhead demo | extract | store | fit | path | evaluate | twin | audit | compare | report``, …

Every command prints a table for people or, with ``--json``, one JSON object for machines. Exit codes: 0 done, 1 failed
(one line on standard error that says what to do), 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from convexhead._version import __version__
from convexhead.errors import ConvexHeadError, InputError
from convexhead.interrupts import Answer, interrupts

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train token heads on frozen features to a certified global optimum.",
)
store_app = typer.Typer(no_args_is_help=True, help="Look at, check, join and export token stores.")
app.add_typer(store_app, name="store")
errors = Console(stderr=True, highlight=False)

StorePath = Annotated[Path, typer.Argument(help="Folder of a token store, made by `convexhead extract`.")]
RunPath = Annotated[Path, typer.Argument(help="Folder of a trained head, made by `convexhead fit`.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Head = Annotated[str, typer.Option(help="self-attention, mlp-mixer, fno, block-fno, mlp or linear.")]
Activation = Annotated[str, typer.Option(help="linear, gated-relu or relu.")]
BetaRatio = Annotated[float, typer.Option(help="β as a share of β_max, the weight at which the head vanishes.")]
Beta = Annotated[Optional[float], typer.Option(help="Absolute β; overrides --beta-ratio.")]
Pool = Annotated[str, typer.Option(help="mean, or cls for the first token.")]
Tol = Annotated[float, typer.Option(help="Certified relative gap to reach.")]
Gates = Annotated[int, typer.Option("--n-gates", help="Gates sampled for gated-relu.")]
Blocks = Annotated[int, typer.Option("--n-blocks", help="Channel groups of block-fno.")]
Outputs = Annotated[str, typer.Option(help="shared or grouped outputs of block-fno.")]
Seed = Annotated[int, typer.Option("--seed", help="Of gates and random starts.")]
MaxTime = Annotated[Optional[float], typer.Option(help="Seconds after which the best head so far is kept.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


class _Stopped(BaseException):
    """A command that a signal ended in order; the text says what is kept and how to go on."""


Command = TypeVar("Command", bound=Callable[..., None])


def _command(kept: str, *, of: typer.Typer = app, name: str | None = None) -> Callable[[Command], Command]:
    """Register a command that may be ended at any moment: ``kept`` says of which use that is, in its own arguments."""

    def register(work: Command) -> Command:
        @functools.wraps(work)
        def command(**arguments: Any) -> None:
            interrupts.kept = kept.format(**arguments)
            work(**arguments)

        of.command(name)(command)
        return work

    return register


AGAIN = "run the same command again to go on"
NOTHING = "nothing was written; run the same command again"


# -- output ------------------------------------------------------------------------------------------------------------
def _emit(result: dict[str, Any], as_json: bool, *lines: Any) -> None:
    """The result for machines, or ``lines`` (text or tables) for people."""
    if as_json:
        print(json.dumps(result, default=str))
        return
    console = Console(highlight=False)
    for line in lines:
        console.print(line)


@contextlib.contextmanager
def _progress(quiet: bool, *, lines: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A live line on standard error; silent for ``--json``, and without a terminal unless ``lines`` asks for a log."""
    if quiet or not (errors.is_terminal or lines):
        yield lambda what, done, total: None
        return
    if not errors.is_terminal:
        yield _log()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True, speed_estimate_period=3600.0) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None)


def _log() -> Callable[[str, int, int], None]:
    """A line at every step, with the time left at the mean rate since the start: for long runs without a terminal."""
    began, first, last = time.monotonic(), None, None

    def show(what: str, done: int, total: int) -> None:
        nonlocal first, last
        if total != (last or (0, 0))[1]:  # another stage
            first = done
        if (done, total) == last:
            return
        last = done, total
        rate = (done - (first or 0)) / max(time.monotonic() - began, 1e-9)
        left = f", {(total - done) / rate / 60:.0f} min left" if rate > 0 else ""
        errors.print(f"{done}/{total} {what}{left}", soft_wrap=True)

    return show


@contextlib.contextmanager
def _solver_progress(quiet: bool) -> Iterator[Callable[[Any], None] | None]:
    """Objective, gap and heads while a head is trained."""
    if quiet or not errors.is_terminal:
        yield None
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("preparing", total=None)

        def show(row: Any) -> None:
            gap = row.gap / abs(row.objective) if row.objective else 0.0
            text = f"objective {row.objective:.6g}   estimated gap {gap:.1e}   heads {row.heads}"
            bar.update(task, description=text)

        yield show


@contextlib.contextmanager
def _gaps_are_shown() -> Iterator[None]:
    """A gap that was not reached stands in what is printed: no warning says it again."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _certificate_line(certificate: Any) -> str:
    mark = "[green]certified[/]" if certificate.converged else "[yellow]not converged[/]"
    return f"{mark}: {certificate}"


def _open(path: Path, split: str | None = None) -> Any:
    from convexhead.tokens import TokenStore

    store = TokenStore.open(path)
    if split is None:
        return store
    if split not in store.splits:
        raise InputError(f"{path} has no split {split!r}, only {', '.join(store.splits)}")
    return store[split]


# -- commands ----------------------------------------------------------------------------------------------------------
@_command(f"what was finished is kept in {{out}}; {AGAIN}")
def demo(
    out: Out = Path("demo"),
    seeds: Annotated[int, typer.Option(help="Adam runs of each head; 0 for none.")] = 3,
    as_json: Json = False,
) -> None:
    """The main job on built-in data: digits through EfficientNet-Lite0, every head, one page."""
    from dataclasses import replace

    from convexhead.experiments.demo import DEMO, run_demo

    settings = replace(DEMO, twins=replace(DEMO.twins, seeds=tuple(range(seeds))))
    with _progress(as_json) as notify:
        results = run_demo(out, settings=settings, notify=notify)
    _show_comparison(results, as_json)


def _show_comparison(results: dict[str, Any], as_json: bool) -> None:
    from convexhead.report import terminal_table

    if as_json:
        print(json.dumps({key: results[key] for key in ("dataset", "rows", "baseline", "methods", "page")}))
        return
    page = Path(results["page"]).resolve()
    _emit(results, False, terminal_table(results), f"\nThe page: [bold]{page}[/]  (open it in any browser)")


class Reduce(str, Enum):
    """How channels are reduced."""

    avgpool = "avgpool"
    pca = "pca"


class Dtype(str, Enum):
    """Precision of stored tokens."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


@_command(f"finished shards are kept in {{out}}; {AGAIN}")
def extract(
    images: Annotated[
        str,
        typer.Argument(
            help="Folder of class folders (train/ and test/ beside each other), or npz:FILE, sklearn:digits, …"
        ),
    ],
    out: Out,
    like: Annotated[
        Optional[Path],
        typer.Option(
            help="A store or a run: its backbone, layer, preprocessing, fitted reduction, dtype and order of classes."
        ),
    ] = None,
    backbone: Annotated[
        Optional[str],
        typer.Option(help="packaged:efficientnet-lite0 (default), timm:NAME[@FILE.safetensors], hf:NAME or patches:K."),
    ] = None,
    layer: Annotated[Optional[int], typer.Option(help="Inner block; default: the last map.")] = None,
    image_size: Annotated[Optional[int], typer.Option(help="Pixels; default: the backbone's own.")] = None,
    crop_pct: Annotated[Optional[float], typer.Option(help="Share of the image kept by the centre crop.")] = None,
    channels: Annotated[Optional[int], typer.Option(help="Channels to keep; default: all.")] = None,
    reduce: Annotated[Optional[Reduce], typer.Option(help="How channels are reduced; default: avgpool.")] = None,
    token_pool: Annotated[Optional[int], typer.Option(help="Side of the token grid to average down to.")] = None,
    standardize: Annotated[
        Optional[bool],
        typer.Option("--standardize/--no-standardize", help="Standardise channels, fitted on train; default: yes."),
    ] = None,
    constant: Annotated[
        Optional[bool], typer.Option("--constant/--no-constant", help="Append a channel of ones; default: no.")
    ] = None,
    dtype: Annotated[Optional[Dtype], typer.Option(help="Precision of stored tokens; default: float16.")] = None,
    batch_size: Annotated[Optional[int], typer.Option(help="Images a batch; default: chosen for the device.")] = None,
    shard_size: Annotated[int, typer.Option(help="Images a shard: what a crash can lose.")] = 512,
    skip_broken: Annotated[bool, typer.Option(help="Leave out images that cannot be read.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Run a frozen backbone over images and keep the tokens; run it again to resume."""
    from convexhead.tokens import extract as run
    from convexhead.tokens.census import census_lines

    with _progress(as_json) as notify:
        store = run(
            images,
            backbone or ("packaged:efficientnet-lite0" if like is None else None),
            out,
            like=like,
            layer=layer,
            image_size=image_size,
            crop_pct=crop_pct,
            channels=channels,
            reduce=None if reduce is None else reduce.value,  # type: ignore[arg-type]
            token_pool=token_pool,
            standardize=standardize,
            constant=constant,
            dtype=None if dtype is None else dtype.value,  # type: ignore[arg-type]
            batch_size=batch_size,
            shard_size=shard_size,
            skip_broken=skip_broken,
            device=device,
            progress=lambda p: notify(
                f"{p.split}, {p.images_per_second:.0f} images/s, {p.seconds_left:.0f} s left", p.done, p.total
            ),
        )
    if int(os.environ.get("RANK", "0")) == 0:  # under torchrun one process speaks for all
        _show_store(store, as_json, *map(escape, census_lines(store.info()["found"])))
        broken = [name for names in store.info()["broken"].values() for name in names]
        if broken and not as_json:
            names = ", ".join(map(repr, broken[:5])) + (", …" if len(broken) > 5 else "")
            errors.print(escape(f"{len(broken)} broken images left out: {names}"))


def _show_store(store: Any, as_json: bool, *lines: str) -> None:
    info = store.info()
    counts = ", ".join(f"{count} {split}" for split, count in info["images"].items())
    _emit(
        info,
        as_json,
        f"[bold]{info['path']}[/]: {counts} images, {info['classes']} classes, "
        f"{info['tokens']} tokens x {info['channels']} channels, {info['bytes'] / 1e6:.1f} MB",
        *lines,
    )


@_command(NOTHING, of=store_app, name="info")
def store_info(store: StorePath, as_json: Json = False) -> None:
    """What a store holds and how it was made."""
    opened = _open(store)
    table = Table(show_header=False, box=None)
    for key, value in opened.info().items():
        table.add_row(key, escape(str(value)))
    _emit(opened.info(), as_json, table)


@_command(NOTHING, of=store_app, name="verify")
def store_verify(store: StorePath, as_json: Json = False) -> None:
    """Read every shard and compare it with its checksum."""
    opened = _open(store)
    opened.verify()
    _emit({"path": str(store), "intact": True}, as_json, f"{store}: intact")


@_command("{out} is not finished; delete it and run the same command again", of=store_app, name="merge")
def store_merge(
    stores: Annotated[list[Path], typer.Argument(help="Stores of the same backbone and settings.")],
    out: Out,
    as_json: Json = False,
) -> None:
    """Join stores of the same backbone and settings into a new one."""
    from convexhead.tokens import merge_stores

    _show_store(merge_stores(stores, out), as_json)


@_command(NOTHING, of=store_app, name="export")
def store_export(
    store: StorePath,
    out: Annotated[Path, typer.Option("--out", help="Folder (npy, zarr) or file (h5) to write.")],
    format: Annotated[str, typer.Option(help="npy, h5 or zarr.")] = "npy",
    raw: Annotated[bool, typer.Option(help="Tokens as stored, before the fitted reduction.")] = False,
    as_json: Json = False,
) -> None:
    """Write a store as arrays that other programs read."""
    from convexhead.tokens import export_store

    written = export_store(store, out, format=format, raw=raw)
    _emit({"path": str(written)}, as_json, f"written: {written}")


def _save(
    model: Any, out: Path, store: Path, path: list[dict[str, Any]] | None = None, at_edge: str | None = None
) -> None:
    """The model, and beside it what a report shows of it."""
    from convexhead.report import evidence

    model.save(out)
    command = ["convexhead", *sys.argv[1:]]
    evidence.write(evidence.collect(model, _open(store), command=command, path=path, at_edge=at_edge), out)


def _parameters(**given: Any) -> dict[str, Any]:
    given["random_state"] = given.pop("seed")
    return given


@_command("no head was trained yet; with --checkpoint MINUTES the same command goes on from the last checkpoint")
def fit(
    store: StorePath,
    out: Out,
    head: Head = "self-attention",
    activation: Activation = "linear",
    beta_ratio: BetaRatio = 0.05,
    beta: Beta = None,
    pool: Pool = "mean",
    tol: Tol = 1e-3,
    n_gates: Gates = 50,
    n_blocks: Blocks = 4,
    outputs: Outputs = "shared",
    fit_intercept: Annotated[bool, typer.Option(help="Add an unpenalised intercept.")] = False,
    max_heads: Annotated[Optional[int], typer.Option(help="Bound on the number of heads.")] = None,
    max_time: MaxTime = None,
    max_memory: Annotated[
        Optional[float],
        typer.Option(
            help="Gigabytes for tokens; what is beyond is read again in each pass. Default: half of the free."
        ),
    ] = None,
    checkpoint: Annotated[
        Optional[float],
        typer.Option(help="Minutes between checkpoints in OUT.checkpoint, which the same command goes on from."),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train one head on the training split to a certified global optimum; under torchrun, with all its processes."""
    from convexhead import checkpoint as checkpoints
    from convexhead.estimators import ConvexHeadClassifier
    from convexhead.ranks import join_ranks

    ranks = join_ranks()
    first = ranks.rank == 0  # one process speaks and writes for all
    folder = out.with_name(f"{out.name}.checkpoint")
    train = _open(store, "train")
    clf = ConvexHeadClassifier(
        **_parameters(
            head=head, activation=activation, beta=beta, beta_ratio=beta_ratio, pool=pool, tol=tol, n_gates=n_gates,
            n_blocks=n_blocks, outputs=outputs, fit_intercept=fit_intercept, max_heads=max_heads, max_time=max_time,
            max_memory=None if max_memory is None else 1e9 * max_memory, seed=seed, device=device,
            distributed=ranks.size > 1,
        )
    )  # fmt: skip
    with interrupts.answer(Answer.FINISH):
        with _solver_progress(as_json or not first) as callback, _gaps_are_shown(), interrupts.answer(Answer.RAISE):
            clf.fit(
                train,
                callback=callback,
                checkpoint=None if checkpoint is None else folder,
                checkpoint_minutes=checkpoint or 0.0,
            )
        if not first:
            return
        _save(clf, out, store)
    if clf.certificate_.converged:
        checkpoints.remove(folder)
    seconds = clf.history_[-1]["seconds"] if clf.history_ else 0.0
    result = {
        "run": str(out),
        "certificate": clf.certificate_.to_dict(),
        "beta": clf.beta_,
        "beta_max": clf.beta_max_,
        "heads": clf.n_heads_,
        "seconds": seconds,
        "stopped": clf.stop_reason_,
    }
    _emit(
        result,
        as_json,
        _certificate_line(clf.certificate_),
        f"{clf.n_heads_} heads, β = {clf.beta_:.4g} (β_max {clf.beta_max_:.4g}), {seconds:.1f} s, "
        f"saved in [bold]{out}[/]",
    )
    if interrupts.received is not None and not clf.certificate_.converged:
        more = "the same command goes on from its checkpoint" if checkpoint else "the same command trains it anew"
        raise _Stopped(f"the best head so far is saved in {out}, with the gap that it has; {more}")
    if interrupts.received is not None:
        raise _Stopped(f"the head was finished and is saved in {out}")


@_command("no β was solved yet, and nothing was written; run the same command again")
def path(
    store: StorePath,
    out: Annotated[Optional[Path], typer.Option("--out", help="Folder for the best head.")] = None,
    head: Head = "self-attention",
    activation: Activation = "linear",
    beta_ratios: Annotated[
        str, typer.Option(help="Shares of β_max, separated by commas.")
    ] = "0.5,0.25,0.12,0.06,0.03,0.015",
    validation: Annotated[float, typer.Option(help="Share of the training images held out to score by.")] = 0.2,
    pool: Pool = "mean",
    tol: Tol = 1e-3,
    n_gates: Gates = 50,
    n_blocks: Blocks = 4,
    outputs: Outputs = "shared",
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train along a falling grid of β, warm-started, scored on held-out training images."""
    import numpy as np
    from sklearn.model_selection import train_test_split

    from convexhead.path import EDGES, best, grid_edge, regularization_path

    try:
        ratios = [float(part) for part in beta_ratios.split(",")]
    except ValueError as error:
        raise InputError(f"--beta-ratios must be numbers separated by commas, got {beta_ratios!r}") from error
    train = _open(store, "train")
    if not 0 < validation < 1:
        raise InputError(f"--validation must be a share between 0 and 1, got {validation:g}")
    kept, held = train_test_split(np.arange(len(train)), test_size=validation, stratify=train.labels, random_state=seed)
    with interrupts.answer(Answer.FINISH):
        with _progress(as_json) as notify, _gaps_are_shown(), interrupts.answer(Answer.RAISE):
            rows = regularization_path(
                train.subset(np.sort(kept)), beta_ratios=ratios, X_val=train.subset(np.sort(held)),
                callback=lambda row: notify(f"β/β_max {row['beta_ratio']:g}", 0, 0),
                **_parameters(head=head, activation=activation, pool=pool, tol=tol, n_gates=n_gates, n_blocks=n_blocks,
                              outputs=outputs, seed=seed, device=device),
            )  # fmt: skip
        chosen = best(rows)
        edge = grid_edge(ratios, chosen["beta_ratio"])
        if out is not None:
            _save(chosen["model"], out, store, rows, edge)
    table = Table("β/β_max", "validation", "train", "heads", "objective", "certified gap", "seconds")
    for row in rows:
        mark = "[bold]" if row is chosen else ""
        table.add_row(
            f"{mark}{row['beta_ratio']:g}", f"{100 * row['val_score']:.1f}%", f"{100 * row['train_score']:.1f}%",
            str(row["n_heads"]), f"{row['objective']:.5g}", f"{row['relative_gap']:.1e}", f"{row['seconds']:.1f}",
        )  # fmt: skip
    result = {
        "rows": [{key: value for key, value in row.items() if key != "model"} for row in rows],
        "best": chosen["beta_ratio"],
        "at_edge": edge,
        "trained_on": {"split": "train", "images": len(kept), "held_out": len(held)},
    }
    _emit(
        result,
        as_json,
        table,
        f"trained on {len(kept)} of the {len(train)} training images; the other {len(held)} chose β",
        *([f"[yellow]β/β_max {chosen['beta_ratio']:g} {EDGES[edge]}: try more with --beta-ratios[/]"] if edge else []),
    )
    if interrupts.received is not None:
        solved = f"{len(rows)} of {len(set(ratios))} β are done"
        saved = "nothing was saved without --out" if out is None else f"the best head so far is saved in {out}"
        raise _Stopped(f"{solved}, {saved}; run the same command again for all")


@_command(NOTHING)
def evaluate(
    run: RunPath,
    store: StorePath,
    split: Annotated[str, typer.Option(help="Which images.")] = "test",
    as_json: Json = False,
) -> None:
    """Accuracy of a trained head on a split of a store."""
    import numpy as np

    from convexhead.estimators import ConvexHeadClassifier
    from convexhead.persistence import load

    clf = load(run)
    if not isinstance(clf, ConvexHeadClassifier):
        raise InputError(f"{run} holds a regressor: evaluate scores classifiers")
    view = _open(store, split)
    labels = clf.labels_of(view)
    probabilities = clf.predict_proba(view)
    position = {label: i for i, label in enumerate(clf.classes_.tolist())}
    truth = np.array([position.get(label, -1) for label in labels.tolist()])
    ranked = np.argsort(-probabilities, axis=1)
    top = {k: float((ranked[:, :k] == truth[:, None]).any(1).mean()) for k in (1, 5)}
    result = {"run": str(run), "split": split, "images": len(truth), "top1": top[1], "top5": top[5]}
    five = f", top-5 {100 * top[5]:.1f}%" if probabilities.shape[1] > 5 else ""
    _emit(result, as_json, f"{split}: top-1 [bold]{100 * top[1]:.1f}%[/]{five} on {len(truth)} images")


@_command(NOTHING)
def audit(
    run: Annotated[Path, typer.Argument(help="A trained head: a folder made by `convexhead fit` or `twin`.")],
    store: StorePath,
    beta: Annotated[Optional[float], typer.Option(help="Absolute β; default: the one that it was trained at.")] = None,
    reference: Annotated[
        Optional[Path], typer.Option(help="A certified head of the same problem, whose lower bound is used.")
    ] = None,
    tol: Tol = 1e-3,
    as_json: Json = False,
) -> None:
    """How far from the global optimum is a trained head, at most?"""
    from convexhead.audit import OF_REFERENCE, certify
    from convexhead.persistence import load

    clf = load(run)
    beta = clf.beta_ if beta is None else beta
    bound = None if reference is None else load(reference).certificate_
    certificate = certify(clf, _open(store, "train"), beta=beta, tol=tol, lower_bound=bound)
    result = {"run": str(run), "beta": beta, "certificate": certificate.to_dict()}
    lines = [_certificate_line(certificate)]
    if bound is not None:
        result["reference"] = {"run": str(reference), "dual": bound.dual}
        used = "used here" if certificate.bound.startswith(OF_REFERENCE) else "below the one found here"
        lines.append(f"the reference {escape(str(reference))} has the lower bound {bound.dual:.6g}, {used}")
    _emit(result, as_json, *lines)


@_command("Adam had not finished, and nothing was written; run the same command again")
def twin(
    store: StorePath,
    out: Out,
    head: Head = "self-attention",
    activation: Activation = "linear",
    beta_ratio: BetaRatio = 0.05,
    beta: Beta = None,
    n_heads: Annotated[int, typer.Option("--heads", help="Atoms of the network.")] = 20,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 0.01,
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = 60,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 256,
    n_gates: Gates = 50,
    n_blocks: Blocks = 4,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train the same head the usual, non-convex way, by Adam; `audit` then says how far it stopped."""
    from convexhead.estimators import ConvexHeadClassifier
    from convexhead.experiments.twin import fit_twin

    clf = ConvexHeadClassifier(
        **_parameters(head=head, activation=activation, beta=beta, beta_ratio=beta_ratio, n_gates=n_gates,
                      n_blocks=n_blocks, seed=seed, device=device)
    )  # fmt: skip
    with _progress(as_json) as notify:
        clf, result = fit_twin(
            clf, _open(store, "train"), n_heads=n_heads, lr=lr, epochs=epochs, batch_size=batch_size, seed=seed,
            callback=lambda row: notify(f"objective {row.objective:.6g}", int(row.epoch), epochs),
        )  # fmt: skip
    with interrupts.answer(Answer.FINISH):
        _save(clf, out, store)
    _emit(
        {"run": str(out), "objective": result.objective, "seconds": result.seconds, "beta": clf.beta_},
        as_json,
        f"objective {result.objective:.6g} after {epochs} epochs, {result.seconds:.1f} s, saved in [bold]{out}[/]",
        f"next: convexhead audit {out} {store}",
    )


@_command(f"what was finished is kept in {{out}}; {AGAIN}")
def compare(
    store: StorePath,
    out: Out = Path("comparison"),
    heads: Annotated[str, typer.Option(help="Heads, separated by commas; default: all.")] = "",
    activations: Annotated[str, typer.Option(help="Activations, separated by commas.")] = "linear,gated-relu",
    beta_ratios: Annotated[str, typer.Option(help="Shares of β_max, separated by commas.")] = "0.3,0.1,0.03,0.01,0.003",
    n_gates: Gates = 8,
    seeds: Annotated[int, typer.Option(help="Adam runs of each head; 0 for none.")] = 3,
    tol: Tol = 1e-3,
    as_json: Json = False,
) -> None:
    """The table of all heads on a store, with Adam twins and a linear probe, and a page."""
    from convexhead.activation import ACTIVATIONS
    from convexhead.errors import choose, require
    from convexhead.experiments.cells import PathSettings, TwinSettings
    from convexhead.experiments.comparison import Settings, cells_of, run
    from convexhead.experiments.results import write_results
    from convexhead.experiments.splits import splits_of_store
    from convexhead.heads import HEADS

    require("jinja2", "report")
    require("matplotlib", "report")
    try:
        ratios = tuple(float(part) for part in beta_ratios.split(","))
    except ValueError as error:
        raise InputError(f"--beta-ratios must be numbers separated by commas, got {beta_ratios!r}") from error
    settings = Settings(
        cells=tuple(
            cells_of(
                [choose("head", h, HEADS) for h in _names(heads)] or HEADS,
                [choose("activation", a, ACTIVATIONS) for a in _names(activations)],
            )
        ),
        path=PathSettings(beta_ratios=ratios, n_gates=n_gates, tol=tol),
        twins=TwinSettings(seeds=tuple(range(seeds))),
    )
    opened = _open(store)
    with _progress(as_json) as notify:
        results = run(splits_of_store(opened), settings, out, title=f"Every head on {store.name}", notify=notify)
    results["reproduce"] = [f"convexhead compare {store} --out {out}"]
    write_results(results, out)
    _show_comparison(results, as_json)


def _names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


class ScaleName(str, Enum):
    """How much of CIFAR-100 is used."""

    full = "full"
    ten = "10k"
    two = "2k"


@_command(f"what was finished is kept in {{out}}; {AGAIN}")
def cifar100(
    out: Out = Path("cifar100"),
    images: Annotated[
        Optional[str], typer.Option(help="CIFAR-100: a folder with train/ and test/, or torchvision:CIFAR100.")
    ] = None,
    backbone: Annotated[
        str, typer.Option(help="What makes tokens of the images, as for `convexhead extract`.")
    ] = "timm:gmlp_s16_224.ra3_in1k",
    layer: Annotated[Optional[int], typer.Option(help="Inner block; default: the last map.")] = None,
    image_size: Annotated[Optional[int], typer.Option(help="Pixels; default: the backbone's own.")] = None,
    tokens: Annotated[Optional[Path], typer.Option(help="A token store, in place of images and backbone.")] = None,
    scale: Annotated[
        ScaleName, typer.Option(help="All images; 80 + 20 of each class; or that of the first 20 classes.")
    ] = ScaleName.full,
    every_cell: Annotated[
        bool, typer.Option("--every-cell", help="Every head and activation, twins with 5, 20 and 50 heads: long.")
    ] = False,
    heads: Annotated[str, typer.Option(help="Heads to keep, separated by commas; default: the scale's.")] = "",
    activations: Annotated[str, typer.Option(help="Activations to keep; default: the scale's.")] = "",
    token_pool: Annotated[Optional[int], typer.Option(help="Side of the token grid to average down to.")] = None,
    channels: Annotated[
        Optional[int], typer.Option(help="Principal components kept, with the constant channel.")
    ] = None,
    n_gates: Annotated[Optional[int], typer.Option(help="Gates sampled for gated-relu.")] = None,
    epochs: Annotated[Optional[int], typer.Option(help="Of every twin and attentive probe.")] = None,
    tuning_seeds: Annotated[
        Optional[int], typer.Option(help="Seeds of a twin's three that every learning rate is tried with.")
    ] = None,
    sizes: Annotated[bool, typer.Option("--sizes", help="Also train the main heads on fewer images.")] = False,
    jobs: Annotated[Optional[int], typer.Option(help="Cells trained at a time, in processes.")] = None,
    as_json: Json = False,
) -> None:
    """The published experiment: every head, convex and not, on CIFAR-100; run it again to go on."""
    from convexhead.experiments.cifar100 import run_cifar100

    if jobs is not None and jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {jobs}")
    with _progress(as_json, lines=True) as notify:
        results = run_cifar100(
            out, images=images, backbone=backbone, layer=layer, image_size=image_size, tokens=tokens,
            scale=scale.value, every_cell=every_cell, heads=tuple(_names(heads)),
            activations=tuple(_names(activations)), token_pool=token_pool, channels=channels, n_gates=n_gates,
            epochs=epochs, tuning_seeds=tuning_seeds, sizes=sizes, jobs=jobs, notify=notify,
            command=["convexhead", *sys.argv[1:]],
        )  # fmt: skip
    _show_comparison(results, as_json)


@_command(NOTHING)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders made by `convexhead fit`, `path` or `twin`.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("report.html"),
    tokens: Annotated[
        Optional[Path], typer.Option(help="Token store to score the runs on anew; default: what fitting kept.")
    ] = None,
    images: Annotated[
        Optional[str], typer.Option(help="Where the images are, if they have moved since `convexhead extract`.")
    ] = None,
    size: Annotated[int, typer.Option("--gallery", help="Images a run, at most 64.")] = 64,
    figures: Annotated[
        Optional[Path], typer.Option(help="Folder for every figure as SVG, PDF and PNG with its numbers as JSON.")
    ] = None,
    as_json: Json = False,
) -> None:
    """One HTML file about one or several runs: certificate, heads, spectra, maps and clusters on images, errors."""
    from convexhead.errors import require
    from convexhead.report.run_page import render_runs
    from convexhead.tokens.files import make_folder, write_atomic

    require("jinja2", "report")
    require("matplotlib", "report")
    store = None if tokens is None else _open(tokens)
    page = render_runs(runs, store=store, images=images, size=size, figure_folder=figures)
    make_folder(out.parent)
    write_atomic(out, page.encode())
    result = {"page": str(out), "bytes": out.stat().st_size, "runs": [str(run) for run in runs]}
    _emit(
        result,
        as_json,
        f"[bold]{escape(str(out.resolve()))}[/], {out.stat().st_size / 1e6:.1f} MB: open it in any browser",
    )


def main() -> None:
    """Entry point: errors are one line, and the exit code says what happened."""
    with interrupts.watch():
        try:
            with _notes():
                code = app(standalone_mode=False)
            sys.stdout.flush()
        except ConvexHeadError as error:
            _fail(str(error), 1)
        except BrokenPipeError:  # who reads our output has enough of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (ValueError, OSError) as error:
            _fail(str(error).splitlines()[0] if str(error) else type(error).__name__, 1)
        except _Stopped as stopped:
            _say_interrupted(str(stopped))
        except SystemExit:
            raise
        except Exception as error:
            if hasattr(error, "exit_code"):  # typer's own: usage errors and Exit
                if hasattr(error, "format_message"):
                    _fail(error.format_message(), 2)
                sys.exit(error.exit_code)
            raise
        if code == 130:  # typer's word for KeyboardInterrupt
            _say_interrupted(interrupts.kept or NOTHING)


def _say_interrupted(kept: str) -> NoReturn:
    errors.print(f"[red]interrupted:[/] {escape(kept)}", soft_wrap=True)
    sys.exit(interrupts.code)


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """What the library warns of, a line each on standard error."""
    told = set()

    def note(message: Warning | str, *_: Any) -> None:
        if str(message) not in told:
            told.add(str(message))
            errors.print(f"[yellow]note:[/] {escape(str(message))}", soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = note  # type: ignore[assignment]
        yield


def _fail(message: str, code: int) -> NoReturn:
    errors.print(f"[red]error:[/] {escape(message)}", soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
