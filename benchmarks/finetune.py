"""Fine-tuning from the certified head and from a random one, at the same budget.

    python benchmarks/finetune.py IMAGES [--backbone SPEC] [--pixels N] [--head NAME] [--epochs N] [--seeds N]

``IMAGES`` holds class folders in ``train/`` and ``test/``. β of the head is chosen on a fifth of ``train``. Rows go to
``results/finetune.csv``, one for each start and seed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import Table, hardware
from convexhead import runs
from convexhead.deploy.training import Recipe, finetune
from convexhead.tokens import extract


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("images")
    options.add_argument("--backbone", default="packaged:efficientnet-lite0")
    options.add_argument("--pixels", type=int, default=64)
    options.add_argument("--head", default="self-attention")
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--seeds", type=int, default=3)
    given = options.parse_args()
    machine = hardware("timm")
    table = Table("finetune", ("backbone", "pixels", "head", "epochs", "start", "seed"), machine)
    with tempfile.TemporaryDirectory() as folder:
        store, run = Path(folder) / "tokens", Path(folder) / "run"
        extract(given.images, given.backbone, store, image_size=given.pixels, channels=64, reduce="pca",
                standardize=True)  # fmt: skip
        path = runs.path(store, run, head=given.head, beta_ratios=(0.3, 0.1, 0.03), refit=True)
        found = finetune(run, given.images, recipe=Recipe(epochs=given.epochs), seeds=given.seeds)
    for trial in found.trials:
        table.add({
            "backbone": given.backbone, "pixels": given.pixels, "head": given.head, "epochs": given.epochs,
            "start": trial.start, "seed": trial.seed, "beta_ratio": path.chosen["beta_ratio"], **found.images,
            "rate": trial.rate, "head_rate": trial.rate * trial.head_rate, "before": f"{trial.before:.4f}",
            "after": f"{trial.after:.4f}", "seconds": f"{trial.seconds:.1f}",
        })  # fmt: skip
        print(trial)


if __name__ == "__main__":
    main()
