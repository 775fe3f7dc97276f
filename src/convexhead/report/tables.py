"""The table of heads, for a terminal, for markdown and as rows for a CSV file; and how numbers are written.

Everything in `report` takes one plain dictionary ``results`` (`experiments.demo` makes it) and only shows
what is in it: accuracies are fractions, gaps and excesses relative to the certified objective.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Results = Mapping[str, Any]
Row = Mapping[str, Any]

COLUMNS = (
    "Head",
    "Activation",
    "Test accuracy",
    "Certified gap",
    "Heads found",
    "Seconds",
    "Adam accuracy",
    "Adam's excess: median, worst",
    "Adam seconds a run",
)
NARROW = ("Head", "Activation", "Test", "Gap", "Heads", "Time", "Adam", "Excess")
"""Columns of the table in a terminal, which fit 80 characters: all but Adam's worst excess and its time."""
NOTHING = "–"
"""Text for a missing number."""


# -- numbers in words ---------------------------------------------------------------------------------------
def number(value: object) -> float | None:
    """A finite float, or None for whatever else JSON may hold in its place."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def accuracy(value: object) -> str:
    """A fraction in percent with one decimal: ``0.9567 -> "95.7%"``."""
    x = number(value)
    return NOTHING if x is None else f"{100 * x:.1f}%"


def relative(value: object) -> str:
    """A small fraction in percent with two significant digits: ``0.00083 -> "0.083%"``, never ``"0%"``."""
    x = number(value)
    if x is None:
        return NOTHING
    if x == 0:
        return "0%"
    percent = 100 * x
    if abs(percent) < 1e-3:
        return "<0.001%" if percent > 0 else ">−0.001%"
    digits = max(0, 1 - math.floor(math.log10(abs(percent))))
    return f"{percent:.{digits}f}%".replace("-", "−")


def seconds(value: object) -> str:
    """A duration: ``0.42 -> "0.4 s"``, ``312 -> "5.2 min"``."""
    x = number(value)
    if x is None:
        return NOTHING
    if x >= 5400:
        return f"{x / 3600:.1f} h"
    return f"{x / 60:.1f} min" if x >= 120 else f"{x:.0f} s" if x >= 10 else f"{x:.1f} s"


def probability(value: float) -> str:
    """``1e-6 -> "one in 1,000,000"``."""
    return f"one in {round(1 / value):,}" if value > 0 else "none"


# -- Adam's runs --------------------------------------------------------------------------------------------
def _of_runs(row: Row, key: str) -> list[float]:
    """Finite values of ``key`` over Adam's runs of the row's head."""
    runs = (row.get("twin") or {}).get("runs") or []
    return [x for run in runs if (x := number(run.get(key))) is not None]


def diverged(row: Row) -> int:
    """How many of Adam's runs ended in numbers that are not finite."""
    runs = (row.get("twin") or {}).get("runs") or []
    return len(runs) - len(_of_runs(row, "relative_excess"))


def adam_summary(row: Row) -> dict[str, float | None]:
    """Mean and spread of accuracy, median and worst excess, and mean seconds of Adam's runs; None: no run."""
    accuracies, excess = _of_runs(row, "test_accuracy"), _of_runs(row, "relative_excess")
    duration = _of_runs(row, "seconds")
    return {
        "accuracy_mean": statistics.fmean(accuracies) if accuracies else None,
        "accuracy_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "excess_median": statistics.median(excess) if excess else None,
        "excess_worst": max(excess, default=None),
        "seconds": statistics.fmean(duration) if duration else None,
    }


def gap(certificate: Mapping[str, Any]) -> str:
    """The certified relative gap; of a ReLU head without a tight proof the estimated one, and that it is."""
    if certificate["scope"] == "estimated":
        return f"{relative(certificate['estimated_gap'])} (estimated)"
    return relative(certificate["relative_gap"])


def cells(row: Row) -> list[str]:
    """One row of the table as text, in the order of `COLUMNS`."""
    certificate, adam = row["certificate"], adam_summary(row)
    early = not certificate["converged"] and certificate["scope"] != "estimated"
    distance = gap(certificate) + (" (stopped early)" if early else "")
    spread = accuracy(adam["accuracy_mean"])
    if adam["accuracy_sd"] is not None:
        spread += f" ± {100 * adam['accuracy_sd']:.1f}"
    excess = NOTHING
    if adam["excess_worst"] is not None:
        excess = f"{relative(adam['excess_median'])}, {relative(adam['excess_worst'])}"
    if count := diverged(row):
        excess += f" ({count} diverged)"
    return [
        str(row["head"]),
        str(row["activation"]),
        accuracy(row["test_accuracy"]),
        distance,
        str(row["heads"]),
        seconds(row["seconds"]),
        spread,
        excess,
        seconds(adam["seconds"]),
    ]


def baseline_cells(results: Results) -> list[str] | None:
    """The baseline as a row of the table: it has an accuracy, a duration and perhaps a gap, and no heads."""
    baseline = results.get("baseline")
    if not baseline:
        return None
    distance = relative(baseline.get("relative_gap"))
    mine = [baseline["name"], NOTHING, accuracy(baseline["test_accuracy"]), distance, NOTHING]
    return [*map(str, mine), seconds(baseline["seconds"]), NOTHING, NOTHING, NOTHING]


def _all_cells(results: Results) -> list[list[str]]:
    base = baseline_cells(results)
    return [cells(row) for row in results["rows"]] + ([base] if base else [])


# -- the three forms ----------------------------------------------------------------------------------------
def markdown_table(results: Results) -> str:
    """The table in GitHub's markdown, numbers aligned to the right."""

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(texts) + " |"

    rule = ["---" if i < 2 else "---:" for i in range(len(COLUMNS))]
    rows = [[plain_text(text) for text in row] for row in _all_cells(results)]
    return "\n".join([line(COLUMNS), line(rule), *map(line, rows)]) + "\n"


def plain_text(text: str) -> str:
    """Text that markdown takes for nothing but text."""
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("\n", " ")):
        text = text.replace(mark, entity)
    return text


def csv_rows(results: Results) -> list[dict[str, Any]]:
    """One flat dictionary a head, numbers unrounded, the baseline last: what `csv.DictWriter` takes."""
    own = ("head", "activation", "beta_ratio", "beta", "validation_accuracy", "test_accuracy")
    more = ("heads", "parameters", "seconds", "fit_seconds")
    proof = ("primal", "dual", "relative_gap", "sigma_slack", "failure_probability", "scope", "converged")
    rows = []
    for row in results["rows"]:
        adam = row.get("twin") or {}
        rows.append(
            {key: row[key] for key in own}
            | {key: row["certificate"][key] for key in proof}
            | {key: row[key] for key in more}
            | {f"adam_{key}": value for key, value in adam_summary(row).items()}
            | {f"adam_{key}": adam.get(key) for key in ("n_heads", "learning_rate")}
            | {"adam_runs": len(adam.get("runs", [])), "adam_diverged": diverged(row)}
        )
    if baseline := results.get("baseline"):
        keys = ("validation_accuracy", "test_accuracy", "relative_gap", "seconds")
        known = {"head": baseline["name"]} | {key: baseline.get(key) for key in keys}
        names = rows[0] if rows else known
        rows.append({key: known.get(key) for key in names})
    return rows


def terminal_table(results: Results) -> Table:
    """The table for `rich` to print."""
    from rich.table import Table
    from rich.text import Text

    dataset = results["dataset"]
    table = Table(
        title=Text(f"{results['title']}: {dataset['name']}, {dataset['backbone']}"),
        caption=Text("Gap: certified. Time: the whole path over β. Excess: of Adam's objective, median over seeds."),
        box=None,
        padding=(0, 1, 0, 0),
    )
    for i, name in enumerate(NARROW):
        table.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    for row in _all_cells(results):
        head, *others, excess, _ = row
        texts = [head.partition(" (")[0], *others, excess.partition(",")[0]]
        table.add_row(Text(texts[0], style="bold"), *map(Text, texts[1:]))
    return table
