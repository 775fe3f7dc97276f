"""CamVid by the clock: the commands that go from images with masks to a page with scores, one after another.

    python benchmarks/camvid_page.py IMAGES [--work FOLDER] [--channels N]

``IMAGES`` is as of ``camvid.py``. β of the linear head and the MLP is what it chose on ``val``, that of self-attention
is set by hand. ``fit`` scores ``test`` for the page. Each command is a process of its own, as a user types it, so
imports count. Steps that ``results/camvid_page.csv`` has are not run again: to begin anew, delete it and ``--work``. On
a machine that others use CPU seconds tell more than the clock.
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

import convexhead as ch
from camvid import NAMES
from common import Table, hardware

HEADS = {"linear": (1e-4, 1e-4), "mlp": (1e-4, 0.01), "self-attention": (0.01, 0.02)}
"""β/β_max and the tolerance of each head."""


def results(run: Path) -> dict[str, Any]:
    """What the page says of a run: its certificate, and the scores of ``test`` with intervals over images."""
    clf, pixels = ch.load(run), json.loads((run / "evidence.json").read_text())["pixels"]
    (low, high), (least, most) = pixels["mean_iou_interval"], pixels["accuracy_interval"]
    return {
        "beta_ratio": f"{clf.beta_ / clf.beta_max_:.4g}", "heads": clf.n_heads_,
        "objective": clf.certificate_.primal, "relative_gap": clf.certificate_.relative_gap,
        "test_miou": f"{pixels['mean_iou']:.4f}", "test_miou_low": f"{low:.4f}", "test_miou_high": f"{high:.4f}",
        "test_accuracy": f"{pixels['accuracy']:.4f}", "test_accuracy_low": f"{least:.4f}",
        "test_accuracy_high": f"{most:.4f}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("camvid-page"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    store, page = options.work / "tokens", options.work / "report.html"
    table = Table("camvid_page", ["channels", "step"], hardware("timm"))

    def step(name: str, *command: Any, run: Path | None = None) -> None:
        key = {"channels": options.channels, "step": name}
        if table.has(**key):
            return
        before, began = os.times(), time.perf_counter()
        words = [sys.executable, "-m", "convexhead", *map(str, command)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        after, seconds = os.times(), time.perf_counter() - began
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        found = {} if run is None else results(run)
        table.run(lambda: {"seconds": f"{seconds:.0f}", "cpu_seconds": f"{cpu:.0f}", **found}, **key)

    step(
        "extract", "extract", options.images, "--out", store, "--image-size", "288x384", "--crop-pct", 1,
        "--channels", options.channels, "--reduce", "pca", "--constant", "--void", 11, "--class-names", ",".join(NAMES),
    )  # fmt: skip
    for head, (ratio, tol) in HEADS.items():
        run = options.work / head
        settings = ["--head", head, "--pool", "none", "--beta-ratio", ratio, "--tol", tol]
        step(head, "fit", store, *settings, "--out", run, run=run)
    step("report", "report", *[options.work / head for head in HEADS], "--out", page)


if __name__ == "__main__":
    main()
