"""The tables of a probe, for a terminal, markdown and CSV files, and its page; see `convexhead.experiments.probe`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from convexhead.errors import require
from convexhead.report import drawing, page
from convexhead.report.tables import NOTHING, Results, Row, accuracy, number, plain_text, relative, seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

COLUMNS = (
    "Method", "Top-1", "95% interval", "Top-5", "Balanced", "Calibration error", "Gained, lost", "p", "Certified gap",
    "Heads", "β/β_max", "Seconds",
)  # fmt: skip
NARROW = (0, 1, 2, 3, 5, 7, 8, 9, 11)
"""Columns of the table in a terminal, which fit 80 characters."""
SHORT = {"Calibration error": "ECE", "Certified gap": "Gap", "Seconds": "Time", "95% interval": "95%"}


def p_value(value: object) -> str:
    """``0.0312 -> "0.031"``, ``1e-9 -> "<0.001"``."""
    x = number(value)
    return NOTHING if x is None else "<0.001" if x < 1e-3 else f"{x:.2g}"


def cells(row: Row) -> list[str]:
    """One row as text, in the order of `COLUMNS`."""
    gap = relative(row["relative_gap"]) + (" (stopped early)" if row["converged"] is False else "")
    compared = NOTHING if row["gained"] is None else f"+{row['gained']} −{row['lost']}"
    return [
        row["method"],
        accuracy(row["top1"]),
        f"{100 * row['low']:.1f}–{100 * row['high']:.1f}",
        accuracy(row["top5"]),
        accuracy(row["balanced_accuracy"]),
        accuracy(row["calibration_error"]),
        compared,
        p_value(row["p_value"]),
        gap,
        NOTHING if row["heads"] is None else str(row["heads"]),
        f"{row['chosen']:.2g}" if row["kind"] == "head" else NOTHING,
        seconds(row["seconds"]),
    ]


def of_all(results: Results) -> list[Row]:
    """The rows of the fits on all train images."""
    return [row for row in results["rows"] if row["draw"] is None]


def efficiency(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Of each method, by budget: images, and mean and spread of top-1 over the draws; all images last."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in [*(row for row in results["rows"] if row["draw"] is not None), *of_all(results)]:
        groups.setdefault((row["method"], row["budget"]), []).append(row)
    found: dict[str, list[dict[str, Any]]] = {}
    for (method, budget), rows in groups.items():
        scores = [row["top1"] for row in rows]
        found.setdefault(method, []).append(
            {
                "budget": budget,
                "images": rows[0]["train_images"],
                "mean": statistics.fmean(scores),
                "sd": statistics.stdev(scores) if len(scores) > 1 else None,
            }
        )
    return found if any(len(points) > 1 for points in found.values()) else {}


def spread(point: dict[str, Any]) -> str:
    """``45.2% ± 1.3``: mean and standard deviation over the draws."""
    return accuracy(point["mean"]) + ("" if point["sd"] is None else f" ± {100 * point['sd']:.1f}")


# -- the forms ----------------------------------------------------------------------------------------------
def terminal_tables(results: Results) -> list[Table]:
    """The tables for `rich` to print."""
    from rich.table import Table
    from rich.text import Text

    data = results["dataset"]

    def table(title: str, caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
        made = Table(title=Text(title), caption=Text(caption), box=None, padding=(0, 1, 0, 0))
        for i, name in enumerate(columns):
            made.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
        for first, *others in rows:
            made.add_row(Text(first, style="bold"), *map(Text, others))
        return made

    tables = [
        table(
            f"{results['title']}: {data['name']}, {data['train']} train and {data['test']} test images",
            f"Tested on {data['test_is']}. p: McNemar's exact test against linear. ECE: calibration error. "
            "Gap: certified. Time: with the choice of β.",
            [SHORT.get(COLUMNS[i], COLUMNS[i]) for i in NARROW],
            [[cells(row)[i] for i in NARROW] for row in of_all(results)],
        )
    ]
    if points := efficiency(results):
        budgets = [point["budget"] for point in next(iter(points.values()))]
        rows = [[method, *map(spread, of)] for method, of in points.items()]
        told = "Mean ± standard deviation of top-1 over the draws, at the β/β_max that all train images chose."
        tables.append(table("Label efficiency", told, ["Method", *budgets], rows))
    return tables


def markdown(results: Results) -> str:
    """The tables in GitHub's markdown, numbers aligned to the right."""
    made = [_markdown(COLUMNS, [cells(row) for row in of_all(results)])]
    if points := efficiency(results):
        budgets = [point["budget"] for point in next(iter(points.values()))]
        made.append(_markdown(["Method", *budgets], [[m, *map(spread, of)] for m, of in points.items()]))
    return "\n".join(made)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    lines = [columns, rule, *([plain_text(text) for text in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def csv_row(row: Row) -> dict[str, Any]:
    """A row without what is no number or text, for `csv.DictWriter`."""
    return {key: value for key, value in row.items() if key != "per_class"}


def class_rows(results: Results) -> list[dict[str, Any]]:
    """One row a class: the accuracy of every method that was trained on all images."""
    rows = of_all(results)
    return [{"class": name} | {row["method"]: row["per_class"][name] for row in rows} for name in rows[0]["per_class"]]


# -- the page -----------------------------------------------------------------------------------------------
def render(results: Results) -> str:
    """The page as text; everything of ``results`` that is shown is escaped, the figure is inlined."""
    safe: Callable[[str], Any] = require("markupsafe", "report").Markup
    points, rows = efficiency(results), of_all(results)
    figure = None
    if points:
        told = "; ".join(f"{m}: " + ", ".join(f"{p['budget']} {spread(p)}" for p in of) for m, of in points.items())
        figure = safe(page.inline_svg(draw_efficiency(points), "e-", f"Top-1 against train images. {told}."))
    return str(
        page.environment().get_template("probe.html").render(
            results=results,
            rows=[(row, cells(row)) for row in rows],
            columns=COLUMNS,
            classes=class_rows(results),
            budgets=[point["budget"] for point in next(iter(points.values()))] if points else [],
            points={method: [(point, spread(point)) for point in of] for method, of in points.items()},
            figure=figure,
            commands=[page.command_line(line) for line in results["reproduce"]],
        )
    )  # fmt: skip


def draw_efficiency(points: dict[str, list[dict[str, Any]]]) -> Figure:
    """Top-1 against the number of train images, with a standard deviation over the draws."""
    with drawing.new_figure((6.0, 3.6)) as figure:
        ax = figure.add_subplot()
        styles: dict[str, dict[str, Any]] = {
            method: {
                "color": drawing.head_color(method),
                "marker": drawing.HEADS.get(method, ("", "X" if method == "k-nn" else "D"))[1],
                "linestyle": "-" if method in drawing.HEADS else ":",
            }
            for method in points
        }
        for method, unordered in points.items():
            of = sorted(unordered, key=lambda point: point["images"])
            x, y = [point["images"] for point in of], [100 * point["mean"] for point in of]
            ax.errorbar(
                x, y, yerr=[100 * (point["sd"] or 0) for point in of], label=method, markersize=4, linewidth=1.2,
                elinewidth=0.7, **styles[method],
            )  # fmt: skip
        ax.set(xscale="log", xlabel="train images", ylabel="top-1")
        drawing.log_ticks(ax.xaxis, subs=(1, 2, 5))
        ax.yaxis.set_major_formatter("{x:g}%")
        drawing.legend(figure, [(method, {"markersize": 4, **style}) for method, style in styles.items()], columns=3)
    return figure
