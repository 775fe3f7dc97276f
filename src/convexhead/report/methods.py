"""Everything that was trained, one row a method: convex heads, Adam's runs of every kind and number of heads, probes.

``results["methods"]`` holds flat rows (`convexhead.experiments.rows` makes them); here they become a table and
three figures: accuracy against what tuning cost, distance from the optimum at every learning rate, and accuracy against
the number of train images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from convexhead.errors import require
from convexhead.report import drawing, figures
from convexhead.report.tables import NOTHING, Results, Row, accuracy, gap, number, plain_text, relative, seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = (
    "Head",
    "Activation",
    "Method",
    "Heads",
    "Validation",
    "Test top-1",
    "Test top-5",
    "Objective",
    "Above the optimum",
    "Best run",
    "Fits",
    "Time, chosen",
    "Time, all",
    "Convex / tuning time",
    "Parameters",
)
SHORT = {
    "Adam, L2 term in the loss": "Adam",
    "AdamW, decoupled weight decay (a different objective)": "AdamW",
    "Adam, L2 term in the loss, queries trained": "Adam, queries trained",
}
MARKS = {"convex": "o", "Adam": "v", "AdamW": "^", "Adam, queries trained": "D", "probe": "s"}


def short(row: Row) -> str:
    """The method in one word."""
    return SHORT.get(row["method"], str(row["method"]))


def cells(row: Row) -> list[str]:
    """One row as text, in the order of `COLUMNS`."""
    top1 = accuracy(row["test_top1"])
    if row["test_top1_sd"] is not None:
        top1 += f" ± {100 * row['test_top1_sd']:.1f}"
    if row["method"] == "convex" or row["relative_gap"] is not None:
        bound = gap(row)
        distance = (bound if bound.startswith("<") else f"≤ {bound}") + (
            "" if row["converged"] or row["scope"] == "estimated" else " (stopped early)"
        )
    elif row["excess_median"] is not None:
        distance = f"{relative(row['excess_median'])}, {relative(row['excess_worst'])}"
    else:
        distance = NOTHING
    if row["diverged"]:
        distance += f" ({row['diverged']} diverged)"
    objective, ratio = number(row["objective"]), number(row["convex_seconds_ratio"])
    best = number(row.get("excess_best"))
    return [
        row["head"],
        row["activation"] or NOTHING,
        short(row),
        str(row["heads"] or NOTHING),
        accuracy(row["validation_accuracy"]),
        top1,
        accuracy(row["test_top5"]),
        NOTHING if objective is None or row["method"] == "probe" else f"{objective:.5g}",
        distance,
        NOTHING if best is None else relative(best),
        str(row["fits"]),
        seconds(row["seconds"]),
        seconds(row["seconds_total"]),
        NOTHING if ratio is None else f"{ratio:.2g}",
        f"{row['parameters']:,}",
    ]


def markdown(results: Results) -> str:
    """The table in GitHub's markdown."""
    lines = [COLUMNS, ["---" if i < 3 else "---:" for i in range(len(COLUMNS))], *map(cells, results["methods"])]
    return "".join("| " + " | ".join(map(plain_text, line)) + " |\n" for line in lines)


# -- figures ----------------------------------------------------------------------------------------------------------
def draw_tuning(ax: Axes, rows: Sequence[Row]) -> None:
    """Test accuracy against seconds with all tuning: colour is the head, the mark is the method."""
    for row in rows:
        x, y = number(row["seconds_total"]), number(row["test_top1"])
        if x is None or y is None:
            continue
        x = max(x, 1e-2)
        color = drawing.INK if row["method"] == "probe" else drawing.head_color(row["head"].split(" ")[0])
        filled = row["method"] in ("convex", "probe")
        ax.plot(
            x,
            100 * y,
            MARKS[short(row)],
            color=color,
            markersize=6,
            markerfacecolor=color if filled else "none",
            markeredgewidth=1,
            label=f"{row['head']} {row['activation'] or ''} {short(row)}",
        )
        if row["test_top1_sd"]:
            ax.plot(
                [x, x], [100 * (y - row["test_top1_sd"]), 100 * (y + row["test_top1_sd"])], color=color, linewidth=0.8
            )
    ax.set(xscale="log")
    drawing.log_ticks(ax.xaxis)
    ax.yaxis.set_major_formatter("{x:g}%")


def tuning(results: Results) -> Figure:
    """Accuracy against total tuning time: one panel an activation, the probes in all of them."""
    activations = list(dict.fromkeys(row["activation"] for row in results["rows"]))
    with drawing.new_figure((max(7.2, 3.6 * len(activations)), 3.4)) as figure:  # room for the legend
        axes = figure.subplots(1, len(activations), squeeze=False, sharey=True)[0]
        for ax, activation in zip(axes, activations, strict=True):
            draw_tuning(ax, [row for row in results["methods"] if row["activation"] in (activation, None)])
            ax.set_title(activation)
        figure.supxlabel("seconds, all fits and runs together", fontsize=8)
        figure.supylabel("test accuracy", fontsize=8)
        heads = dict.fromkeys(row["head"].split(" ")[0] for row in results["rows"])
        used = dict.fromkeys(short(row) for row in results["methods"])
        plain = {"linestyle": "none", "color": drawing.INK}
        drawing.legend(
            figure,
            [(head, {"linestyle": "none", "marker": "o", "color": drawing.head_color(head)}) for head in heads]
            + [
                (
                    name,
                    plain | {"marker": MARKS[name], "markerfacecolor": "none" if "Adam" in name else drawing.INK},
                )
                for name in used
            ],
        )
    return figure


def draw_learning_rates(ax: Axes, row: Row) -> None:
    """Distance above the certified bound against seconds, relatively: the convex fit, and Adam at every rate."""
    dual, scale = row["certificate"]["dual"], abs(row["certificate"]["primal"]) or 1.0
    tried = (row.get("twin") or {}).get("tried", [])
    colors = _shades(sorted({run["learning_rate"] for run in tried}))

    def curve(history: Sequence[Mapping[str, Any]], **style: Any) -> None:
        points = [(h["seconds"], number(h["objective"])) for h in history]
        shown = [(max(x, 1e-3), max((y - dual) / scale, 1e-7)) for x, y in points if y is not None]
        if shown:
            ax.plot(*zip(*shown, strict=True), **style)

    for run in tried:
        curve(run["history"], color=colors[run["learning_rate"]], linewidth=0.8, label=f"{run['learning_rate']:g}")
    curve(row["history"], color=drawing.CONVEX, linewidth=1.8, label="convex")
    ax.set(xscale="log", yscale="log")
    drawing.log_ticks(ax.xaxis)
    drawing.log_ticks(ax.yaxis, drawing.percent)


def _shades(rates: Sequence[float]) -> dict[float, Any]:
    """From dark to light as the learning rate grows."""
    cmap = require("matplotlib", "report").colormaps["YlOrBr"]
    return {rate: cmap(0.95 - 0.6 * i / max(1, len(rates) - 1)) for i, rate in enumerate(rates)}


def learning_rates(results: Results) -> Figure:
    """`draw_learning_rates` for every row of the table."""
    rows = results["rows"]
    rates = sorted({run["learning_rate"] for row in rows for run in (row.get("twin") or {}).get("tried", [])})
    with drawing.grid(len(rows), columns=4) as (figure, axes):
        for ax, row in zip(axes, rows, strict=True):
            draw_learning_rates(ax, row)
            ax.set_title(figures.name_of(row))
        figure.supxlabel("seconds", fontsize=8)
        figure.supylabel("above the certified lower bound, relative", fontsize=8)
        shades = _shades(rates)
        drawing.legend(
            figure,
            [("convex", {"color": drawing.CONVEX, "linewidth": 1.8})]
            + [(f"Adam, {rate:g}", {"color": shades[rate], "linewidth": 1}) for rate in rates],
        )
    return figure


def sizes(results: Results) -> Figure:
    """Test accuracy of the main methods against the number of train images of each class."""
    with drawing.new_figure((6.0, 3.6)) as figure:
        ax = figure.add_subplot()
        lines: dict[str, list[tuple[float, float]]] = {}
        styles: dict[str, dict[str, Any]] = {}
        for point in results["sizes"]:
            for row in point["methods"]:
                name = row["head"] if row["method"] == "probe" else f"{row['head']}, {short(row)}"
                lines.setdefault(name, []).append((point["images_per_class"], 100 * row["test_top1"]))
                probe = row["method"] == "probe"
                styles[name] = {
                    "color": drawing.INK if probe else drawing.head_color(row["head"]),
                    "marker": ("s" if "Linear" in row["head"] else "D") if probe else MARKS[short(row)],
                    "linestyle": ":" if probe else "-" if row["method"] == "convex" else "--",
                }
        for name, points in lines.items():
            ax.plot(*zip(*points, strict=True), label=name, markersize=4, linewidth=1.2, **styles[name])
        ax.set(xscale="log", xlabel="train images of each class", ylabel="test accuracy")
        ax.set_xticks([point["images_per_class"] for point in results["sizes"]])
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(require("matplotlib.ticker", "report").NullLocator())
        ax.yaxis.set_major_formatter("{x:g}%")
        drawing.legend(figure, [(name, {"markersize": 4, **styles[name]}) for name in lines], columns=3)
    return figure
