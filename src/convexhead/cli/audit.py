"""``convexhead evaluate`` and ``convexhead audit``: how good is a trained head?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.markup import escape
from typer import Option

from convexhead.cli.entry import NOTHING, command
from convexhead.cli.options import Json, Run, Store, Tol
from convexhead.cli.output import certificate_line, emit
from convexhead.cli.progress import shown_progress

Split = Annotated[str, Option(help="Which images of the store: test, train or val.")]
Beta = Annotated[float | None, Option(help="Weight β of the penalty; default: the one that the head was trained at.")]
Reference = Annotated[
    Path | None,
    Option(help="Run of `convexhead fit` on the same problem: its lower bound makes the audit sharper."),
]


@command(NOTHING)
def evaluate(run: Run, store: Store, split: Split = "test", as_json: Json = False) -> None:
    """Measure the accuracy of a trained head on the images of a store."""
    from convexhead import runs

    with shown_progress(as_json, "scoring"):
        result = runs.evaluate(run, store, split=split)
    five = f", top-5 {100 * result['top5']:.1f}%" if result["top5"] < 1 else ""
    top1 = f"top-1 [bold]{100 * result['top1']:.1f}%[/]"
    emit(result, as_json, f"{split}: {top1}{five} on {result['images']} images")


@command(NOTHING)
def audit(
    run: Run,
    store: Store,
    beta: Beta = None,
    reference: Reference = None,
    tol: Tol = 1e-3,
    as_json: Json = False,
) -> None:
    """Bound how far a trained head is from the global optimum on the images that it was trained on."""
    from convexhead import runs

    with shown_progress(as_json, "certifying"):
        found = runs.audit(run, store, beta=beta, reference=reference, tol=tol)
    result = {"run": str(run), "beta": found.beta, "certificate": found.certificate.to_dict()}
    lines = [certificate_line(found.certificate)]
    if found.reference is not None:
        known = found.reference.dual
        result["reference"] = {"run": str(reference), "dual": known}
        used = "used here" if found.certificate.dual <= known else "below the one found here"
        lines.append(f"the reference {escape(str(reference))} has the lower bound {known:.6g}, {used}")
    emit(result, as_json, *lines)
