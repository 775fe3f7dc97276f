"""How all figures look and are written: colours, frames, ticks; as SVG, PDF, PNG and JSON, the same bytes each time.

Matplotlib draws without a display. Colours are Okabe and Ito's, told apart by every kind of colour vision. They are
never the only sign: lines differ in dash and marker too. A page may replace the other two, `INK` and `RULE`.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convexhead.errors import require

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
    "attentive": ("#56b4e9", "X"),
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
"""Width and height in inches of one small multiple."""


def head_color(head: str) -> str:
    """The head's colour in every figure."""
    return HEADS.get(head, (CONVEX, "X"))[0]


# -- frames -------------------------------------------------------------------------------------------------
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
    """Few ticks of a logarithmic axis, written as plain numbers; whole decades where it shows less than one."""
    low, high = sorted(axis.get_view_interval())
    if subs == (1,) and low > 0 and math.floor(math.log10(high)) < math.ceil(math.log10(low)):
        set_limits = axis.axes.set_xlim if axis is axis.axes.xaxis else axis.axes.set_ylim
        set_limits(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high)))
    ticker = require("matplotlib.ticker", "report")
    axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=numticks))
    axis.set_major_formatter(ticker.FuncFormatter(words))
    axis.set_minor_locator(ticker.NullLocator())


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
