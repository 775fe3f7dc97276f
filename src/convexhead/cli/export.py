"""``convexhead export``: a trained head as a file that other programs run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.markup import escape
from typer import Option

from convexhead.cli.entry import NOTHING, command
from convexhead.cli.options import Json, OwnBackbone, Run
from convexhead.cli.output import emit
from convexhead.cli.progress import shown_progress

Format = Annotated[
    str,
    Option(
        help="onnx (for onnxruntime), export (for torch, a .pt2 file), safetensors (the weights), or sklearn (a linear "
        "head as a LogisticRegression, read by skops)."
    ),
]
OutFile = Annotated[Path, Option("--out", help="File to write.")]
WithBackbone = Annotated[
    bool, Option(help="From images to outputs: with the backbone, its preprocessing and the token reduction.")
]
Prepared = Annotated[bool, Option(help="The file takes images that are resized and cropped already.")]


@command(NOTHING)
def export(
    run: Run,
    out: OutFile,
    format: Format = "onnx",
    with_backbone: WithBackbone = False,
    prepared: Prepared = False,
    backbone: OwnBackbone = None,
    as_json: Json = False,
) -> None:
    """Write a trained head as a file that runs without this package: tokens to outputs, or images to outputs."""
    from convexhead.deploy import export_run

    with shown_progress(as_json, "writing the file"):
        written = export_run(run, out, format=format, with_backbone=with_backbone, backbone=backbone, prepared=prepared)
    checked = []
    if written.difference is not None:
        checked = [f"read back: outputs differ from the head's by {written.difference:.0e} of the largest"]
    emit(
        {"path": str(written.path), "format": format, "content": written.content, "difference": written.difference},
        as_json,
        f"written: [bold]{escape(str(written.path))}[/]; it {escape(written.content)}",
        *checked,
    )
