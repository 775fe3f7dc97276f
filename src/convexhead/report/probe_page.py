"""The tables of a probe, for a terminal, markdown and CSV files, and its page; see `convexhead.experiments.probe`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from convexhead.errors import require
from convexhead.report import drawing, page
from convexhead.report.probe_columns import LAYOUTS, Layout, words
from convexhead.report.tables import Results, Row, plain_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


def layout_of(results: Results) -> Layout:
    """How these results are shown."""
    return LAYOUTS[results["task"]]


def cells(row: Row, layout: Layout) -> list[str]:
    """One row as text, in the order of the columns."""
    return [column.text(row) for column in layout.columns]


def of_all(results: Results) -> list[Row]:
    """The rows of the fits on all train images."""
    return [row for row in results["rows"] if row["draw"] is None]


def efficiency(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Of each method, by budget: images, and mean and spread of the score over the draws; all images last."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in [*(row for row in results["rows"] if row["draw"] is not None), *of_all(results)]:
        groups.setdefault((row["method"], row["budget"]), []).append(row)
    found: dict[str, list[dict[str, Any]]] = {}
    for (method, budget), rows in groups.items():
        scores = [row[results["score"]] for row in rows]
        found.setdefault(method, []).append(
            {
                "budget": budget,
                "images": rows[0]["train_images"],
                "mean": statistics.fmean(scores),
                "sd": statistics.stdev(scores) if len(scores) > 1 else None,
            }
        )
    return found if any(len(points) > 1 for points in found.values()) else {}


def spread(point: dict[str, Any], layout: Layout) -> str:
    """``45.2% ± 1.3``: mean and standard deviation over the draws."""
    mean, sd = layout.written(point["mean"]), point["sd"]
    if sd is None:
        return mean
    return f"{mean} ± {100 * sd:.1f}" if layout.percent else f"{mean} ± {sd:.3f}"


def _words(results: Results) -> dict[str, str]:
    return words(results["settings"]["seed"], results["dataset"].get("test_groups"))


def left_out(results: Results) -> list[str]:
    """A sentence for each method that cannot do this."""
    return [f"{method} is left out: it {why}." for method, why in results["left_out"].items()]


# -- the forms ----------------------------------------------------------------------------------------------
def terminal_tables(results: Results) -> list[Table]:
    """The tables for `rich` to print."""
    from rich.table import Table
    from rich.text import Text

    data, layout = results["dataset"], layout_of(results)
    test = layout.test.format(**_words(results))
    narrow = [i for i, column in enumerate(layout.columns) if column.short]

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
            " ".join([
                f"Tested on {data['test_is']}. p: {test}. Gap: certified. Time: with the choice of β.",
                *([f"{data['groups']} groups of train images are kept together."] if data.get("groups") else []),
                *left_out(results),
            ]),
            [layout.columns[i].short or "" for i in narrow],
            [[cells(row, layout)[i] for i in narrow] for row in of_all(results)],
        )
    ]  # fmt: skip
    if points := efficiency(results):
        budgets = [point["budget"] for point in next(iter(points.values()))]
        rows = [[method, *(spread(point, layout) for point in of)] for method, of in points.items()]
        told = (
            f"Mean ± standard deviation of {layout.score} over the draws, at the β/β_max that all train images chose."
        )
        tables.append(table("Label efficiency", told, ["Method", *budgets], rows))
    return tables


def markdown(results: Results) -> str:
    """The tables in GitHub's markdown, numbers aligned to the right."""
    layout = layout_of(results)
    made = [_markdown([column.title for column in layout.columns], [cells(row, layout) for row in of_all(results)])]
    if points := efficiency(results):
        budgets = [point["budget"] for point in next(iter(points.values()))]
        rows = [[method, *(spread(point, layout) for point in of)] for method, of in points.items()]
        made.append(_markdown(["Method", *budgets], rows))
    return "\n".join(made)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    lines = [columns, rule, *([plain_text(text) for text in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def csv_row(row: Row) -> dict[str, Any]:
    """A row without what is no number or text, for `csv.DictWriter`."""
    return {key: value for key, value in row.items() if key != "per_class"}


def class_rows(results: Results) -> list[dict[str, Any]]:
    """One row a class or column: its value for every method that was trained on all images."""
    rows = of_all(results)
    return [{"class": name} | {row["method"]: row["per_class"][name] for row in rows} for name in rows[0]["per_class"]]


# -- the page -----------------------------------------------------------------------------------------------
def render(results: Results) -> str:
    """The page as text; everything of ``results`` that is shown is escaped, the figure is inlined."""
    safe: Callable[[str], Any] = require("markupsafe", "report").Markup
    points, rows, layout = efficiency(results), of_all(results), layout_of(results)
    spreads = {method: [(point, spread(point, layout)) for point in of] for method, of in points.items()}
    figure = None
    if points:
        told = "; ".join(
            f"{method}: " + ", ".join(f"{point['budget']} {text}" for point, text in of)
            for method, of in spreads.items()
        )
        title = f"{layout.score} against train images. {told}."
        figure = safe(page.inline_svg(draw_efficiency(points, layout), "e-", title[0].upper() + title[1:]))
    return str(
        page.environment().get_template("probe.html").render(
            results=results,
            layout=layout,
            notes=[(what, text.format(**_words(results))) for what, text in layout.notes],
            rows=[(row, [(column.value(row), column.text(row)) for column in layout.columns]) for row in rows],
            classes=class_rows(results),
            budgets=[point["budget"] for point in next(iter(points.values()))] if points else [],
            points=spreads,
            figure=figure,
            left_out=left_out(results),
            commands=[page.command_line(line) for line in results["reproduce"]],
        )
    )  # fmt: skip


def draw_efficiency(points: dict[str, list[dict[str, Any]]], layout: Layout) -> Figure:
    """The score against the number of train images, with a standard deviation over the draws."""
    scale = 100 if layout.percent else 1
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
            x, y = [point["images"] for point in of], [scale * point["mean"] for point in of]
            ax.errorbar(
                x, y, yerr=[scale * (point["sd"] or 0) for point in of], label=method, markersize=4, linewidth=1.2,
                elinewidth=0.7, **styles[method],
            )  # fmt: skip
        ax.set(xscale="log", xlabel="train images", ylabel=layout.score)
        drawing.log_ticks(ax.xaxis, subs=(1, 2, 5))
        ax.yaxis.set_major_formatter("{x:g}%" if layout.percent else "{x:g}")
        drawing.legend(figure, [(method, {"markersize": 4, **style}) for method, style in styles.items()], columns=3)
    return figure
