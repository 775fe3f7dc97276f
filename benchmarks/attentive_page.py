"""The tables of docs/attentive.md, from the rows that attentive.py has written.

    python benchmarks/attentive_page.py

What is between `<!-- begin NAME -->` and `<!-- end NAME -->` in the page is replaced.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from common import Row, read_csv
from speed_tables import filled, markdown

PAGE = Path(__file__).parent.parent / "docs" / "attentive.md"
LITE0, VIT = "packaged:efficientnet-lite0", "timm:vit_small_patch14_dinov2"


class Chosen(NamedTuple):
    """What the rows of a table have in common."""

    title: str
    backbone: str
    scale: str
    patience: str = ""
    chosen_on: str = ""
    chosen_with: str = ""
    chosen: str = ""


TABLES = {
    "10k-lite0-block4": Chosen("`10k`, Lite0, block 4", f"{LITE0}, block 4", "10k", "2", "4", "512", "metric"),
    "10k-lite0-last": Chosen("`10k`, Lite0, last map", LITE0, "10k", "2", "4", "96", "metric"),
    "10k-vits14-block8": Chosen("`10k`, ViT-S/14, block 8", f"{VIT}, block 8", "10k", "2", "4", "512", "metric"),
    "10k-vits14-last": Chosen("`10k`, ViT-S/14, last tokens", VIT, "10k", "2", "4"),
    "2k-lite0-block4": Chosen("`2k`, Lite0, block 4", f"{LITE0}, block 4", "2k"),
    "2k-lite0-last": Chosen("`2k`, Lite0, last map", LITE0, "2k"),
    "2k-vits14-block8": Chosen("`2k`, ViT-S/14, block 8", f"{VIT}, block 8", "2k"),
    "2k-vits14-last": Chosen("`2k`, ViT-S/14, last tokens", VIT, "2k"),
}
NAMES = {
    "certified": "certified attentive",
    "certified, a norm for each": "the same, a norm for each",
    "self-attention": "certified self-attention",
    "mlp-mixer": "certified Mixer",
    "queries found": "queries found, four directions",
}


def table(name: str) -> str:
    """The rows of one store and scale; that with which they are compared is bold."""
    chosen = TABLES[name]
    keys = chosen._asdict()
    title = keys.pop("title")
    rows = [row for row in read_csv("attentive") if {key: row.get(key, "") for key in keys} == keys]
    columns = [title, "queries", "A", "validation / test", "ahead, points", "seconds"]
    return markdown(columns, [cells(row) for row in rows])


def cells(row: Row) -> list[str]:
    """One line of a table."""
    name, ahead = NAMES.get(row["row"], row["row"]), "–"
    if row.get("certified_ahead"):
        value, low, high = (points(row[key]) for key in ("certified_ahead", "low", "high"))
        ahead = f"{value} ({low} to {high})"
    elif row["row"] == "certified":
        name = f"**{name}**"
    spread = f" ± {points(row['test_sd'])}" if row.get("test_sd") else ""
    accuracy = f"{points(row['validation'])} / {points(row['test'])}{spread}%"
    return [
        name,
        row.get("queries", "–"),
        f"{float(row['whiten']):g}",
        accuracy,
        ahead,
        f"{float(row['cpu_seconds_with_choice']):,.0f}",
    ]


def points(share: str) -> str:
    """A share in percent."""
    return f"{100 * float(share):.1f}".replace("-", "−")


def written(page: str) -> str:
    """The page with all tables."""
    for name in TABLES:
        page = filled(page, name, table(name))
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
