"""The figures of a comparison: each function returns a `Figure`; see `convexhead.report.drawing`."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from convexhead.errors import require
from convexhead.report.drawing import (
    ACTIVATIONS,
    ADAM,
    CONVEX,
    HEADS,
    MAP,
    grid,
    legend,
    log_ticks,
    new_figure,
    percent,
)
from convexhead.report.tables import Results, Row, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def name_of(row: Row) -> str:
    """``"self-attention · gated-relu"``; the linear head is just ``"linear"``."""
    return row["head"] if row["head"] == row["activation"] else f"{row['head']} · {row['activation']}"


# -- drawing one panel --------------------------------------------------------------------------------------
def draw_convergence(ax: Axes, row: Row) -> None:
    """Distance above the certified lower bound, relative to the objective, against seconds.

    Solid: the convex solve. Dashed: its gap as the solver estimated it meanwhile. Thin: Adam's runs.
    """
    dual, scale = row["certificate"]["dual"], abs(row["certificate"]["primal"]) or 1.0

    def curve(history: Iterable[Row], height: Callable[[Row], Any], **style: Any) -> None:
        points = [(number(h["seconds"]), number(height(h))) for h in history]
        shown = [(max(x, 1e-3), max(y, 1e-9)) for x, y in points if x is not None and y is not None]
        ax.plot(*zip(*shown, strict=True), **style) if shown else None

    def above(h: Row) -> float | None:
        objective = number(h["objective"])
        return None if objective is None else (objective - dual) / scale

    def known(h: Row) -> float | None:
        gap = number(h.get("gap"))
        return None if gap is None else gap / scale

    for run in (row.get("twin") or {}).get("runs", []):
        curve(run["history"], above, color=ADAM, linewidth=0.8, alpha=0.85, label=f"Adam, seed {run['seed']}")
    curve(row["history"], known, color=CONVEX, linewidth=1, linestyle=(0, (3, 2)), label="gap")
    curve(row["history"], above, color=CONVEX, linewidth=1.8, label="objective")
    ax.set(xscale="log", yscale="log")
    log_ticks(ax.xaxis)
    log_ticks(ax.yaxis, percent)


def draw_spectrum(ax: Axes, rows: Sequence[Row]) -> None:
    """Singular values of Z, all blocks together in falling order: one line for each of a head's ``rows``."""
    for row in rows:
        color, marker, dash = ACTIVATIONS.get(row["activation"], (CONVEX, "o", ":"))
        sigma = sorted((x for block in row["singular_values"] for x in block if x > 0), reverse=True)
        size = 3 if len(sigma) <= 40 else 1.5
        ax.plot(
            range(1, len(sigma) + 1),
            sigma,
            dash,
            color=color,
            marker=marker,
            markersize=size,
            linewidth=1,
            label=row["activation"],
        )
    ax.set(yscale="log")
    ax.xaxis.set_major_locator(require("matplotlib.ticker", "report").MaxNLocator(5, integer=True))
    log_ticks(ax.yaxis)


def draw_path(ax: Axes, rows: Sequence[Row], key: str, ylim: tuple[float, float] | None = None) -> None:
    """``key`` ("validation_accuracy" or "heads") along β/β_max; the β that validation chose is filled."""
    for row in rows:
        path = sorted(row["path"], key=lambda p: p["beta_ratio"])
        if not path:
            continue
        color, marker = HEADS.get(row["head"], (CONVEX, "X"))
        x = [p["beta_ratio"] for p in path]
        y = [100 * p[key] if key == "validation_accuracy" else max(p[key], 0.8) for p in path]
        ax.plot(x, y, color=color, linewidth=1.2, label=row["head"])
        chosen = [abs(v - row["beta_ratio"]) <= 1e-9 * v for v in x]
        for filled in (False, True):
            at = [i for i, c in enumerate(chosen) if c == filled]
            ax.plot(
                [x[i] for i in at],
                [y[i] for i in at],
                marker,
                color=color,
                markersize=6 if filled else 3,
                markerfacecolor=color if filled else "none",
                markeredgewidth=0.9,
            )
    ax.set(xscale="log", xlabel="β / β_max", ylim=ylim)
    log_ticks(ax.xaxis, subs=(1, 2, 5))
    if key == "heads":
        ax.set(yscale="log")
        log_ticks(ax.yaxis, subs=(1, 3))
    else:
        ax.yaxis.set_major_formatter("{x:g}%")
    ax.xaxis.set_inverted(True)


def draw_excess(ax: Axes, rows: Sequence[Row], numticks: int = 7) -> None:
    """One line a model: how far above the best objective its own can lie, and each of Adam's."""
    floor = 1e-6
    for y, row in enumerate(rows):
        gap = max(number(row["certificate"]["relative_gap"]) or 0.0, floor)
        ax.plot([floor / 3, gap], [y, y], color=CONVEX, linewidth=5, solid_capstyle="butt", alpha=0.35)
        ax.plot(gap, y, "|", color=CONVEX, markersize=11, markeredgewidth=2.2, label="certified gap")
        for run in (row.get("twin") or {}).get("runs", []):
            excess = number(run["relative_excess"])
            if excess is not None:
                ax.plot(max(excess + gap, floor), y, "o", color=ADAM, markersize=4.5, alpha=0.75, mew=0, label="Adam")
    ax.set(xscale="log", ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
    ax.set_xlim(left=floor / 3)
    ax.set_yticklabels([name_of(row) for row in rows])
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    log_ticks(ax.xaxis, percent, numticks=numticks)


# -- whole figures ------------------------------------------------------------------------------------------
def excess(results: Results, width: float = 7.0) -> Figure:
    """How far above the certified bound every model may lie, Adam's runs beside; ``width`` in inches."""
    rows = results["rows"]
    with new_figure((width, 0.6 + 0.27 * len(rows))) as figure:
        draw_excess(figure.add_subplot(), rows, numticks=7 if width > 5 else 4)
    return figure


def convergence(results: Results) -> Figure:
    """Objective above the certified bound, and the gap, against time: one panel a row of the table."""
    with grid(len(results["rows"]), columns=4) as (figure, axes):
        for ax, row in zip(axes, results["rows"], strict=True):
            draw_convergence(ax, row)
            ax.set_title(name_of(row))
        figure.supxlabel("seconds", fontsize=8)
        figure.supylabel("above the certified lower bound, relative", fontsize=8)
        styles: tuple[tuple[str, dict[str, Any]], ...] = (
            ("convex: objective", {"color": CONVEX, "linewidth": 1.8}),
            (
                "convex: gap, as the solver estimates it",
                {"color": CONVEX, "linewidth": 1, "linestyle": (0, (3, 2))},
            ),
            ("Adam, one line a seed", {"color": ADAM, "linewidth": 0.8}),
        )
        legend(figure, styles)
    return figure


def activation_styles(rows: Sequence[Row]) -> dict[str, tuple[str, str, str]]:
    """Of `ACTIVATIONS` those that occur."""
    present = {row["activation"] for row in rows}
    return {name: style for name, style in ACTIVATIONS.items() if name in present}


def spectra(results: Results) -> Figure:
    """Singular values of Z: one panel a head, one line an activation."""
    groups = by_head(results)
    with grid(len(groups), columns=3) as (figure, axes):
        for ax, (head, rows) in zip(axes, groups.items(), strict=True):
            draw_spectrum(ax, rows)
            ax.set_title(head)
        figure.supxlabel("index", fontsize=8)
        figure.supylabel("singular value of Z", fontsize=8)
        legend(
            figure,
            [
                (name, {"color": color, "marker": marker, "linestyle": dash, "markersize": 3})
                for name, (color, marker, dash) in activation_styles(results["rows"]).items()
            ],
        )
    return figure


def path(results: Results) -> Figure:
    """Validation accuracy and heads found along β: one column an activation."""
    activations = list(dict.fromkeys(row["activation"] for row in results["rows"]))
    with new_figure((3.4 * len(activations), 4.6)) as figure:
        axes = figure.subplots(2, len(activations), squeeze=False)
        for column, activation in enumerate(activations):
            rows = [row for row in results["rows"] if row["activation"] == activation]
            for line, key in enumerate(("validation_accuracy", "heads")):
                draw_path(axes[line, column], rows, key, path_limits(results, key))
                axes[line, column].label_outer()
            axes[0, column].set_title(activation)
        axes[0, 0].set_ylabel("validation accuracy")
        axes[1, 0].set_ylabel("heads found")
        present = dict.fromkeys(row["head"] for row in results["rows"])
        legend(
            figure,
            [(head, dict(zip(("color", "marker"), HEADS.get(head, (CONVEX, "X")), strict=True))) for head in present],
        )
    return figure


def attention_maps(results: Results, columns: int = 6) -> Figure:
    """Each image under its map: red tokens speak for the predicted class, blue ones against it."""
    image = require("matplotlib.image", "report")
    about = results["attention"]
    images, (h, w) = about["images"], about["grid"]
    with grid(len(images), columns=min(columns, max(1, len(images))), panel=(1.35, 1.6)) as (figure, axes):
        for ax, item in zip(axes, images, strict=True):
            picture = image.imread(io.BytesIO(base64.b64decode(item["png"])), format="png")
            extent = (0, w, h, 0)
            ax.imshow(
                picture,
                cmap="gray",
                vmin=0,
                vmax=1,
                extent=extent,
                interpolation="bicubic",
                alpha=0.5,
            )
            strongest = max((abs(v) for line in item["map"] for v in line), default=0) or 1.0
            opacity = [[0.75 * abs(v) / strongest for v in line] for line in item["map"]]
            ax.imshow(
                item["map"],
                cmap=MAP,
                vmin=-strongest,
                vmax=strongest,
                alpha=opacity,
                extent=extent,
            )
            wrong = item["label"] != item["predicted"]
            title = f"true: {item['label']}\npredicted: {item['predicted']}" if wrong else str(item["label"])
            ax.set_title(title, fontsize=7)
            ax.set_axis_off()
    return figure


def by_head(results: Results) -> dict[str, list[Row]]:
    """Rows with more than one singular value, grouped by head in the table's order."""
    groups: dict[str, list[Row]] = {}
    for row in results["rows"]:
        if sum(len(block) for block in row["singular_values"]) > 1:
            groups.setdefault(row["head"], []).append(row)
    return groups


def path_limits(results: Results, key: str) -> tuple[float, float] | None:
    """The range of ``key`` over all paths with a margin, so that activations can be compared by eye."""
    seen = [point[key] for row in results["rows"] for point in row["path"]]
    if not seen:
        return None
    if key == "heads":
        return 0.7, 1.4 * max(seen)
    margin = 0.06 * (max(seen) - min(seen)) + 1e-3
    return 100 * (min(seen) - margin), 100 * min(max(seen) + margin, 1.005)
