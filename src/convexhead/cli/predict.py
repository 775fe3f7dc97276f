"""``convexhead predict``: what a trained head says of images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from rich.markup import escape
from typer import Argument, Option

from convexhead.cli.entry import NOTHING, command
from convexhead.cli.extract import BatchSize, SkipBroken
from convexhead.cli.options import Device, Json, OwnBackbone, Run
from convexhead.cli.output import emit, errors
from convexhead.cli.progress import shown_progress
from convexhead.errors import InputError
from convexhead.interrupts import Answer, interrupts

Images = Annotated[
    str,
    Argument(
        metavar="IMAGES|STORE",
        help="Folder with images, however deep; an image; a token store; or table:FILE, npz:FILE, hf:NAME, "
        "webdataset:PATTERN, …",
    ),
]
OutFile = Annotated[
    Path | None,
    Option(
        "--out",
        help="File to write, .csv or .parquet; default: CSV on standard output. Of a head with an output for every "
        "token, a new folder for masks.",
    ),
]
Top = Annotated[int | None, Option(help="Classes to tell of each image; default: the probabilities of all.")]
Split = Annotated[str | None, Option(help="Which images of a store, or of a source with splits; default: all.")]


@command(NOTHING)
def predict(
    run: Run,
    images: Images,
    out: OutFile = None,
    top: Top = None,
    split: Split = None,
    backbone: OwnBackbone = None,
    batch_size: BatchSize = None,
    skip_broken: SkipBroken = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Predict images through the run's backbone: classes and probabilities, outputs of a regression, or masks."""
    from convexhead import predict as predicting
    from convexhead.persistence import load

    head = load(run)
    given: dict[str, Any] = {"split": split, "backbone": backbone, "batch_size": batch_size, "device": device}
    given |= {"skip_broken": skip_broken}
    if head.model_.head.r != 1:
        _masks(run, head, images, out, top, given, as_json)
        return
    if out is not None:
        predicting.check_file(out)
    with shown_progress(as_json) as notify, interrupts.answer(Answer.RAISE):
        found = predicting.predict(head, images, top=top, notify=notify, **given)
        result: dict[str, Any] = {"run": str(run), "columns": found.columns}
        if out is not None:
            result |= {"images": predicting.write(found, out), "out": str(out)}
        elif as_json:
            result["rows"] = list(found)
            result["images"] = len(result["rows"])
        else:
            predicting.write_csv(found, sys.stdout)
    result |= {"broken": found.broken, "left_out": found.left_out}
    if as_json:
        emit(result, as_json)
        return
    if out is not None:
        emit(result, as_json, f"{result['images']} images, written to [bold]{escape(str(out))}[/]")
    _tell(found.broken, found.left_out)


def _masks(
    run: Path, head: Any, images: str, out: Path | None, top: int | None, given: dict[str, Any], as_json: bool
) -> None:
    """Write masks, of a head with an output for every token."""
    from convexhead.mask_files import write_masks

    every = f"{run} has an output for every token"
    if out is None:
        raise InputError(f"{every}, which become masks: give a folder for them, out='masks' say")
    if top is not None:
        raise InputError(f"{every}, and its masks have one class a pixel: top={top} must be left out")
    with shown_progress(as_json) as notify, interrupts.answer(Answer.RAISE):
        made = write_masks(head, images, out, notify=notify, **given)
    result = {
        "run": str(run), "out": str(out), "images": made.count, "classes": made.classes, "unseen": made.unseen,
        "broken": made.broken, "left_out": made.left_out,
    }  # fmt: skip
    emit(result, as_json, f"{made.count} masks of {len(made.classes)} classes in [bold]{escape(str(out))}[/]")
    if not as_json:
        _tell(made.broken, made.left_out)


def _tell(broken: list[str], left_out: dict[str, list[str]]) -> None:
    for what, names in {"broken images left out": broken, **_reasons(left_out)}.items():
        if names:
            some = ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")
            errors.print(escape(f"{len(names)} {what}: {some}"), soft_wrap=True)


def _reasons(left_out: dict[str, list[str]]) -> dict[str, list[str]]:
    return {f"not read, {reason}": names for reason, names in left_out.items()}
