"""``convexhead finetune``: a certified head and the last blocks of its backbone, trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.markup import escape
from typer import Argument, Option

from convexhead.cli.entry import NOTHING, command
from convexhead.cli.options import Device, Json, OwnBackbone, Run, ratios
from convexhead.cli.output import emit
from convexhead.cli.progress import shown_progress
from convexhead.interrupts import Answer, interrupts

Images = Annotated[
    str, Argument(metavar="IMAGES", help="Folder with class folders in train/ and test/, npz:FILE, hf:NAME, …")
]
OutFile = Annotated[
    Path | None, Option("--out", help="File for the network's weights, safetensors; default: save nothing.")
]
Epochs = Annotated[int, Option(help="Passes over the training images.")]
LastBlocks = Annotated[int, Option("--blocks", help="Last blocks of the backbone to train.")]
Rates = Annotated[str, Option(help="Learning rates of the last block to choose from, separated by commas.")]
HeadRates = Annotated[str, Option(help="Those of the head, in units of the last block's.")]
Seeds = Annotated[int, Option("--seeds", help="Seeds of random heads and of the order of the images.")]
Batch = Annotated[int, Option("--batch-size", help="Images a step.")]


@command(NOTHING)
def finetune(
    run: Run,
    images: Images,
    out: OutFile = None,
    epochs: Epochs = 2,
    blocks: LastBlocks = 2,
    rates: Rates = "1e-4,5e-4",
    head_rates: HeadRates = "1,10",
    seeds: Seeds = 3,
    batch_size: Batch = 32,
    backbone: OwnBackbone = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a certified head and the last blocks of its backbone on, beside a random head with the same budget."""
    from rich.table import Table

    from convexhead.deploy.training import STARTS, Recipe
    from convexhead.deploy.training import finetune as train_on

    recipe = Recipe(
        epochs=epochs, batch_size=batch_size, blocks=blocks, rates=ratios(rates, "--rates"),
        head_rates=ratios(head_rates, "--head-rates"),
    )  # fmt: skip
    with shown_progress(as_json) as notify, interrupts.answer(Answer.RAISE):
        found = train_on(run, images, out, recipe=recipe, seeds=seeds, backbone=backbone, device=device, notify=notify)
    table = Table(
        "head at the start", "rate", "head's rate", f"{found.scored} before", f"{found.scored} after", "seconds"
    )
    for trial in found.trials:
        table.add_row(
            f"{trial.start}, seed {trial.seed}", f"{trial.rate:g}", f"{trial.rate * trial.head_rate:g}",
            f"{100 * trial.before:.1f}%", f"{100 * trial.after:.1f}%", f"{trial.seconds:.1f}",
        )  # fmt: skip
    means = ", ".join(f"{start} {100 * found.accuracies(start).mean():.2f}%" for start in STARTS)
    saved = [] if out is None else [f"weights of the certified start, seed 0, in [bold]{escape(str(out))}[/]"]
    emit({"run": str(run), **found.to_dict()}, as_json, table, f"mean over seeds: {means}", *saved)
