"""One self-contained HTML page from the results: styles, figures and images inside, no request leaves it."""

from __future__ import annotations

import base64
import binascii
import re
import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from convexhead.errors import InputError, require
from convexhead.report import drawing, figures, methods, tables
from convexhead.report.tables import Results, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE, NARROW = 8.2, 4.2
"""Width in inches of the first figure on a desktop and on a phone."""


def render(results: Results) -> str:
    """The page as text. Everything of ``results`` that is shown is escaped; figures are inlined as SVG."""
    template = environment().get_template("page.html")
    rows = results["rows"]
    return template.render(
        results=results,
        table=[(row, tables.cells(row), tables.adam_summary(row), tables.diverged(row)) for row in rows],
        baseline=results.get("baseline"),
        best=max(rows, key=lambda row: row["validation_accuracy"], default=None),
        failure=max((row["certificate"]["failure_probability"] for row in rows), default=0.0),
        scopes={row["certificate"]["scope"] for row in rows},
        methods=[(row, methods.cells(row)) for row in results.get("methods", [])],
        method_columns=methods.COLUMNS,
        early=[row for row in rows if not row["certificate"]["converged"]],
        adam_rows=[row["twin"] for row in rows if row.get("twin")],
        gallery=_gallery(results),
        commands=[command_line(line) for line in results["reproduce"]],
        **_figures(results, require("markupsafe", "report").Markup),
    )


def environment() -> Any:
    """The templates of this package, which escape everything, with the filters that they use."""
    jinja2 = require("jinja2", "report")
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("convexhead.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        accuracy=tables.accuracy,
        relative=tables.relative,
        gap=tables.gap,
        seconds=tables.seconds,
        count=_count,
        probability=tables.probability,
    )
    return made


# -- figures ------------------------------------------------------------------------------------------------
def _figures(results: Results, safe: Callable[[str], Any]) -> dict[str, Any]:
    """Every figure of the page as inline SVG with the words that a screen reader says instead."""
    rows = results["rows"]
    counter = iter(range(10_000))

    def inline(figure: Figure, alt: str) -> Any:
        return safe(inline_svg(figure, f"f{next(counter)}-", alt))

    gaps = "; ".join(f"{figures.name_of(row)}: gap {tables.gap(row['certificate'])}" for row in rows)
    alt = f"Distance from the best possible objective, on a logarithmic scale. {gaps}."
    activations = dict.fromkeys(row["activation"] for row in rows)
    return {
        "excess": [inline(figures.excess(results, width), alt) for width in (WIDE, NARROW)] if rows else [],
        "convergence": [
            (row, inline(drawing.panel(figures.draw_convergence, row), _said_convergence(row))) for row in rows
        ],
        "spectra": [
            (head, inline(drawing.panel(figures.draw_spectrum, group), _said_spectrum(head, group)))
            for head, group in figures.by_head(results).items()
        ],
        "path": [
            (what, activation, inline(_path_panel(results, group, key), _said_path(activation, what, group)))
            for key, what in (("validation_accuracy", "validation accuracy"), ("heads", "heads found"))
            for activation in activations
            if (group := [row for row in rows if row["activation"] == activation and row["path"]])
        ],
        **_method_figures(results, inline),
        "head_colors": {row["head"]: themed(drawing.head_color(row["head"])) for row in rows},
        "activation_colors": figures.activation_styles(rows),
    }


def _method_figures(results: Results, inline: Callable[[Figure, str], Any]) -> dict[str, Any]:
    """What tuning costs and buys, learning rates, numbers of images: of results that have them."""
    drawn: dict[str, Any] = {"tuning": None, "learning_rates": [], "sizes": None}
    if results.get("methods"):
        told = "; ".join(
            f"{row['head']} {row['activation'] or ''} {methods.short(row)}: {tables.accuracy(row['test_top1'])} after "
            f"{tables.seconds(row['seconds_total'])}"
            for row in results["methods"]
        )
        drawn["tuning"] = inline(methods.tuning(results), f"Test accuracy against time with all tuning. {told}.")
        drawn["learning_rates"] = [
            (row, inline(drawing.panel(methods.draw_learning_rates, row), _said_rates(row)))
            for row in results["rows"]
            if row.get("twin")
        ]
    if results.get("sizes"):
        counts = ", ".join(str(point["images_per_class"]) for point in results["sizes"])
        drawn["sizes"] = inline(methods.sizes(results), f"Test accuracy with {counts} train images of each class.")
    return drawn


def _said_rates(row: Row) -> str:
    rates = sorted({run["learning_rate"] for run in row["twin"]["tried"]})
    told = f"{figures.name_of(row)}: distance from the optimum against time, by the convex solve and by Adam at "
    return told + ", ".join(f"{rate:g}" for rate in rates) + "."


def _path_panel(results: Results, rows: Sequence[Row], key: str) -> Figure:
    limits = figures.path_limits(results, key)
    return drawing.panel(figures.draw_path, rows, key, limits, size=(4.2, 2.4))


def _said_convergence(row: Row) -> str:
    certificate = row["certificate"]
    text = (
        f"{figures.name_of(row)}: the convex solve ends after {tables.seconds(row['fit_seconds'])} "
        f"within {tables.gap(certificate)} of the optimum"
    )
    worst = tables.adam_summary(row)["excess_worst"]
    return text + ("." if worst is None else f"; Adam's worst run ends {tables.relative(worst)} above it.")


def _said_spectrum(head: str, rows: Sequence[Row]) -> str:
    return (
        f"Singular values of Z, {head}: " + ", ".join(f"{row['heads']} with {row['activation']}" for row in rows) + "."
    )


def _said_path(activation: str, what: str, rows: Sequence[Row]) -> str:
    chosen = ", ".join(f"{row['head']} chose {row['beta_ratio']:g}" for row in rows)
    return f"{what.capitalize()} along beta over beta_max, {activation}: {chosen}."


def themed(text: str) -> str:
    """Colours as the page's variables, which have another value on dark paper."""
    for color, name in (
        (drawing.INK, "currentColor"),
        (drawing.RULE, "var(--rule)"),
        (drawing.CONVEX, "var(--convex)"),
        (drawing.ADAM, "var(--adam)"),
    ):
        text = text.replace(color, name)
    return text


def inline_svg(figure: Figure, prefix: str, alt: str) -> str:
    """SVG that takes ink, rules and font from the page, with ids of its own, as wide as its place."""
    text = drawing.svg(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}", text)
    text = themed(text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
    head, body = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    escape = require("markupsafe", "report").escape
    return f'{head} role="img" aria-label="{escape(alt)}">{body}'


# -- the gallery --------------------------------------------------------------------------------------------
def _gallery(results: Results) -> list[dict[str, Any]]:
    """Images with their maps as coloured cells ``(column, row, colour, opacity, words)``."""
    about = results.get("attention")
    if not about:
        return []
    items = []
    for image in about["images"]:
        strongest = max((abs(value) for line in image["map"] for value in line), default=0) or 1.0
        cells = [
            {
                "x": x,
                "y": y,
                "color": "#b2182b" if value > 0 else "#2166ac",
                "opacity": f"{0.75 * abs(value) / strongest:.2f}",
                "value": f"{value:+.3f}",
            }
            for y, line in enumerate(image["map"])
            for x, value in enumerate(line)
        ]
        items.append(
            {
                **image,
                "cells": cells,
                "png": _png(image["png"]),
                "wrong": image["label"] != image["predicted"],
            }
        )
    return items


def _png(text: str) -> str:
    """Base64 text of a PNG, checked: it goes into a data URI."""
    try:
        if base64.b64decode(text, validate=True).startswith(b"\x89PNG\r\n\x1a\n"):
            return text
    except (binascii.Error, ValueError):
        pass
    raise InputError("an attention image is not a base64 PNG")


# -- words --------------------------------------------------------------------------------------------------
def _count(value: Any) -> str:
    """``50000 -> "50,000"``; what is no integer stays as it is."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def command_line(line: str | Sequence[str]) -> str:
    """A command as it is typed."""
    return line if isinstance(line, str) else shlex.join(line)
