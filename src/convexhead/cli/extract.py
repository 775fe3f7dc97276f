"""``convexhead extract``: from images to a token store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.markup import escape
from typer import Argument, Option

from convexhead.cli.entry import AGAIN, command
from convexhead.cli.options import (
    BACKBONES,
    ClassChannels,
    Device,
    Dtype,
    Json,
    Layer,
    Out,
    Reduce,
    SeveralNumbers,
    Sides,
    TokenPool,
    layers,
    sides,
)
from convexhead.cli.options import names as listed
from convexhead.cli.output import errors, show_store, speaks_for_all
from convexhead.cli.progress import shown_progress

Images = Annotated[
    str,
    Argument(
        metavar="IMAGES",
        help="Folder of class folders, with train/ and test/ beside each other where there is a split, or of images/ "
        "and labels/ with a mask labels/NAME.png for each image, or of images/ and labels.csv; or table:FILE, "
        "npz:FILE, webdataset:PATTERN, hf:NAME, torchvision:CIFAR100, sklearn:digits.",
    ),
]
Like = Annotated[
    Path | None,
    Option(
        help="A store or a run to be comparable with: take its backbone, layer, preprocessing, fitted reduction, "
        "precision and order of classes."
    ),
]
Backbone = Annotated[
    str | None, Option(help=f"Frozen network that makes the tokens: {BACKBONES}. Default: packaged:efficientnet-lite0.")
]
CropPct = Annotated[
    float | None, Option(help="Share of the image that the centre crop keeps; default: the backbone's.")
]
KeepAspect = Annotated[
    bool | None,
    Option(
        "--keep-aspect/--no-keep-aspect",
        help="Scale images to --image-size pixels of their longer side, so that each has its own number of tokens; "
        "default: no.",
    ),
]
Channels = Annotated[int | None, Option(help="Channels of a token to keep; default: all.")]
Reduction = Annotated[
    Reduce | None,
    Option(
        help="How --channels are made: avgpool averages neighbours, pca keeps principal components; default: avgpool."
    ),
]
Standardize = Annotated[
    bool | None,
    Option("--standardize/--no-standardize", help="Give each channel mean 0 and variance 1 over train; default: yes."),
]
Constant = Annotated[
    bool | None,
    Option(
        "--constant/--no-constant",
        help="Append a channel of ones, so that attention contains the linear probe; default: no.",
    ),
]
Precision = Annotated[Dtype | None, Option(help="Precision in which tokens are stored; default: float16.")]
BatchSize = Annotated[int | None, Option(help="Images in a forward pass; default: 8 on a CPU, 256 on a GPU.")]
ShardSize = Annotated[int, Option(help="Images in a file, and the most work that a crash can lose.")]
Void = Annotated[int | None, Option(help="Of images with masks: the number of pixels that do not count.")]
ClassNames = Annotated[
    str | None,
    Option(
        help="Of images with masks: the names of numbers 0, 1, … separated by commas, or a text file with one a line; "
        "default: classes.txt beside the splits, else the numbers."
    ),
]
SkipBroken = Annotated[bool, Option(help="Leave out images that cannot be read, instead of stopping.")]


def class_list(text: str | None) -> list[str] | Path | None:
    """What ``--class-names`` says: names, or a file with names."""
    return None if text is None else Path(text) if Path(text).is_file() else listed(text)


@command(f"finished shards are kept in {{out}}; {AGAIN}", cls=SeveralNumbers, shares=True)
def extract(
    images: Images,
    out: Out,
    like: Like = None,
    backbone: Backbone = None,
    layer: Layer = None,
    class_channels: ClassChannels = None,
    image_size: Sides = None,
    crop_pct: CropPct = None,
    keep_aspect: KeepAspect = None,
    channels: Channels = None,
    reduce: Reduction = None,
    token_pool: TokenPool = None,
    standardize: Standardize = None,
    constant: Constant = None,
    dtype: Precision = None,
    batch_size: BatchSize = None,
    shard_size: ShardSize = 512,
    skip_broken: SkipBroken = False,
    void: Void = None,
    class_names: ClassNames = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Run a frozen backbone over images and store the tokens; run it again to go on where it stopped."""
    from convexhead.tokens import extract as run
    from convexhead.tokens.progress import told_to
    from convexhead.tokens.store.census import census_lines

    with shown_progress(as_json) as notify:
        store = run(
            images,
            backbone or ("packaged:efficientnet-lite0" if like is None else None),
            out,
            like=like,
            layer=layers(layer),
            class_channels=class_channels,
            image_size=sides(image_size),
            crop_pct=crop_pct,
            keep_aspect=keep_aspect,
            channels=channels,
            reduce=None if reduce is None else reduce.value,
            token_pool=token_pool,
            standardize=standardize,
            constant=constant,
            dtype=None if dtype is None else dtype.value,
            batch_size=batch_size,
            shard_size=shard_size,
            skip_broken=skip_broken,
            void=void,
            class_names=class_list(class_names),
            device=device,
            progress=told_to(notify),
        )
    if not speaks_for_all():
        return
    info = store.info()
    show_store(store, as_json, *map(escape, census_lines(info["found"], store.class_names)))
    broken = [name for names in info["broken"].values() for name in names]
    if broken and not as_json:
        names = ", ".join(map(repr, broken[:5])) + (", …" if len(broken) > 5 else "")
        errors.print(escape(f"{len(broken)} broken images left out: {names}"))
