"""``convexhead evaluate`` and ``convexhead audit``: how good is a trained head?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from rich.markup import escape
from typer import Argument, Option

from convexhead.cli.entry import NOTHING, command
from convexhead.cli.options import Json, Pool, Run, Store, Tol
from convexhead.cli.output import audit_lines, emit, speaks_for_all
from convexhead.cli.progress import shown_progress

Split = Annotated[str, Option(help="Which images of the store: test, train or val.")]
Masks = Annotated[str | None, Option("--images", help="Where images with masks are, if they have moved.")]
Beta = Annotated[float | None, Option(help="Weight β of the penalty; default: the one that the head was trained at.")]
Weights = Annotated[
    Path,
    Argument(
        metavar="RUN|FILE",
        help="Folder of a trained head, or a head of others in a file: .npz with coef_ and intercept_, .safetensors or "
        ".pth with the weights of a linear layer or of an attentive probe.",
    ),
]
Reference = Annotated[
    Path | None,
    Option(help="Run of `convexhead fit` on the same problem: the audit tells the distance from its optimum."),
]
NoReference = Annotated[
    bool,
    Option("--no-reference", help="Prove from the weights alone, and do not find the optimum of a linear head."),
]


@command(NOTHING, shares=True)
def evaluate(run: Run, store: Store, split: Split = "test", images: Masks = None, as_json: Json = False) -> None:
    """Score a trained head on the images of a store: accuracy, mean average precision, R² or mean IoU."""
    from convexhead import runs

    with shown_progress(as_json, "scoring"):
        result = runs.evaluate(run, store, split=split, images=images)
    if not speaks_for_all():
        return
    emit(result, as_json, f"{split}: {_in_words(result)}")


def _in_words(scores: dict[str, Any]) -> str:
    n = scores["images"]
    if "mean_iou" in scores:
        unseen = f"; {100 * scores['unseen']:.2g}% of the pixels were cropped" if scores["unseen"] else ""
        return (
            f"mean IoU [bold]{100 * scores['mean_iou']:.1f}%[/]{_between(scores['mean_iou_interval'])}, "
            f"pixels right {100 * scores['pixel_accuracy']:.1f}% on {n} images{unseen}"
        )
    if "mean_ap" in scores:
        return (
            f"mean average precision [bold]{100 * scores['mean_ap']:.1f}%[/], AUROC {100 * scores['mean_auroc']:.1f}%, "
            f"all labels right {100 * scores['exact']:.1f}% on {n} images"
        )
    if "r2" in scores:
        return (
            f"R² [bold]{scores['r2']:.3f}[/], RMSE {scores['rmse']:.4g}, "
            f"mean absolute error {scores['mae']:.4g} on {n} images"
        )
    five = f", top-5 {100 * scores['top5']:.1f}%" if scores["top5"] < 1 else ""
    return f"top-1 [bold]{100 * scores['top1']:.1f}%[/]{_between(scores['top1_interval'])}{five} on {n} images"


def _between(interval: tuple[float, float] | None) -> str:
    """An interval in words, where there is one."""
    return "" if interval is None else f" (95%: {100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


@command(NOTHING, shares=True)
def audit(
    run: Weights,
    store: Store,
    beta: Beta = None,
    reference: Reference = None,
    no_reference: NoReference = False,
    pool: Pool = "mean",
    tol: Tol = 1e-3,
    as_json: Json = False,
) -> None:
    """Bound how far a trained head is from the global optimum on the images that it was trained on."""
    from convexhead import runs

    with shown_progress(as_json, "certifying"):
        found = runs.audit(
            run, store, beta=beta, reference=reference, find_optimum=not no_reference, pool=pool, tol=tol
        )
    if not speaks_for_all():
        return
    result: dict[str, Any] = {
        "run": str(run),
        "beta": found.beta,
        "certificate": found.certificate.to_dict(),
        "proven": None if found.proven is None else found.proven.to_dict(),
        "distance": None,
    }
    if found.told is not None:
        result["program"] = found.told
    if found.reference is not None and found.distance is not None:
        known = found.reference
        result["reference"] = {
            "run": None if reference is None else str(reference), "primal": known.primal, "dual": known.dual
        }  # fmt: skip
        result["distance"] = {"at_least": found.distance[0], "at_most": found.distance[1]}
    if found.missing is not None:
        result["missing"] = {"reward": found.missing.reward, "query": found.missing.query.tolist()}
    whose = "found here" if reference is None else f"of {escape(str(reference))}"
    emit(result, as_json, *audit_lines(found, whose))
