"""Fine-tuning from the certified head and from a random one, at the same budget.

    python benchmarks/finetune.py IMAGES [--backbone SPEC] [--pixels N] [--head NAME] [--epochs N] [--seeds N]
    python benchmarks/finetune.py CIFAR100 --classes 20 --per-class 80

``IMAGES`` holds class folders in ``train/`` and ``test/``. With ``--classes`` and ``--per-class`` the training images
are those of the scale ``2k`` of `convexhead cifar100`, and the test images are all of these classes. β of the head is
chosen on a fifth of the training images. Rows go to ``results/finetune.csv``, one for each start and seed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import Table, hardware
from convexhead import runs
from convexhead.deploy.training import Recipe, finetune
from convexhead.experiments.splits import Subset
from convexhead.tokens import extract
from convexhead.tokens.sources.open import open_source


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("images")
    options.add_argument("--backbone", default="packaged:efficientnet-lite0")
    options.add_argument("--pixels", type=int, default=64)
    options.add_argument("--head", default="self-attention")
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--classes", type=int, help="the first so many; all without")
    options.add_argument("--per-class", type=int, help="training images of a class; all without")
    given = options.parse_args()
    machine = hardware("timm")
    table = Table("finetune", ("backbone", "pixels", "head", "epochs", "train", "start", "seed"), machine)
    chosen = {"train": given.per_class, "test": None}
    images = Subset(open_source(given.images), classes=given.classes, per_class=chosen, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        store, run = Path(folder) / "tokens", Path(folder) / "run"
        extract(images, given.backbone, store, image_size=given.pixels, channels=64, reduce="pca",
                standardize=True)  # fmt: skip
        path = runs.path(store, run, head=given.head, beta_ratios=(0.3, 0.1, 0.03), refit=True)
        found = finetune(run, images, recipe=Recipe(epochs=given.epochs), seeds=given.seeds)
    for trial in found.trials:
        table.add({
            "backbone": given.backbone, "pixels": given.pixels, "head": given.head, "epochs": given.epochs,
            "start": trial.start, "seed": trial.seed, "classes": len(images.class_names),
            "beta_ratio": path.chosen["beta_ratio"], **found.images,
            "rate": trial.rate, "head_rate": trial.rate * trial.head_rate, "before": f"{trial.before:.4f}",
            "after": f"{trial.after:.4f}", "seconds": f"{trial.seconds:.1f}",
        })  # fmt: skip
        print(trial)


if __name__ == "__main__":
    main()
