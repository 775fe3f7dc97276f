"""CamVid by the clock: the commands that go from images with masks to a page with scores, one after another.

    python benchmarks/camvid_page.py IMAGES [--work FOLDER] [--channels N]

``IMAGES`` is as of ``camvid.py``. β of every head is chosen on ``val``, from tokens; ``test`` is scored once. Each
command is a process of its own, as a user types it, so imports count. Rows go to ``results/camvid_page.csv``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from camvid import NAMES
from common import Table, hardware

HEADS = {
    "linear": ["path", "--beta-ratios", "0.003,0.001,0.0003,0.0001"],
    "mlp": ["path", "--beta-ratios", "0.003,0.001,0.0003,0.0001", "--tol", "0.01"],
    "self-attention": ["path", "--beta-ratios", "0.03,0.01,0.003", "--tol", "0.02"],
}
"""How each head is trained: the command and its options beyond those that all have."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("camvid-page"))
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)  # of an earlier run, which would go on
    options.work.mkdir(parents=True)
    store, page = options.work / "tokens", options.work / "report.html"
    table = Table("camvid_page", ["channels", "step"], hardware("timm"), again=True)
    total = 0.0

    def step(name: str, *command: Any, told: tuple[str, ...] = ()) -> None:
        nonlocal total
        began = time.perf_counter()
        words = [sys.executable, "-m", "convexhead", *map(str, command), "--json"]
        answer = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
        seconds = time.perf_counter() - began
        total += seconds
        found = json.loads(answer) if told else {}
        table.run(
            lambda: {"seconds": f"{seconds:.0f}", "total": f"{total:.0f}", **{key: found[key] for key in told}},
            channels=options.channels, step=name,
        )  # fmt: skip

    step(
        "extract", "extract", options.images, "--out", store, "--image-size", "288x384", "--crop-pct", 1,
        "--channels", options.channels, "--reduce", "pca", "--constant", "--void", 11, "--class-names", ",".join(NAMES),
    )  # fmt: skip
    for head, (command, *rest) in HEADS.items():
        run = options.work / head
        step(head, command, store, "--head", head, "--pool", "none", "--seed", 0, "--out", run, *rest)
    for head in HEADS:
        step(f"evaluate {head}", "evaluate", options.work / head, store, told=("mean_iou", "pixel_accuracy"))
    step("report", "report", *[options.work / head for head in HEADS], "--tokens", store, "--out", page)


if __name__ == "__main__":
    main()
