"""The tables of docs/speed.md and docs/speed-tables.md, written from the CSVs: python benchmarks/speed_tables.py

The text between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced by the table of that name. Figures are copied
to docs/images.
"""

from __future__ import annotations

import shutil
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from common import RESULTS, Row, read_csv
from evaluation import BFLOAT16

DOCS = Path(__file__).parent.parent / "docs"
NOTHING = "*(no rows yet)*"
WORDS = ("solver", "settings")
LAUNCHES = 100.0
"""Evaluations that take so many times their arithmetic are a GPU's launches, and stay in the CSV."""


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; all columns but the first and those of `WORDS` are aligned right."""
    sides = ["---" if column in WORDS else "---:" for column in columns[1:]]
    lines = [columns, ["---", *sides], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(row: Row, column: str, digits: int = 3) -> str:
    """A cell, or a dash."""
    return f"{float(row[column]):.{digits}g}" if column in row else "–"


def where(rows: Sequence[Row]) -> str:
    """Machines that rows were measured on."""
    rates: dict[str, list[float]] = {}
    for row in rows:
        product = "TF32" if row.get("dtype") in ("TF32", BFLOAT16) else "float32"
        machine = f"{row.get('gpu', row['cpu'])}, threads: {row['threads']}, {{}} GFLOP/s in a large {product} product"
        rates.setdefault(machine, []).append(float(row["gemm_gflops_float32"]))
    told = (machine.format(f"{min(r):.0f} to {max(r):.0f}") for machine, r in rates.items())
    return prose("Measured on: " + "; ".join(told) + ".")


def prose(text: str) -> str:
    """The text in lines of at most 100 characters."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def suite() -> str:
    """A table an instance, Adam's and L-BFGS's runs summed up."""
    rows, parts = read_csv("suite"), []
    for instance in dict.fromkeys(row["instance"] for row in rows):
        mine = [row for row in rows if row["instance"] == instance]
        lines: list[Sequence[object]] = []
        for row in mine:
            if row["solver"] in ("adam", "lbfgs"):
                continue
            if "objective" not in row:
                lines.append([row["solver"], "–", "–", "–", "–", "–", row.get("note", "")])
                continue
            cells = [
                number(row, c) for c in ("seconds_median", "tflop_equivalents", "ratio_to_ours", "excess_certified")
            ]
            settings = "; ".join(filter(None, (row["settings"], row.get("note"))))
            lines.append([row["solver"], *cells, number(row, "relative_gap_certified", 2), settings])
        for solver in ("adam", "lbfgs"):
            grid = [row for row in mine if row["solver"] == solver and "objective" in row]
            if grid:
                lines.append(_grid(solver, grid))
        columns = ["", "seconds", "TFLOP-equivalents", "× ours", "excess, at most", "proves itself", "settings"]
        figure = f"![{instance}](images/{_figure(instance)}.svg)"
        parts.append(f"**{instance}**\n\n{markdown(columns, lines)}\n\n{figure}\n\n{where(mine)}")
    return "\n\n".join(parts) or NOTHING


def _grid(solver: str, grid: Sequence[Row]) -> list[object]:
    """The best run, with what the whole grid took."""
    best = min(grid, key=lambda row: float(row["objective"]))
    excess = sorted(float(row["excess_certified"]) for row in grid)
    near = [float(row["seconds_to_1pct"]) for row in grid if row["seconds_to_1pct"] != "never"]
    told = f"best of {len(grid)} runs: {best['settings']}; all of them {number(best, 'tuning_seconds')} s, "
    told += f"median excess {statistics.median(excess):.2g}; "
    told += f"within 1% of the best known after {min(near):.3g} s ({len(near)} runs)" if near else "none within 1%"
    cells = [number(best, c) for c in ("seconds_median", "tflop_equivalents", "ratio_to_ours", "excess_certified")]
    return [solver, *cells, f"audit: {number(best, 'audited_gap', 2)}", told]


def _figure(instance: str) -> str:
    starts = {"synthetic n=200": "synthetic-200", "digits": "digits", "synthetic n=1000": "synthetic-1000"}
    starts |= {"CIFAR-2k": "cifar2k", "CIFAR-8k": "cifar8k", "CIFAR-50k": "cifar50k"}
    return "suite-" + next(name for start, name in starts.items() if instance.startswith(start))


def heads() -> str:
    rows = [row for row in read_csv("heads") if "objective" in row]
    lines = [
        [
            f"{row['head']}, {row['activation']}" + (f", {row['gates']} gates" if row["gates"] != "0" else ""),
            number(row, "seconds_median"),
            number(row, "tflop_equivalents"),
            number(row, "ratio_to_self_attention_linear"),
            number(row, "relative_gap_certified", 2) + ("" if row["converged"] == "True" else " (stopped)"),
            row["heads_found"],
            f"{100 * float(row['test_accuracy']):.1f}%",
            number(row, "times_the_arithmetic"),
            " ".join(row["instance"].split()[:2]),
        ]
        for row in rows
    ]
    columns = ["head", "seconds", "TFLOP-equivalents", "× attention linear", "certified", "heads found", "test",
               "evaluation ÷ its arithmetic", "tokens of"]  # fmt: skip
    return f"{markdown(columns, lines)}\n\n{where(rows)}" if rows else NOTHING


def evaluation() -> str:
    rows = [row for row in read_csv("evaluation") if float(row.get("times_the_arithmetic", "inf")) < LAUNCHES]
    lines = [
        [
            f"{row['head']}, {row['activation']}"
            + (f", {row['gates']} gates" if row["gates"] != "0" else "")
            + (f", {BFLOAT16}" if row["dtype"] == BFLOAT16 else ""),
            row.get("gpu", row["cpu"]),
            row["instance"],
            number(row, "seconds_median"),
            number(row, "gflops"),
            f"{100 * float(row['share_of_gemm_rate']):.0f}%",
            number(row, "times_the_arithmetic"),
        ]
        for row in rows
    ]
    columns = ["head", "on", "sizes", "seconds", "GFLOP/s", "of the GEMM rate", "time ÷ its arithmetic"]
    return f"{markdown(columns, lines)}\n\n{where(rows)}" if rows else NOTHING


def growth() -> str:
    rows = read_csv("growth")
    lines = [
        [
            row["instance"],
            row.get("gpu", row["cpu"]),
            row["samples"],
            number(row, "seconds_median"),
            number(row, "tflop_equivalents"),
            number(row, "relative_gap_certified", 2) + ("" if row["converged"] == "True" else " (stopped)"),
            row["heads"],
            f"{float(row['budget_mb']):.0f} MB",
            f"{row['peak_mb']} MB",
        ]
        for row in rows
        if "objective" in row
    ]
    slopes = [
        f"Exponent of time over samples, {row['instance']}, {row['device']}: {row['exponent']}."
        for row in rows
        if "exponent" in row
    ]
    columns = ["tokens", "on", "samples", "seconds", "TFLOP-equivalents", "certified", "heads", "budget", "peak"]
    return "\n\n".join([markdown(columns, lines), *slopes, where(rows)]) if lines else NOTHING


def mlp_scnn() -> str:
    """Ours and SCNN's on instances and weights."""
    rows, lines = [row for row in read_csv("mlp_scnn") if "objective" in row or "note" in row], []
    for row in rows:
        cells = [number(row, c) for c in ("seconds_median", "tflop_equivalents")]
        settings = f"{row['settings']}; whole call {number(row, 'whole_call_seconds')} s"
        lines.append([f"{row['instance']}, β/β_max {row['beta_ratio']}", row["solver"], *cells, row.get("excess", "–"),
                      f"{settings} {row.get('note', '') if 'objective' in row else ''}"])  # fmt: skip
    columns = ["problem", "solver", "seconds", "TFLOP-equivalents", "excess", "settings"]
    return f"{markdown(columns, lines)}\n\n{where(rows)}" if rows else NOTHING


def linear_head() -> str:
    """A line for each problem and excess: seconds of ours, and of scikit-learn in each precision."""
    rows = read_csv("linear_head")
    lines, kinds = [], (("scikit-learn lbfgs", "float64"), ("scikit-learn lbfgs", "float32"))
    for ours in (row for row in rows if row["solver"] == "convexhead" and "seconds_median" in row):
        same = {
            (row["solver"], row["dtype"]): row
            for row in rows
            if all(row[k] == ours[k] for k in ("instance", "C", "asked"))
        }
        theirs = [same.get(kind, {}) for kind in kinds]
        seconds = [float(row["seconds_median"]) for row in theirs if "seconds_median" in row]
        # Single fits are as near as was asked; of a path it is told how near the worst of its values is.
        far = {kind: f", up to {row['excess']} above" if "path" in ours["instance"] and "excess" in row else ""
               for kind, row in same.items()}  # fmt: skip
        far |= {kind: f"{far[kind]}, {row['note']}" for kind, row in same.items() if "note" in row}
        cells = [f"{number(row, 'seconds_median')} ({row['settings']}{far[kind]})"
                 if "settings" in row else row.get("note", "–")
                 for kind, row in zip(kinds, theirs, strict=True)]  # fmt: skip
        ratio = f"{min(seconds) / float(ours['seconds_median']):.2g}" if seconds else "–"
        if any("stopped after" in row.get("note", "") for row in theirs):
            ratio = f"more than {ratio}"
        lines.append([ours["instance"], ours["C"], ours["asked"], number(ours, "seconds_median"), *cells, ratio])
    columns = ["problem", "C", "excess", "ours", "scikit-learn, float64", "scikit-learn, float32", "times as fast"]
    return f"{markdown(columns, lines)}\n\n{where(rows)}" if rows else NOTHING


def ablation() -> str:
    rows, lines = read_csv("ablation"), []
    base = {row["instance"]: float(row["seconds_median"]) for row in rows if row["variant"] == "as it is"}
    for row in rows:
        if "objective" not in row:
            lines.append([row["variant"], "–", "–", "–", "–", "–", "–", row.get("note", "")])
            continue
        evaluations = f"{row['evaluations_bfloat16']} + {row['evaluations_float32']}"
        products = f"{row['products_bfloat16']} + {row['products_float32']} + {row['products_float64']}"
        ratio = float(row["seconds_median"]) / base[row["instance"]] if row["instance"] in base else float("nan")
        cells = [number(row, "seconds_median"), f"{ratio:.2f}", evaluations, products, row["newton_hessians"]]
        lines.append(
            [row["variant"], *cells, number(row, "relative_gap_certified", 2), ", ".join(row["instance"].split()[1::6])]
        )
    columns = ["", "seconds", "× as it is", "evaluations (bfloat16 + float32)"]
    columns += ["products (bfloat16 + float32 + float64)", "Newton Hessians", "certified"]
    columns += ["images, β ÷ β_max"]
    return f"{markdown(columns, lines)}\n\n{where(rows)}" if rows else NOTHING


PAGES = {
    "speed": (suite, heads, growth, mlp_scnn, linear_head),
    "speed-tables": (evaluation, ablation),
}
"""The tables of each page."""


def filled(page: str, name: str, text: str) -> str:
    """The page with this text between `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    assert page.count(begin) == page.count(end) == 1, f"no place for {name}"
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"


def main() -> None:
    for name, tables in PAGES.items():
        path = DOCS / f"{name}.md"
        page = path.read_text()
        for table in tables:
            page = filled(page, table.__name__, table())
        path.write_text(page)
        print(path)
    for figure in RESULTS.glob("suite-*.svg"):
        shutil.copy(figure, DOCS / "images" / figure.name)


if __name__ == "__main__":
    main()
