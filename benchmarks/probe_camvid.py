"""``convexhead probe`` on CamVid: several labels an image, numbers and masks, each to a page and rows.

    python benchmarks/probe_camvid.py IMAGES [--work FOLDER] [--tasks presence share masks]

``IMAGES`` has ``train/`` and ``test/`` with ``images/`` and ``labels/``; numbers 0 to 10 are classes, 11 is void. Two
tables are made of the masks: ``presence``, which classes an image has (more than 200 pixels), and ``share``, which
share of its pixels are cars and trees. Frames of one drive follow each other, so folds of these two hold frames that
are alike. Seconds are not noted: the machine did other things too. Rows go to ``results/probe_camvid.csv``.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from camvid import NAMES
from common import Table, hardware
from convexhead.experiments.probe import probe

PRESENT = 200
"""Pixels of a class from which on an image has it. Chosen by hand."""
SHARES = ("car", "tree")
SMALL: dict[str, Any] = {
    "image_size": (144, 192), "heads": ("linear", "mlp", "mlp-mixer"), "tol": 0.01, "fractions": (0.3,), "draws": 2,
}  # fmt: skip
PROBES: dict[str, dict[str, Any]] = {
    "presence": SMALL,
    "share": SMALL,
    "masks": {
        "image_size": (288, 384), "heads": ("linear", "mlp"), "tol": 0.02, "beta_ratios": (0.0001,), "void": len(NAMES),
    },
}  # fmt: skip
"""Settings of each probe. Of masks β/β_max is the one that ``camvid.py`` chose on val: each value costs minutes."""
NOT_NOTED = ("per_class", "seconds", "run", "kind", "shots", "fraction")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--work", type=Path, default=Path("probe-camvid"))
    parser.add_argument("--tasks", nargs="+", default=list(PROBES), choices=list(PROBES))
    options = parser.parse_args()
    table = Table("probe_camvid", ["known", "method", "budget", "draw"], hardware("timm"), again=True)
    for name in options.tasks:
        images = options.work / name
        write_images(options.images.resolve(), images, name)
        place = f"table:{images}?task=regression" if name == "share" else images
        out = options.work / f"{name}-probe"
        results = probe(place, out, crop_pct=1.0, channels=64, reduce="pca", **PROBES[name])
        print(results["page"], flush=True)
        for row in results["rows"]:
            noted = {key: value for key, value in row.items() if key not in NOT_NOTED and value is not None}
            table.add({"known": name, **noted})


def write_images(source: Path, out: Path, name: str) -> None:
    """A folder of links to the images, with what is known of them beside."""
    for split in ("train", "test"):
        (out / split).mkdir(parents=True, exist_ok=True)
        for part in ("images", "labels") if name == "masks" else ("images",):
            link = out / split / part
            if not link.exists():
                link.symlink_to(source / split / part)
        if name != "masks":
            with open(out / split / "labels.csv", "w", newline="") as file:
                lines = csv.writer(file)
                lines.writerow(["name", *(NAMES if name == "presence" else SHARES)])
                lines.writerows(told(path, name) for path in sorted((source / split / "labels").glob("*.png")))
    if name == "masks":
        (out / "classes.txt").write_text("\n".join(NAMES) + "\n")


def told(mask: Path, name: str) -> list[object]:
    """A row of a table: the name of an image, and what its mask says."""
    counts = np.bincount(np.asarray(Image.open(mask)).ravel(), minlength=len(NAMES) + 1)[: len(NAMES)]
    if name == "presence":
        return [mask.stem, *(counts > PRESENT).astype(int).tolist()]
    return [mask.stem, *(f"{counts[NAMES.index(each)] / counts.sum():.5f}" for each in SHARES)]


if __name__ == "__main__":
    main()
