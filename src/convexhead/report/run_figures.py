"""Figures of runs: each function takes plain dictionaries (see `runs`) and returns a `Figure`."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from convexhead.errors import require
from convexhead.report.drawing import CONVEX, INK, MAP, log_ticks, new_figure, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Run = Mapping[str, Any]
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
"""Colours of Okabe and Ito, one for each run; dashes tell runs apart as well."""
DASHES = ("-", (0, (4, 2)), (0, (1, 1.2)), (0, (4, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
NAMED = 25
"""Largest number of classes that matrices name."""
PANEL = (3.2, 2.2)


def style(i: int) -> dict[str, Any]:
    """Colour and dash of run ``i``."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i % len(DASHES)]}


def objective(runs: Sequence[Run]) -> Figure:
    """Objective against seconds; the dotted line is the certified lower bound."""
    with new_figure(PANEL) as figure:
        ax = figure.add_subplot()
        for i, run in enumerate(runs):
            points = _finite((h["seconds"], h["objective"]) for h in run["history"])
            ax.plot(*points, label=run["name"], marker="o", markersize=2, linewidth=1.4, **style(i))
        for i, run in enumerate(runs):
            ax.axhline(run["certificate"]["dual"], color=style(i)["color"], linewidth=0.9, linestyle=":", label="bound")
        ax.set(xlabel="seconds", ylabel="objective", xscale="log", yscale="log")
        log_ticks(ax.xaxis)
        log_ticks(ax.yaxis, subs=(1, 2, 5))
        if len(runs) > 1:
            _name_lines(ax, len(runs))
    return figure


def gap(runs: Sequence[Run]) -> Figure:
    """Relative gap against seconds as the solver estimated it; the last mark is the certified one."""
    with new_figure(PANEL) as figure:
        ax = figure.add_subplot()
        for i, run in enumerate(runs):
            scale = abs(run["certificate"]["primal"]) or 1.0
            points = _finite((h["seconds"], max(h["gap"] / scale, 1e-9)) for h in run["history"])
            ax.plot(*points, label=run["name"], linewidth=1.4, **style(i))
            last = points[0][-1] if points[0] else 1e-2
            certified = max(run["certificate"]["relative_gap"], 1e-9)
            ax.plot(last, certified, "D", color=style(i)["color"], markersize=5, label="certified")
        ax.set(xlabel="seconds", ylabel="relative gap", xscale="log", yscale="log")
        log_ticks(ax.xaxis)
        log_ticks(ax.yaxis, percent)
        if len(runs) > 1:
            _name_lines(ax, len(runs))
    return figure


def spectrum(axis: str, series: Sequence[tuple[str, Sequence[float]]], *, along_beta: bool) -> Figure:
    """Singular values of one unfolding: a line each for every β of a path (group ids ``beta-0 …``) or every run."""
    with new_figure(PANEL) as figure:
        ax = figure.add_subplot()
        largest, most = max((v for _, values in series for v in values), default=1.0) or 1.0, 2
        for i, (name, values) in enumerate(series):
            shown = [v for v in values if v > 1e-4 * largest]
            most = max(most, len(shown))
            look = {"color": CONVEX, "linestyle": "-"} if along_beta else style(i)
            marker = "o" if along_beta else MARKERS[i % len(MARKERS)]
            size = 3 if len(shown) <= 40 else 1.5
            (line,) = ax.plot(range(1, len(shown) + 1), shown, marker=marker, markersize=size, linewidth=1.1, **look)
            line.set_label(name)
            if along_beta:
                line.set_gid(f"beta-{i}")
        ax.set(yscale="log", xlabel="index", ylabel=f"singular value, {axis}", xlim=(0.5, most + 0.5))
        ax.xaxis.set_major_locator(require("matplotlib.ticker", "report").MaxNLocator(5, integer=True))
        log_ticks(ax.yaxis)
        if not along_beta and len(series) > 1:
            _name_lines(ax, len(series))
    return figure


def ranks(run: Run) -> Figure:
    """Effective rank of Z and of every unfolding along β."""
    with new_figure((4.2, 2.4)) as figure:
        ax = figure.add_subplot()
        ratios = [point["beta_ratio"] for point in run["path"]]
        for i, axis in enumerate(run["path"][0]["effective_ranks"]):
            values = [point["effective_ranks"][axis] for point in run["path"]]
            ax.plot(ratios, values, marker=MARKERS[i % 7], markersize=4, label=axis, linewidth=1.2, **style(i))
        ax.set(xscale="log", xlabel="β / β_max", ylabel="effective rank")
        ax.set_ylim(0, 1.08 * ax.get_ylim()[1])  # that equal ranks differ by rounding is nothing to see
        log_ticks(ax.xaxis, subs=(1, 2, 5))
        ax.xaxis.set_inverted(True)
        ax.legend(fontsize=6.5)
    return figure


def scores_along(run: Run) -> Figure:
    """Training and validation accuracy along β."""
    with new_figure((4.2, 2.4)) as figure:
        ax = figure.add_subplot()
        for i, (key, name) in enumerate((("val_score", "held-out images"), ("train_score", "training images"))):
            points = _finite((p["beta_ratio"], p[key]) for p in run["path"])
            ax.plot(*points, marker=MARKERS[i], markersize=4, label=name, linewidth=1.2, **style(i))
        ax.set(xscale="log", xlabel="β / β_max", ylabel="accuracy")
        log_ticks(ax.xaxis, subs=(1, 2, 5))
        ax.yaxis.set_major_formatter(percent)
        ax.xaxis.set_inverted(True)
        ax.legend(fontsize=6.5)
    return figure


def lift(run: Run) -> Figure:
    """Which head serves which classes: rows are heads by strength, columns classes; red lifts the own class."""
    matrix, names = np.asarray(run["lift"]), run["classes"]
    strongest = float(np.abs(matrix).max()) or 1.0
    height = 0.9 + 0.17 * len(matrix) + (0.6 if len(names) <= NAMED else 0)
    with new_figure((7.4, min(height, 6.0))) as figure:
        ax = figure.add_subplot()
        norm = require("matplotlib.colors", "report").SymLogNorm(strongest / 100, vmin=-strongest, vmax=strongest)
        image = ax.imshow(matrix, cmap=MAP, norm=norm, aspect="auto", interpolation="none")
        ax.grid(False)
        ax.set(ylabel="head", xlabel="class" if len(names) > NAMED else "")
        rows = range(0, len(matrix), max(1, len(matrix) // 16))
        ax.set_yticks(rows, [str(run["atoms"][k]["number"]) for k in rows])
        if len(names) <= NAMED:
            ax.set_xticks(range(len(names)), [_short(name) for name in names], rotation=60, ha="right")
        bar = figure.colorbar(image, ax=ax, pad=0.01, fraction=0.03, format="{x:+g}")
        bar.outline.set_visible(False)
    return figure


def confusion(run: Run) -> Figure:
    """Share of each true class (row) that is predicted as each class (column)."""
    matrix, names = np.asarray(run["confusion"]), run["classes"]
    with new_figure((5.2, 4.6)) as figure:
        ax = figure.add_subplot()
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="none")
        ax.grid(False)
        ax.set(xlabel="predicted class", ylabel="true class")
        if len(names) <= NAMED:
            short = [_short(name) for name in names]
            ax.set_xticks(range(len(names)), short, rotation=60, ha="right")
            ax.set_yticks(range(len(names)), short)
        if len(names) <= 12:
            for (row, column), count in np.ndenumerate(matrix):
                if count:
                    ink = "white" if shares[row, column] > 0.55 else "black"  # on a map, dark pages too
                    told = str(count) if matrix.max() < 10_000 else f"{100 * shares[row, column]:.0f}%"
                    ax.text(column, row, told, ha="center", va="center", fontsize=7, color=ink)
        bar = figure.colorbar(image, ax=ax, pad=0.02, fraction=0.045, format=percent)
        bar.outline.set_visible(False)
    return figure


def mixing(run: Run) -> Figure:
    """Mixer: how strongly each token (column) feeds each token (row); beside it all that a token feeds, on the grid."""
    W = np.asarray(run["mixing_matrix"])
    with new_figure((6.4, 3.0)) as figure:
        left, right = figure.subplots(1, 2)
        h, w = run["grid"]
        sent = np.sqrt(np.square(W).sum(0))[-h * w :].reshape(h, w)  # without a class token in front
        for ax, shown in ((left, W), (right, sent)):
            image = ax.imshow(shown, cmap="Blues", vmin=0, interpolation="none")
            ax.grid(False)
            figure.colorbar(image, ax=ax, pad=0.02, fraction=0.045).outline.set_visible(False)
        left.set(xlabel="from token", ylabel="to token")
        right.set(xlabel="column of the grid", ylabel="row")
    return figure


def filters(run: Run, most: int = 8) -> Figure:
    """FNO: filters of the strongest heads at every shift (above) and frequency (below, zero in the middle)."""
    space, frequency = (np.asarray(run["filters"][key])[:most] for key in ("space", "frequency"))
    with new_figure((1.0 * len(space) + 0.6, 2.5)) as figure:
        axes = figure.subplots(2, len(space), squeeze=False)
        for line, (what, maps) in enumerate((("shift", space), ("frequency", frequency))):
            for k, one in enumerate(maps):
                ax = axes[line, k]
                ax.imshow(one, cmap="Blues", vmin=0, interpolation="none")
                ax.grid(False)
                ax.set(xticks=[], yticks=[])
                ax.set_title(f"head {run['atoms'][k]['number']}" if line == 0 else "")
                ax.set_ylabel(what if k == 0 else "")
    return figure


def queries(run: Run) -> Figure:
    """Attentive: in some images (rows) the weights of patches under the strongest queries (columns), on one scale."""
    told, pictures = run["queries"], run["pictures"]
    maps = np.asarray(told["maps"])
    g, k = maps.shape[:2]
    with new_figure((0.95 * (k + 1) + 0.9, 0.95 * g + 0.5)) as figure:
        axes = figure.subplots(g, k + 1, squeeze=False)
        for ax in axes.flat:
            ax.grid(False)
            ax.set(xticks=[], yticks=[])
        for i, (file, label) in enumerate(zip(told["files"], told["labels"], strict=True)):
            axes[i, 0].set_ylabel(_short(run["classes"][label]) if label >= 0 else "unseen class")
            if file in pictures:
                axes[i, 0].imshow(_pixels(pictures[file]))
            for j in range(k):
                image = axes[i, j + 1].imshow(maps[i, j], cmap="Blues", vmin=0, vmax=maps.max(), interpolation="none")
        axes[0, 0].set_title("image")
        for ax, number, share in zip(axes[0, 1:], told["queries"], told["shares"], strict=True):
            ax.set_title(f"query {number}\n{percent(round(share, 3))}")
        bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.03, format=percent, label="weight of a patch")
        bar.outline.set_visible(False)
    return figure


def _pixels(uri: str) -> Any:
    """Of a thumbnail, see `pictures`."""
    opened = require("PIL.Image", "report").open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    return np.asarray(opened.convert("RGB"))


def _short(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "…"


def _finite(points: Any) -> tuple[list[float], list[float]]:
    kept = [(max(float(x), 1e-3), float(y)) for x, y in points if y is not None and math.isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def _name_lines(ax: Axes, count: int) -> None:
    """A legend of the runs alone, which come first among the lines."""
    handles = [line for line in ax.lines if line.get_label() not in ("bound", "certified")][:count]
    ax.legend(handles=handles, fontsize=6.5, handlelength=2.6)
