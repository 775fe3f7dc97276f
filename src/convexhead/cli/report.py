"""``convexhead report``: a page about trained heads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.markup import escape
from typer import Argument, Option

from convexhead.cli.entry import NOTHING, command
from convexhead.cli.options import Json
from convexhead.cli.output import emit
from convexhead.cli.progress import shown_progress

Runs = Annotated[list[Path], Argument(metavar="RUN", help="Folders made by `convexhead fit`, `path` or `adam`.")]
Page = Annotated[Path, Option("--out", help="File to write.")]
Tokens = Annotated[
    Path | None,
    Option(help="Token store to score the runs on anew; default: the scores that the runs were saved with."),
]
Images = Annotated[str | None, Option(help="Where the images are, if they have moved since `convexhead extract`.")]
Gallery = Annotated[int, Option("--gallery", help="Images to show of each run, at most 64.")]
Figures = Annotated[
    Path | None, Option(help="Folder to write each figure to, as SVG, PDF and PNG with its numbers as JSON.")
]


@command(NOTHING)
def report(
    runs: Runs,
    out: Page = Path("report.html"),
    tokens: Tokens = None,
    images: Images = None,
    size: Gallery = 64,
    figures: Figures = None,
    as_json: Json = False,
) -> None:
    """Write one HTML file about trained heads: certificate, spectra, maps and clusters on images, errors."""
    from convexhead.report.run_page import write_report

    with shown_progress(as_json, "drawing"):
        write_report(runs, out, tokens=tokens, images=images, size=size, figure_folder=figures)
    written = out.stat().st_size
    emit(
        {"page": str(out), "bytes": written, "runs": [str(run) for run in runs]},
        as_json,
        f"[bold]{escape(str(out.resolve()))}[/], {written / 1e6:.1f} MB: open it in any browser",
    )
