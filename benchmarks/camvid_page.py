"""CamVid by the clock: the commands that go from images with masks to a page with scores, one after another.

    python benchmarks/camvid_page.py IMAGES [--work FOLDER] [--channels N]

``IMAGES`` is as of ``camvid.py``. β of every head is chosen on ``val``, from tokens; ``test`` is scored once. Each
command is a process of its own, as a user types it, so imports count. Steps that ``results/camvid_page.csv`` has are
not run again: to begin anew, delete it and ``--work``. On a machine that others use CPU seconds tell more than the
clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from camvid import NAMES
from common import Table, hardware

HEADS = {
    "linear": ["0.003,0.001,0.0003,0.0001", "1e-4"],
    "mlp": ["0.003,0.001,0.0003,0.0001", "0.01"],
    "self-attention": ["0.03,0.01", "0.02"],
}
"""The grid over β/β_max and the tolerance of each head."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("camvid-page"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    store, page = options.work / "tokens", options.work / "report.html"
    table = Table("camvid_page", ["channels", "step"], hardware("timm"))

    def step(name: str, *command: Any, told: tuple[str, ...] = ()) -> None:
        key = {"channels": options.channels, "step": name}
        if table.has(**key):
            return
        before, began = os.times(), time.perf_counter()
        words = [sys.executable, "-m", "convexhead", *map(str, command), "--json"]
        answer = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
        after, seconds = os.times(), time.perf_counter() - began
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        found = json.loads(answer) if told else {}
        row = {"seconds": f"{seconds:.0f}", "cpu_seconds": f"{cpu:.0f}", **{word: found[word] for word in told}}
        table.run(lambda: row, **key)

    step(
        "extract", "extract", options.images, "--out", store, "--image-size", "288x384", "--crop-pct", 1,
        "--channels", options.channels, "--reduce", "pca", "--constant", "--void", 11, "--class-names", ",".join(NAMES),
    )  # fmt: skip
    for head, (ratios, tol) in HEADS.items():
        run = ["--pool", "none", "--beta-ratios", ratios, "--tol", tol, "--out", options.work / head]
        step(head, "path", store, "--head", head, *run)
    for head in HEADS:
        step(f"evaluate {head}", "evaluate", options.work / head, store, told=("mean_iou", "pixel_accuracy"))
    step("report", "report", *[options.work / head for head in HEADS], "--tokens", store, "--out", page)


if __name__ == "__main__":
    main()
