"""The figures, by matplotlib without a display: each function returns a `Figure`, `save` writes SVG, PDF, PNG and JSON.

Colours are Okabe and Ito's, told apart by every kind of colour vision, and never the only sign: lines
differ in dash and marker too. The other colours are `INK` and `RULE`, which a page may replace.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convexhead.errors import require
from convexhead.report.tables import Results, Row, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, RULE = "#23262b", "#d9dadd"
CONVEX, ADAM = "#0072b2", "#d55e00"
ACTIVATIONS = {
    "linear": ("#009e73", "o", "-"),
    "gated-relu": ("#cc79a7", "s", "--"),
    "relu": ("#56b4e9", "^", "-."),
}
HEADS = {
    "self-attention": ("#d55e00", "o"),
    "mlp-mixer": ("#0072b2", "s"),
    "fno": ("#009e73", "^"),
    "block-fno": ("#e69f00", "D"),
    "mlp": ("#cc79a7", "v"),
    "linear": (INK, "P"),
}
MAP = "RdBu_r"
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "convexhead",
    "svg.fonttype": "path",
}
PANEL = (3.0, 2.1)
"""Inches of one small multiple."""


def name_of(row: Row) -> str:
    """``"self-attention · gated-relu"``; the linear head is just ``"linear"``."""
    return row["head"] if row["head"] == row["activation"] else f"{row['head']} · {row['activation']}"


def head_color(head: str) -> str:
    """The head's colour in every figure."""
    return HEADS.get(head, (CONVEX, "X"))[0]


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
            ax.set_title(f"{item['label']} ✗ {item['predicted']}" if wrong else str(item["label"]), fontsize=7)
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


def panel(draw: Callable[..., None], *arguments: Any, size: tuple[float, float] = PANEL) -> Figure:
    """One small multiple by itself: ``panel(draw_convergence, row)``."""
    with new_figure(size) as figure:
        draw(figure.add_subplot(), *arguments)
    return figure


# -- writing ------------------------------------------------------------------------------------------------
def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write ``path`` with the endings .svg, .pdf, .png and .json; the same figure gives the same bytes."""
    base = Path(path)
    base = base.with_suffix("") if base.suffix in (".svg", ".pdf", ".png") else base
    written = [base.with_name(base.name + ending) for ending in (".svg", ".pdf", ".png", ".json")]
    written[0].write_text(svg(figure, text_as_paths=True, background="white"), encoding="utf-8")
    with require("matplotlib", "report").rc_context(STYLE):
        dateless = {"CreationDate": None, "Creator": None, "Producer": None}
        figure.savefig(written[1], format="pdf", facecolor="white", metadata=dateless)
        figure.savefig(written[2], format="png", dpi=200, facecolor="white", metadata={"Software": None})
    written[3].write_text(json.dumps(numbers(figure)) + "\n", encoding="utf-8")
    return written


def numbers(figure: Figure) -> dict[str, Any]:
    """What a figure shows, as JSON values: of every panel its title, axes, named lines and images."""
    return {
        "panels": [
            {
                "title": ax.get_title(),
                "x": ax.get_xlabel() or figure.get_supxlabel(),
                "y": ax.get_ylabel() or figure.get_supylabel(),
                "x_labels": _words(ax.get_xticklabels()),
                "y_labels": _words(ax.get_yticklabels()),
                "lines": [
                    {"name": _name(line), "x": _values(line.get_xdata()), "y": _values(line.get_ydata())}
                    for line in ax.lines
                ],
                "bars": [
                    {"name": _name(group), "heights": [float(bar.get_height()) for bar in group]}
                    for group in ax.containers
                ],
                "images": [a.tolist() for image in ax.images if (a := np.asarray(image.get_array())).ndim == 2],
            }
            for ax in figure.axes
        ]
    }


def _name(artist: Any) -> str:
    label = str(artist.get_label())
    return "" if label.startswith("_") else label


def _values(array: Any) -> Any:
    return np.asarray(array, dtype=float).tolist()


def _words(labels: Iterable[Any]) -> list[str]:
    """Tick labels that are names; numbers are in the data."""
    texts = [label.get_text() for label in labels]
    return [] if all(text == "" or text[0] in "0123456789−." for text in texts) else texts


def svg(figure: Figure, *, text_as_paths: bool = False, background: str = "none") -> str:
    """The figure as SVG text without a date; real text unless ``text_as_paths``."""
    buffer = io.StringIO()
    font = {"svg.fonttype": "path" if text_as_paths else "none"}
    with require("matplotlib", "report").rc_context({**STYLE, **font}):
        figure.savefig(buffer, format="svg", facecolor=background, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


@contextmanager
def new_figure(size: tuple[float, float]) -> Iterator[Figure]:
    """A figure without pyplot's global state, in this module's style."""
    make = require("matplotlib.figure", "report").Figure
    with require("matplotlib", "report").rc_context(STYLE):
        yield make(figsize=size, layout="constrained")


@contextmanager
def grid(count: int, *, columns: int, panel: tuple[float, float] = (2.3, 1.8)) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with ``count`` axes, row by row."""
    columns = max(1, min(columns, count))
    lines = max(1, -(-count // columns))
    with new_figure((panel[0] * columns, panel[1] * lines + 0.4)) as figure:
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
        for unused in axes[count:]:
            unused.remove()
        yield figure, axes[:count]


def legend(figure: Figure, entries: Iterable[tuple[str, dict[str, Any]]], columns: int = 6) -> None:
    """What colours, marks and dashes mean, above all panels."""
    line = require("matplotlib.lines", "report").Line2D
    handles = [line([], [], label=name, **style) for name, style in entries]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(columns, len(handles)))


def percent(x: float, _: object = None) -> str:
    """A tick of an axis of fractions."""
    return f"{float(f'{100 * x:.6g}'):.12f}".rstrip("0").rstrip(".") + "%"


def _plain(x: float, _: object = None) -> str:
    return f"{x:g}"


def log_ticks(axis: Axis, words: Callable[..., str] = _plain, subs: Sequence[float] = (1,), numticks: int = 7) -> None:
    """Few ticks of a logarithmic axis, written as plain numbers."""
    ticker = require("matplotlib.ticker", "report")
    axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=numticks))
    axis.set_major_formatter(ticker.FuncFormatter(words))
    axis.set_minor_locator(ticker.NullLocator())
