"""``convexhead probe``: from images, or a store, to a table of certified heads and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.markup import escape
from typer import Argument, Option

from convexhead.cli.entry import AGAIN, command
from convexhead.cli.extract import Backbone, Channels, ClassNames, CropPct, KeepAspect, Reduction, Void, class_list
from convexhead.cli.options import (
    ClassChannels,
    Device,
    Groups,
    Json,
    KeyDim,
    Layer,
    Log,
    Out,
    Queries,
    QueryNorm,
    QueryPosition,
    QueryScale,
    Seed,
    SeveralNumbers,
    Sides,
    TokenPool,
    Tol,
    counts,
    layers,
    names,
    ratios,
    sides,
)
from convexhead.cli.output import emit, typed_command
from convexhead.cli.progress import shown_progress

Images = Annotated[
    str,
    Argument(
        metavar="IMAGES|STORE",
        help="Folder of class folders, with train/ and test/ beside each other where there is a split, of images/ and "
        "labels.csv, or of images/ and labels/ with masks; another source of images, see extract; or a token store.",
    ),
]
Heads = Annotated[str, Option(help="Heads, separated by commas. The linear head is always trained.")]
Baselines = Annotated[str, Option(help="Probes of the field beside them: k-nn, attentive-probe; an empty text: none.")]
Folds = Annotated[int, Option("--cv", help="Folds of the training images that choose β.")]
Grid = Annotated[
    str,
    Option(
        "--beta-ratios",
        help="The grid of β as shares of β_max, separated by commas. It goes on where the best lies at its edge.",
    ),
]
Metrics = Annotated[
    str,
    Option(
        "--whiten",
        metavar="A",
        help="How far to whiten the tokens, see fit. Of several, such as 0 0.5, each head takes the best by "
        "cross-validation.",
    ),
]
Shots = Annotated[str, Option(help="Train on so many images of each class too, such as: 1 2 4 8 16.")]
Fractions = Annotated[
    str, Option(help="Train on such shares of each class too, or of images without one class each, such as: 0.1 0.5.")
]
Draws = Annotated[int, Option(help="Random choices of images for each number of --shots and --fractions.")]
Leaderboard = Annotated[Path | None, Option(help="File to append one JSON line a row to.")]


@command(f"finished heads, and finished fits of folds, are kept in {{out}}; {AGAIN}", cls=SeveralNumbers)
def probe(
    images: Images,
    out: Out = Path("probe"),
    backbone: Backbone = None,
    layer: Layer = None,
    class_channels: ClassChannels = None,
    image_size: Sides = None,
    crop_pct: CropPct = None,
    keep_aspect: KeepAspect = None,
    token_pool: TokenPool = None,
    channels: Channels = None,
    reduce: Reduction = None,
    void: Void = None,
    class_names: ClassNames = None,
    heads: Heads = "linear,self-attention,mlp-mixer,mlp",
    baselines: Baselines = "k-nn,attentive-probe",
    cv: Folds = 3,
    beta_ratios: Grid = "0.3,0.1,0.03,0.01",
    whiten: Metrics = "0",
    tol: Tol = 1e-3,
    n_queries: Queries = 192,
    query_scale: QueryScale = 2.0,
    query_position: QueryPosition = True,
    key_dim: KeyDim = None,
    query_norm: QueryNorm = "all",
    shots: Shots = "",
    fractions: Fractions = "",
    draws: Draws = 3,
    groups: Groups = None,
    seed: Seed = 0,
    device: Device = "auto",
    leaderboard: Leaderboard = None,
    log: Log = None,
    as_json: Json = False,
) -> None:
    """Probe a frozen backbone on a folder of images: certified heads, β by cross-validation, one table and page."""
    from convexhead.experiments import probe as probing
    from convexhead.report import probe_page

    with shown_progress(as_json) as notify:
        results = probing.probe(
            images, out, backbone=backbone, layer=layers(layer), class_channels=class_channels,
            image_size=sides(image_size), crop_pct=crop_pct, keep_aspect=keep_aspect, token_pool=token_pool,
            void=void, class_names=class_list(class_names), channels=channels,
            reduce=None if reduce is None else reduce.value, heads=names(heads), baselines=names(baselines), cv=cv,
            beta_ratios=ratios(beta_ratios), tol=tol, whiten=ratios(whiten, "--whiten"), n_queries=n_queries,
            query_scale=query_scale, query_position=query_position, key_dim=key_dim, query_norm=query_norm,
            shots=counts(shots, "--shots") if shots else (),
            fractions=ratios(fractions, "--fractions") if fractions else (),
            draws=draws, groups=groups, seed=seed, device=device, leaderboard=leaderboard, log=log, notify=notify,
            command=typed_command(),
        )  # fmt: skip
    page = Path(results["page"]).resolve()
    lines = [f"\nThe page: [bold]{escape(str(page))}[/]  (open it in any browser)"]
    if leaderboard is not None:
        lines.append(f"{results['added']} new lines in [bold]{escape(str(leaderboard))}[/]")
    emit(results, as_json, *probe_page.terminal_tables(results), *lines)
