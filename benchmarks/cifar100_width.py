"""What a usual number of heads costs: Adam with 20 at the β and on the tokens of a certified head that has more.

    python benchmarks/cifar100_width.py --tokens STORE [--atoms 20] [--head mlp fno block-fno] --work RUN

STORE holds tokens of CIFAR-100, as for `convexhead cifar100 --tokens`; RUN is a folder that keeps what is finished.
Linear heads, every learning rate of the experiment, one seed. Rows: benchmarks/results/cifar100_10k_width.csv, about
15 minutes of one core for the three heads.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import convexhead as ch
from common import Row, Table, hardware
from convexhead.experiments.cells import Cell, fit_path, train_with_adam
from convexhead.experiments.cifar100 import SCALES
from convexhead.experiments.splits import Splits, chosen_splits
from convexhead.program.heads import HEADS
from convexhead.runtime.run_folder import Piece, RunFolder

SCALE = SCALES["10k"]


def rows(splits: Splits, folder: RunFolder, cell: Cell, atoms: int) -> list[tuple[Piece, Piece]]:
    """Runs of Adam, each with the convex head's piece."""
    path = folder.once(f"{cell.name}/path", lambda: fit_path(splits, SCALE.path, cell, folder))
    (adam,) = train_with_adam(splits, replace(SCALE.adam, heads=(atoms,), seeds=(0,)), cell, folder)
    return [(path, run) for run in adam.tuned.tried]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", required=True, type=Path)
    parser.add_argument("--atoms", type=int, default=20)
    parser.add_argument("--head", nargs="*", choices=list(HEADS), default=["mlp", "fno", "block-fno"])
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    splits, folder = chosen_splits(ch.TokenStore.open(args.tokens), SCALE.images), RunFolder(args.work)
    folder.begin({"atoms": args.atoms, "data": splits.identity})
    key = ("backbone", "train", "head", "activation", "heads", "learning_rate", "seed")
    table = Table("cifar100_10k_width", key, hardware(), again=args.again)
    for head in args.head:
        for path, run in rows(splits, folder, Cell(head, "linear"), args.atoms):

            def row(path: Piece = path, run: Piece = run) -> Row:
                best = path.record["certificate"]["primal"]
                return {
                    "beta": path.record["beta"],
                    "objective": run.record["objective"],
                    "certified_optimum_above": path.record["certificate"]["dual"],
                    "excess": (run.record["objective"] - best) / best,
                    "validation_accuracy": run.record["validation_accuracy"],
                    "convex_heads": path.record["heads"],
                    "convex_validation_accuracy": path.record["validation_accuracy"],
                    "seconds": run.record["seconds"],
                }

            where = {"backbone": splits.backbone, "train": len(splits.train.labels), "head": head}
            where |= {"activation": "linear", "heads": args.atoms}
            table.run(row, **where, learning_rate=run.record["learning_rate"], seed=run.record["seed"])


if __name__ == "__main__":
    main()
