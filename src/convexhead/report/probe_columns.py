"""What the table of a probe shows, by what is known of the images: columns, how numbers are written, what they mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convexhead.report.tables import NOTHING, Row, accuracy, number, relative, seconds


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes
    ----------
    title : str
    value : callable (row) -> number or text
        What it is sorted by.
    text : callable (row) -> str
    short : str or None
        Its title in a terminal; None: it is not shown there, so that a row fits 80 characters.
    """

    title: str
    value: Callable[[Row], Any]
    text: Callable[[Row], str]
    short: str | None = None


@dataclass(frozen=True)
class Layout:
    """How a task's results are shown.

    Attributes
    ----------
    columns : tuple of Column
    score : str
        The score in words.
    written : callable (score) -> str
        With its unit.
    by_class : (str, str)
        The title of the table of classes or columns, and a sentence of what is in it.
    notes : tuple of (str, str)
        What the columns are, with the words that `words` gives.
    test : str
        The paired test, and what titles of columns are short for; with these words too.
    percent : bool
        Whether the score is a share.
    """

    columns: tuple[Column, ...]
    score: str
    written: Callable[[object], str]
    by_class: tuple[str, str]
    notes: tuple[tuple[str, str], ...]
    test: str
    percent: bool = True


def words(seed: int, groups: int | None) -> dict[str, str]:
    """What the texts of a `Layout` say of draws, for a probe whose test images lie in so many groups, or alone."""
    if groups is None:
        return {
            "seed": str(seed),
            "drawn": "the test images",
            "interval": "Wilson's, of a share of images. It does not say what other train images would give.",
            "alike": " Frames that follow each other are alike: it is too narrow for these.",
            "exchanged": "images",
            "mcnemar": "McNemar's exact test that both are equally likely, two-sided, not corrected for the number of "
            "rows.",
            "short": "McNemar's exact test against linear",
        }
    drawn = f"the {groups} groups of test images" if groups > 1 else "groups (of a single one there is none)"
    return {
        "seed": str(seed),
        "drawn": drawn,
        "interval": DRAWN.format(drawn=drawn, seed=seed),
        "alike": "",
        "exchanged": "groups",
        "mcnemar": EXCHANGED.format(exchanged="groups"),
        "short": PAIRED,
    }


def p_value(value: object) -> str:
    """``0.0312 -> "0.031"``, ``1e-9 -> "<0.001"``."""
    x = number(value)
    return NOTHING if x is None else "<0.001" if x < 1e-3 else f"{x:.2g}"


def decimal(value: object) -> str:
    """A number with three decimals: ``-0.0312 -> "−0.031"``."""
    x = number(value)
    return NOTHING if x is None else f"{x:.3f}".replace("-", "−")


def digits(value: object) -> str:
    """A number with three significant digits: ``3.6 -> "3.60"``."""
    x = number(value)
    return NOTHING if x is None else f"{x:#.3g}".rstrip(".").replace("-", "−")


def _points(value: object) -> str:
    """A share in percent without its sign: ``0.4512 -> "45.1"``."""
    return accuracy(value).removesuffix("%").replace("-", "−")


def _of(key: str, title: str, write: Callable[[object], str], short: str | None = None) -> Column:
    return Column(title, lambda row: row[key], lambda row: write(row[key]), short)


def _interval(write: Callable[[object], str]) -> Column:
    def text(row: Row) -> str:
        return NOTHING if row["low"] is None else f"{write(row['low'])}–{write(row['high'])}"

    return Column("95% interval", lambda row: row["low"], text, "95%")


def _difference(write: Callable[[object], str]) -> Column:
    def text(row: Row) -> str:
        value, low, high = (
            NOTHING if row[key] is None else ("+" if row[key] > 0 else "") + write(row[key])
            for key in ("difference", "difference_low", "difference_high")
        )
        return value if low == NOTHING else f"{value} ({low} to {high})"

    return Column("Difference", lambda row: row["difference"], text)


def _gained(row: Row) -> str:
    return NOTHING if row["gained"] is None else f"+{row['gained']} −{row['lost']}"


def _gap(row: Row) -> str:
    return relative(row["relative_gap"]) + (" (stopped early)" if row["converged"] is False else "")


def _ratio(row: Row) -> Any:
    return row["chosen"] if row["kind"] == "head" else None


METHOD = _of("method", "Method", str, "Method")
TRAINING = (
    _of("p_value", "p", p_value, "p"),
    Column("Certified gap", lambda row: row["relative_gap"], _gap, "Gap"),
    _of("heads", "Heads", lambda value: NOTHING if value is None else str(value), "Heads"),
    Column("β/β_max", _ratio, lambda row: NOTHING if _ratio(row) is None else f"{_ratio(row):.2g}"),
    _of("seconds", "Seconds", seconds, "Time"),
)
"""Columns that every table ends with."""
DRAWN = (
    "percentiles over 1,000 draws of {drawn} with replacement (seed {seed}); – where all draws are alike. It does not "
    "say what other train images would give."
)
EXCHANGED = (
    "what the two methods say is exchanged for random {exchanged}, 1,000 times; the share of draws in which they then "
    "differ by as much, at least 0.001. Two-sided, not corrected for the number of rows."
)
COMPARED = (
    ("Difference", "the score minus that of the linear head, with its 95% interval over the same draws."),
    ("p", EXCHANGED),
)
"""What the columns say that compare a row with the linear head's."""
PAIRED = "paired test against linear, by exchange"
CLASSES = Layout(
    (
        METHOD,
        _of("top1", "Top-1", accuracy, "Top-1"),
        _interval(_points),
        _of("top5", "Top-5", accuracy, "Top-5"),
        _of("balanced_accuracy", "Balanced", accuracy),
        _of("calibration_error", "Calibration error", accuracy, "ECE"),
        Column("Gained, lost", lambda row: row["gained"], _gained),
        *TRAINING,
    ),
    "top-1",
    accuracy,
    ("By class", "The share of the test images of each class that is right."),
    (
        ("Top-1, top-5", "share of the test images whose class is the most probable one, or among the five most "
         "probable. Ties count against the method. Balanced: the mean over the classes of the share that is right."),
        ("95% interval", "of top-1: {interval}"),
        ("Calibration error", "test images fall into 15 bins of equal width by the probability of their predicted "
         "class; it is the mean over the images of the distance, in their bin, between this probability's mean and the "
         "share that is right."),
        ("Gained, lost", "images that only this method gets right, and that only the linear head gets right."),
        ("p", "{mcnemar}"),
    ),
    "{short}. ECE: calibration error",
)  # fmt: skip
LABELS = Layout(
    (
        METHOD,
        _of("mean_ap", "mAP", accuracy, "mAP"),
        _interval(_points),
        _of("mean_auroc", "AUROC", accuracy, "AUROC"),
        _of("cross_entropy", "Cross-entropy", decimal),
        _of("exact", "All right", accuracy, "Exact"),
        _difference(_points),
        *TRAINING,
    ),
    "mean average precision",
    accuracy,
    ("By label", "The average precision of each label on the test images; – where all of them have it, or none."),
    (
        ("mAP, AUROC", "average precision and area under the ROC curve, means over the labels that some test images "
         "have and others have not."),
        ("95% interval", f"of mAP: {DRAWN}"),
        ("Cross-entropy", "binary, mean over images and labels, in nats; – where a probability of 0 or 1 is wrong, "
         "which makes it infinite."),
        ("All right", "share of the test images whose labels are all right, at a probability of one half."),
        *COMPARED,
    ),
    f"{PAIRED}. Exact: all labels right",
)  # fmt: skip
NUMBERS = Layout(
    (
        METHOD,
        _of("r2", "R²", decimal, "R²"),
        _interval(decimal),
        _of("mae", "Mean absolute error", digits, "MAE"),
        _difference(decimal),
        *TRAINING,
    ),
    "R²",
    decimal,
    ("By column", "R² of each column on the test images."),
    (
        ("R²", "1 − Σ (y − f)² / Σ (y − mean of y)² on the test images, mean over the columns."),
        ("95% interval", f"of R²: {DRAWN}"),
        ("Mean absolute error", "over images and columns, in the unit of the numbers."),
        *COMPARED,
    ),
    f"{PAIRED}. MAE: mean absolute error",
    percent=False,
)
MASKS = Layout(
    (
        METHOD,
        _of("mean_iou", "Mean IoU", accuracy, "mIoU"),
        _interval(_points),
        _of("pixel_accuracy", "Pixels right", accuracy, "Pixels"),
        _difference(_points),
        *TRAINING,
    ),
    "mean IoU",
    accuracy,
    ("By class", "Intersection over union of each class on the test images; – where no mask and no prediction has it."),
    (
        ("Mean IoU", "intersection over union of each class over all test pixels, mean over the classes that occur. "
         "Probabilities of tokens are interpolated to pixels. Pixels without a label do not count."),
        ("95% interval", f"of mean IoU: {DRAWN}{{alike}}"),
        ("Pixels right", "share of the pixels whose likeliest class is that of the mask."),
        *COMPARED,
    ),
    PAIRED,
)  # fmt: skip
LAYOUTS = {"classes": CLASSES, "multi-label": LABELS, "regression": NUMBERS, "masks": MASKS}
"""By what is known of the images."""
