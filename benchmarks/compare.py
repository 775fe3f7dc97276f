"""How much slower or faster a table is than an older one of the same benchmark.

    python benchmarks/compare.py OLD.csv NEW.csv [--key COLUMN ...] [--column tflop_equivalents] [--threshold 1.05]

Rows are matched by their keys; rows with equal keys count by their median. The exit code is 1 where a row is slower
than ``threshold`` times the old one, or where a row of OLD has no number in NEW, and 2 where nothing can be compared.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

KEYS = ("instance", "store", "head", "activation", "gates", "max_time", "solver", "settings", "dtype", "tol", "what")
"""Columns that tell rows apart in the tables of this folder: those that both files have."""
Key = tuple[str, ...]


def medians(rows: Sequence[dict[str, str]], key: Sequence[str], column: str) -> dict[Key, float]:
    """The median of ``column`` for each key; rows that have a note and no number are left out."""
    values: dict[Key, list[float]] = {}
    for row in rows:
        if row.get(column):
            values.setdefault(tuple(row[name] for name in key), []).append(float(row[column]))
    return {each: median(numbers) for each, numbers in values.items()}


def compare(
    old: Sequence[dict[str, str]],
    new: Sequence[dict[str, str]],
    key: Sequence[str],
    column: str,
    threshold: float,
) -> tuple[list[str], bool]:
    """Lines to print, the slowest first, and whether any row is slower or gone."""
    before, after = medians(old, key, column), medians(new, key, column)
    ratios = {each: after[each] / before[each] for each in before.keys() & after.keys()}
    lines = [
        f"{ratio:7.3f}  {before[each]:>10.4g} -> {after[each]:<10.4g}  {'  '.join(filter(None, each))}"
        + ("  SLOWER" if ratio > threshold else "")
        for each, ratio in sorted(ratios.items(), key=lambda item: (-item[1], item[0]))
    ]
    gone = sorted(before.keys() - after.keys())
    lines += [f"      –  {before[each]:>10.4g} -> –           {'  '.join(filter(None, each))}  GONE" for each in gone]
    lines += [f"      –           – -> {after[each]:<10.4g}  {'  '.join(filter(None, each))}  (new)"
              for each in sorted(after.keys() - before.keys())]  # fmt: skip
    if ratios:
        lines.append(f"{len(ratios)} rows, {column}: median ratio {median(ratios.values()):.3f}")
    return lines, bool(gone) or any(ratio > threshold for ratio in ratios.values())


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--key", nargs="+", help="default: those of " + ", ".join(KEYS) + " that both files have")
    parser.add_argument("--column", default="tflop_equivalents")
    parser.add_argument("--threshold", type=float, default=1.05)
    told = parser.parse_args(arguments)
    for path in (told.old, told.new):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    old, new = read(told.old), read(told.new)
    columns = set(old[0] if old else ()) & set(new[0] if new else ())
    key = told.key or [name for name in KEYS if name in columns]
    if missing := [name for name in (*key, told.column) if name not in columns]:
        parser.error(
            f"not both files have the column {missing[0]}: choose among {', '.join(sorted(columns)) or 'none'}"
        )
    if not key:
        parser.error("no column tells the rows apart: name some with --key")
    lines, slower = compare(old, new, key, told.column, told.threshold)
    if not lines:
        parser.error(f"no row has a number in {told.column}")
    print("\n".join(lines))
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
