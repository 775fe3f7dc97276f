"""``convexhead compare``, ``demo`` and ``cifar100``: every head on the same tokens, as a table and a page."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

from typer import Option

from convexhead.cli.entry import AGAIN, command
from convexhead.cli.options import (
    BACKBONES,
    AdamSeeds,
    BetaRatios,
    Gates,
    ImageSize,
    Json,
    KeyDim,
    Layer,
    Log,
    Out,
    Queries,
    QueryNorm,
    QueryPosition,
    QueryScale,
    SeveralNumbers,
    Store,
    TokenPool,
    Tol,
    layers,
    names,
    ratios,
)
from convexhead.cli.output import show_comparison, typed_command
from convexhead.cli.progress import shown_progress

KEPT = f"what was finished is kept in {{out}}; {AGAIN}"


class Scale(str, Enum):
    """How much of CIFAR-100 is used."""

    full = "full"
    ten = "10k"
    two = "2k"


Heads = Annotated[str, Option(help="Heads, separated by commas; default: all.")]
Activations = Annotated[str, Option(help="Activations, separated by commas: linear, gated-relu, relu.")]
Images = Annotated[str | None, Option(help="CIFAR-100: a folder with train/ and test/, or torchvision:CIFAR100.")]
Backbone = Annotated[str, Option(help=f"Frozen network that makes the tokens: {BACKBONES}.")]
Tokens = Annotated[Path | None, Option(help="A token store of CIFAR-100, instead of --images.")]
Size = Annotated[
    Scale,
    Option(help="full: all images. 10k: 80 train and 20 test images of each class. 2k: that of the first 20 classes."),
]
EveryCell = Annotated[
    bool,
    Option(
        "--every-cell", help="Train every head with every activation, and Adam with 5, 20 and 50 heads. Takes long."
    ),
]
SomeHeads = Annotated[str, Option(help="Heads to keep, separated by commas; default: all of the scale.")]
SomeActivations = Annotated[str, Option(help="Activations to keep, separated by commas; default: all of the scale.")]
Channels = Annotated[
    int | None, Option(help="Principal components to keep, beside the constant channel; default: the scale's.")
]
SomeGates = Annotated[int | None, Option(help="Gates to sample for gated-relu; default: the scale's.")]
Epochs = Annotated[int | None, Option(help="Epochs of Adam and of the attentive probe; default: the scale's.")]
TuningSeeds = Annotated[
    int | None, Option(help="How many of Adam's three seeds try each learning rate; default: the scale's.")
]
Sizes = Annotated[bool, Option("--sizes", help="Train the main heads on fewer images too.")]
Jobs = Annotated[
    int | None, Option(min=1, help="Heads to train at a time, each in a process of its own; default: the scale's.")
]


@command(KEPT)
def compare(
    store: Store,
    out: Out = Path("comparison"),
    heads: Heads = "",
    activations: Activations = "linear,gated-relu",
    beta_ratios: BetaRatios = "0.3,0.1,0.03,0.01,0.003",
    n_gates: Gates = 8,
    n_queries: Queries = 192,
    query_scale: QueryScale = 2.0,
    query_position: QueryPosition = True,
    key_dim: KeyDim = None,
    query_norm: QueryNorm = "all",
    seeds: AdamSeeds = 3,
    tol: Tol = 1e-3,
    as_json: Json = False,
) -> None:
    """Train every head on a store, beside Adam and a linear probe, and write a table and a page."""
    from convexhead.experiments.compare import compare_heads

    with shown_progress(as_json) as notify:
        results = compare_heads(
            store, out, heads=names(heads), activations=names(activations), beta_ratios=ratios(beta_ratios),
            n_gates=n_gates, n_queries=n_queries, query_scale=query_scale, query_position=query_position,
            key_dim=key_dim, query_norm=query_norm, seeds=seeds, tol=tol, notify=notify, command=typed_command(),
        )  # fmt: skip
    show_comparison(results, as_json)


@command(KEPT)
def demo(out: Out = Path("demo"), seeds: AdamSeeds = 3, as_json: Json = False) -> None:
    """Show the main job on built-in data: digits through EfficientNet-Lite0, every head, one page. Minutes."""
    from convexhead.experiments.demo import run_demo

    with shown_progress(as_json) as notify:
        results = run_demo(out, seeds=seeds, notify=notify)
    show_comparison(results, as_json)


@command(KEPT, cls=SeveralNumbers)
def cifar100(
    out: Out = Path("cifar100"),
    images: Images = None,
    backbone: Backbone = "timm:gmlp_s16_224.ra3_in1k",
    layer: Layer = None,
    image_size: ImageSize = None,
    tokens: Tokens = None,
    scale: Size = Scale.full,
    every_cell: EveryCell = False,
    heads: SomeHeads = "",
    activations: SomeActivations = "",
    token_pool: TokenPool = None,
    channels: Channels = None,
    n_gates: SomeGates = None,
    epochs: Epochs = None,
    tuning_seeds: TuningSeeds = None,
    sizes: Sizes = False,
    jobs: Jobs = None,
    log: Log = None,
    as_json: Json = False,
) -> None:
    """Run the published experiment: every head, convex and by Adam, on CIFAR-100. Run it again to go on."""
    from convexhead.experiments.cifar100 import run_cifar100

    with shown_progress(as_json) as notify:
        results = run_cifar100(
            out, images=images, backbone=backbone, layer=layers(layer), image_size=image_size, tokens=tokens,
            scale=scale.value, every_cell=every_cell, heads=tuple(names(heads)), activations=tuple(names(activations)),
            token_pool=token_pool, channels=channels, n_gates=n_gates, epochs=epochs, tuning_seeds=tuning_seeds,
            sizes=sizes, jobs=jobs, log=log, notify=notify, command=typed_command(),
        )  # fmt: skip
    show_comparison(results, as_json)
