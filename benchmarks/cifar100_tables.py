"""Tables of the CIFAR-100 experiment, gathered from finished runs.

    python benchmarks/cifar100_tables.py NAME RUN [RUN ...]     # rows of the runs into results/cifar100_NAME.csv,
                                                                # of fewer images into results/cifar100_NAME_sizes.csv
    python benchmarks/cifar100_tables.py NAME --probes STORE --scale 10k
                                                                # its linear probes alone, anew
    python benchmarks/cifar100_tables.py                        # the tables of docs/cifar100-tables.md from these files

RUN is the folder of a `convexhead cifar100`; several may each hold some of the cells of one table. A cell's rows take
the place of its older ones. In the page, what is between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced; a
table in which Adam's runs have several widths gets a figure, docs/images/cifar100-NAME.svg, and fewer images another,
docs/images/cifar100-SCALE-sizes.svg.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from common import RESULTS, Row, read_csv, write_csv
from convexhead.baselines.adam import OPTIMIZERS
from convexhead.experiments.cifar100 import ON_REQUEST, PRIORITY, SCALES
from convexhead.experiments.comparison import run
from convexhead.experiments.rows import METHOD
from convexhead.experiments.splits import TokenChoice, chosen_splits
from convexhead.experiments.training import Settings
from convexhead.report import drawing, methods
from convexhead.tokens import TokenStore
from speed_tables import filled, markdown, prose

PAGE = Path(__file__).parent.parent / "docs" / "cifar100-tables.md"
COLUMNS = {
    "Head": "Head",
    "Activation": "Activation",
    "Method": "Method",
    "Heads": "Heads",
    "Test top-1": "Top-1",
    "Test top-5": "Top-5",
    "Above the optimum": "Above the optimum",
    "Best run": "Best run",
    "Time, all": "Time, all",
    "Convex / tuning time": "÷ tuning",
}
"""Columns of `methods.COLUMNS` that the page has room for, and what they are called there."""
ORDER = ("linear", "gated-relu", "relu")
HEADS = (*PRIORITY, *(cell.head for cell in ON_REQUEST))


def gather(name: str, runs: list[Path]) -> None:
    """Add the rows of finished runs."""
    rows = read_csv(f"cifar100_{name}")
    for finished in runs:
        results = json.loads((finished / "results.json").read_text())
        about = {key: results["dataset"][key] for key in ("backbone", "train", "tokens", "channels", "classes")}
        new = [{**row, **about, **results["environment"]} for row in results["methods"]]
        fresh = {_cell(row) for row in new}
        rows = [row for row in rows if _cell(row) not in fresh] + new
        sizes = [
            {"images_per_class": point["images_per_class"], **row, **results["environment"]}
            for point in results.get("sizes", [])
            for row in point["methods"]
        ]
        if sizes:
            write_csv(f"cifar100_{name}_sizes", sizes)
    write_csv(f"cifar100_{name}", sorted(rows, key=_place))


def gather_probes(name: str, store: Path, scale: str) -> None:
    """Linear probes on the images and tokens of a scale, in place of those that the tables of a name have."""
    choice = SCALES[scale].images

    def probes(choice: TokenChoice, *poolings: str) -> tuple[list[Row], Row]:
        splits, settings = chosen_splits(TokenStore.open(store), choice), SCALES[scale]
        if splits.train.has_class_tokens and not poolings:
            poolings = ("mean-token", "class-token")
        chosen = Settings((), poolings or ("mean-token",), settings.path, settings.adam)
        with tempfile.TemporaryDirectory(prefix="convexhead-probes-") as folder:
            results = run(splits, chosen, Path(folder) / "run", title="Linear probes", jobs=1)
        about = {key: results["dataset"][key] for key in ("backbone", "train", "tokens", "channels", "classes")}
        return [{**row, **results["environment"]} for row in results["methods"]], about

    sizes, others = f"cifar100_{name}_sizes", []
    for row in read_csv(sizes):
        if row["head"].startswith("Linear probe"):
            few = int(row["images_per_class"])
            some = replace(choice, train=few, validation=max(choice.validation, 1 / few))
            others += [{"images_per_class": few, **new} for new in probes(some, "mean-token")[0]]
        else:
            others.append(row)
    if others:
        write_csv(sizes, others)
    new, about = probes(choice)
    rows = [row for row in read_csv(f"cifar100_{name}") if not row["head"].startswith("Linear probe")]
    write_csv(f"cifar100_{name}", [*rows, *({**about, **row} for row in new)])


def _cell(row: Row) -> tuple[str, str]:
    return row["head"], row.get("activation") or ""


def _place(row: Row) -> tuple[int, int]:
    """By activation and head, probes last; the methods of a cell keep their order."""
    if row.get("activation") not in ORDER:
        return len(ORDER), 0
    return ORDER.index(row["activation"]), HEADS.index(row["head"].split()[0])


def table(name: str) -> str:
    """The table of one file, and where it was measured."""
    rows = read_csv(f"cifar100_{name}")
    several = len({_processor(row) for row in rows}) > 1
    lines = []
    for row in rows:
        cells = dict(zip(methods.COLUMNS, methods.cells(_typed(row)), strict=True))
        lines.append([cells[column] for column in COLUMNS] + [_processor(row)] * several)
    columns = list(COLUMNS.values()) + ["On"] * several
    machines = dict.fromkeys(f"{_processor(row)}, {row['cores']} cores, seconds: {row['clock']}" for row in rows)
    sizes = {column: rows[0][column] for column in ("backbone", "train", "classes", "tokens", "channels")}
    told = "{backbone}: {train} images to train on, {classes} classes, {tokens} tokens x {channels} channels."
    about = prose(f"{told.format(**sizes)} Measured on: {'; '.join(machines)}.")
    return f"{about}\n\n{markdown(columns, lines)}"


def _processor(row: Row) -> str:
    return row.get("gpu") or row["cpu"]


def _typed(row: Row) -> dict[str, Any]:
    """A row of a CSV as `convexhead.report.methods` takes it."""
    typed: dict[str, Any] = dict.fromkeys(METHOD)
    for key, value in row.items():
        try:
            typed[key] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            typed[key] = value
    return typed


def widths(name: str) -> bool:
    """Draw Adam's runs against their number of heads, beside the convex head; False where they have one number."""
    rows = [_typed(row) for row in read_csv(f"cifar100_{name}") if row["method"] in ("convex", OPTIMIZERS["l2"])]
    adam_rows = [row for row in rows if row["method"] != "convex" and row["head"] != "linear"]
    if len(adam_rows) == len({_cell(row) for row in adam_rows}):
        return False
    heads = list(dict.fromkeys(row["head"] for row in adam_rows))
    styles = {head: {"color": drawing.head_color(head.split()[0]), "linestyle": _dash(head)} for head in heads}
    with drawing.grid(2 * len(ORDER), columns=len(ORDER)) as (figure, axes):
        for column, activation in enumerate(ORDER):
            top, bottom = axes[column], axes[len(ORDER) + column]
            for head in heads:
                mine = [row for row in rows if (row["head"], row["activation"]) == (head, activation)]
                convex = [row for row in mine if row["method"] == "convex"]
                adam = [row for row in mine if row["method"] != "convex"]
                m = [row["heads"] for row in adam]
                accuracy, spread = ([row[key] for row in adam] for key in ("test_top1", "test_top1_sd"))
                top.errorbar(m, accuracy, spread, marker="o", markersize=3, linewidth=1, **styles[head])
                bottom.plot(m, [row["excess_median"] for row in adam], marker="o", markersize=3, lw=1, **styles[head])
                for row in convex:
                    top.plot(row["heads"], row["test_top1"], "*", markersize=9, color=styles[head]["color"])
            top.set(xscale="log", title=activation)
            bottom.set(xscale="log", xlabel="heads", xlim=top.get_xlim())
            bottom.set_yscale("symlog", linthresh=1e-3)
            bottom.set_yticks([-1e-2, 0, 1e-3, 1e-2, 1e-1, 1])
            for axis in (top.xaxis, bottom.xaxis):
                axis.set_major_locator(FixedLocator([5, 20, 50, 200]))
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            for axis in (top.yaxis, bottom.yaxis):
                axis.set_major_formatter(FuncFormatter(drawing.percent))
        for line in (axes[: len(ORDER)], axes[len(ORDER) :]):
            limits = [ax.get_ylim() for ax in line]
            for ax in line:
                ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        axes[0].set_ylabel("test top-1")
        axes[len(ORDER)].set_ylabel("above the convex head")
        drawing.legend(figure, [*styles.items(), ("convex", {"marker": "*", "color": drawing.INK, "linestyle": ""})], 4)
        path = PAGE.parent / "images" / f"cifar100-{name}.svg"
        path.write_text(drawing.svg(figure, background="white"))
    return True


def _dash(head: str) -> str:
    return "--" if head.endswith("grouped") else "-"


def write_page() -> None:
    """Every table of the page that there is a file for."""
    page = PAGE.read_text()
    for name in re.findall(r"<!-- begin (\S+) -->", page):
        if (RESULTS / f"cifar100_{name}.csv").exists():
            text = table(name)
            if widths(name):
                text += f"\n\n![Adam's heads by their number](images/cifar100-{name}.svg)"
            page = filled(page, name, text)
        if rows := [_typed(row) for row in read_csv(f"cifar100_{name}_sizes")]:
            numbers = sorted({row["images_per_class"] for row in rows})
            curve = [
                {"images_per_class": few, "methods": [row for row in rows if row["images_per_class"] == few]}
                for few in numbers
            ]
            image = PAGE.parent / "images" / f"cifar100-{name.split('_')[0]}-sizes.svg"
            image.write_text(drawing.svg(methods.sizes({"sizes": curve}), background="white"))
    PAGE.write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?")
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--probes", type=Path, metavar="STORE")
    parser.add_argument("--scale", choices=list(SCALES))
    args = parser.parse_args()
    if args.probes is not None:
        gather_probes(args.name, args.probes, args.scale)
    elif args.name is not None:
        gather(args.name, args.runs)
    write_page()


if __name__ == "__main__":
    main()
