"""What a run leaves for people and machines: results, tables, figures and a page."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any


def write_results(results: dict[str, Any], out: Path) -> None:
    """Results as JSON, the tables of heads and of methods as markdown and CSV, ``figures/`` and ``index.html``."""
    from convexhead.report import csv_rows, drawing, figures, markdown_table, methods, render

    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "table.md").write_text(markdown_table(results))
    write_csv([row | results["environment"] for row in csv_rows(results)], out / "table.csv")
    (out / "methods.md").write_text(methods.markdown(results))
    write_csv([row | results["environment"] for row in results["methods"]], out / "methods.csv")
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    drawn = [figures.excess, figures.convergence, figures.spectra, figures.path, methods.tuning, methods.learning_rates]
    if results.get("sizes"):
        drawn.append(methods.sizes)
    if results["attention"]:
        drawn.append(figures.attention_maps)
    for draw in drawn:
        drawing.save(draw(results), folder / draw.__name__.replace("_", "-"))
    page = out / "index.html"
    page.write_text(render(results))
    results["page"] = str(page)


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Flat rows with the same keys."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
