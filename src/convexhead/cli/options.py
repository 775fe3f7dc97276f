"""The options that commands share, each written once: its name, type and help text."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option
from typer.core import TyperCommand

from convexhead.errors import InputError

Store = Annotated[Path, Argument(metavar="STORE", help="Folder of a token store, made by `convexhead extract`.")]
Run = Annotated[
    Path, Argument(metavar="RUN", help="Folder of a trained head, made by `convexhead fit`, `path` or `adam`.")
]
Out = Annotated[Path, Option("--out", help="Folder to write.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace the run that is in the folder already.")]
Json = Annotated[bool, Option("--json", help="Print one JSON object instead of a table, and no progress.")]
Log = Annotated[
    str | None,
    Option(help="Where rows of the training go: FILE.csv, FILE.jsonl, tensorboard:FOLDER or wandb:PROJECT."),
]
Groups = Annotated[
    Path | None,
    Option(
        help="Table (.csv or .parquet) with the columns image and group. Images of a group, such as frames of a drive, "
        "are all trained on or all held out."
    ),
]
Device = Annotated[str, Option(help="Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, …")]

# -- a head ------------------------------------------------------------------------------------------------------------
Head = Annotated[
    str, Option(help="How tokens are mixed: self-attention, attentive, mlp-mixer, fno, block-fno, mlp or linear.")
]
Activation = Annotated[
    str,
    Option(
        help="linear, gated-relu, or relu. The certificate of gated-relu is for its gates; relu is certified on small "
        "problems only, otherwise its gap is an estimate."
    ),
]
BetaRatio = Annotated[
    float,
    Option(
        help="Weight β of the penalty as a share of β_max, at which no head is left. A smaller share gives more heads "
        "and takes longer."
    ),
]
Beta = Annotated[float | None, Option(help="Weight β itself, instead of --beta-ratio.")]
Pool = Annotated[
    str,
    Option(
        help="Which tokens are read: mean (their mean), cls (the class token), or none: each has an output, for masks."
    ),
]
Whiten = Annotated[
    float,
    Option(
        metavar="A",
        help="How far to whiten the tokens by their second moment on the training images: 0 not at all, 1 fully. "
        "The run keeps the map.",
    ),
]
Tol = Annotated[float, Option(help="Relative gap to reach: how far above the global optimum the head may be.")]
Solver = Annotated[
    str,
    Option(
        help="auto (the cheapest for the problem), fista, group-newton, kernel, column-generation, ridge, "
        "relu-exact or relu-search."
    ),
]
Gates = Annotated[int, Option("--n-gates", help="Gates to sample for --activation gated-relu.")]
Blocks = Annotated[int, Option("--n-blocks", help="Channel groups of block-fno.")]
Outputs = Annotated[
    str, Option(help="Whether each channel group of block-fno writes all outputs (shared) or its own (grouped).")
]
Queries = Annotated[int, Option("--n-queries", help="Queries of the attentive head to sample from the tokens.")]
QueryScale = Annotated[
    float, Option(help="Standard deviation of the scores of sampled queries within an image: how sharp their maps are.")
]
QueryPosition = Annotated[
    bool, Option("--query-position/--no-query-position", help="Whether sampled maps also depend on the place.")
]
KeyDim = Annotated[
    int | None, Option(help="Leading principal directions of the tokens that sampled queries lie in; default: all.")
]
QueryNorm = Annotated[
    str, Option(help="One nuclear norm over the weights of all queries (all), or one for each of them (each).")
]
FitIntercept = Annotated[bool, Option(help="Add an intercept, which is not penalised.")]
Loss = Annotated[
    str | None,
    Option(
        help="cross-entropy (one class an image), binary-cross-entropy (several), squared or huber (numbers). Default: "
        "the first of these that fits what the store says of its images."
    ),
]
PosWeight = Annotated[
    float | None, Option("--pos-weight", help="Weight of the labels that an image has, for binary-cross-entropy.")
]
ClassWeight = Annotated[
    str | None,
    Option(help="balanced: every class counts alike, however many images it has. Default: every image."),
]
Smoothing = Annotated[float, Option("--label-smoothing", help="Share of each target that is spread over all classes.")]
Seed = Annotated[int, Option("--seed", help="Seed of gates and random starts.")]

# -- images ------------------------------------------------------------------------------------------------------------
Layer = Annotated[
    str | None,
    Option(
        metavar="N",
        help="Block of the backbone to read tokens from; default: its last map. Several, such as 4 8 or 4 last, stand "
        "side by side in the channels and weigh alike.",
    ),
]
ClassChannels = Annotated[
    bool | None,
    Option(
        "--class-channels/--no-class-channels",
        help="Put the channels of the class token beside those of every token; default: no.",
    ),
]
ImageSize = Annotated[int | None, Option(help="Side of the images in pixels; default: the backbone's own.")]
Sides = Annotated[
    str | None,
    Option(
        "--image-size",
        metavar="PIXELS",
        help="Side of the images in pixels, or HEIGHTxWIDTH; default: the backbone's own.",
    ),
]
TokenPool = Annotated[int | None, Option(help="Average the token grid down to this many tokens a side.")]
OwnBackbone = Annotated[
    str | None, Option("--backbone", help="The backbone of the run, where its weights lie elsewhere now.")
]
BACKBONES = (
    "packaged:efficientnet-lite0, timm:NAME, timm:NAME@FILE (weights of your own, .safetensors or .pth), hf:NAME, or "
    "patches:K (squares of K x K raw pixels)"
)


class SeveralNumbers(TyperCommand):
    """Reads ``--shots 1 2 4`` as ``--shots 1,2,4``."""

    taking = ("--shots", "--fractions", "--beta-ratios", "--layer", "--whiten")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined: list[str] = []
        for arg in args:
            if joined[-2:-1] and joined[-2] in self.taking and _is_number(arg):
                joined[-1] += f",{arg}"
            else:
                joined.append(arg)
        return super().parse_args(ctx, joined)


def _is_number(text: str) -> bool:
    return text == "last" or (re.fullmatch(r"[0-9.,e-]+", text) is not None and text[0] != "-")


class Reduce(str, Enum):
    """How channels are reduced."""

    avgpool = "avgpool"
    pca = "pca"


class Dtype(str, Enum):
    """Precision of stored tokens."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


# -- several heads -----------------------------------------------------------------------------------------------------
BetaRatios = Annotated[str, Option(help="The grid of β as shares of β_max, separated by commas.")]
AdamSeeds = Annotated[
    int, Option("--seeds", min=0, help="How often Adam trains each head, from different starts; 0: never.")
]


def names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def ratios(text: str, option: str = "--beta-ratios") -> list[float]:
    """The numbers of an option.

    Raises
    ------
    InputError
        Something else stands there.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} must be numbers separated by commas, got {text!r}") from error


def counts(text: str, option: str) -> list[int]:
    """The whole numbers of an option.

    Raises
    ------
    InputError
        Something else stands there.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} must be whole numbers separated by commas, got {text!r}") from error


def layers(text: str | None) -> int | list[int | None] | None:
    """The layer or layers of ``--layer``.

    Raises
    ------
    InputError
        Something else stands there.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part == "last" or part.isdecimal() for part in parts):
        raise InputError(f"--layer must be whole numbers or last, got {text!r}")
    found = [None if part == "last" else int(part) for part in parts]
    return found if len(found) > 1 else found[0]


def sides(text: str | None) -> int | tuple[int, int] | None:
    """The number or the two numbers of ``--image-size``.

    Raises
    ------
    InputError
        Something else stands there.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if not all(part.strip().isdecimal() for part in parts) or len(parts) > 2:
        raise InputError(f"--image-size must be one number of pixels or HEIGHTxWIDTH, got {text!r}")
    numbers = [int(part) for part in parts]
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def pool_of(text: str) -> str | None:
    """What ``--pool`` says; ``none`` is None."""
    return None if text == "none" else text
