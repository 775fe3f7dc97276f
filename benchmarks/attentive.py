"""Certified attentive heads on CIFAR-100 beside what they compete with, everything chosen on validation images.

    python benchmarks/attentive.py STORE --scale 2k --work RUN [--only certified self-attention …] [--minutes 7]
    python benchmarks/attentive.py STORE --scale 2k --work RUN --counts       # numbers of queries and seeds, a figure

The rows of 10k are those of ``--choose metric --choose-on 4 --choose-with 512 --patience 2 --queries 256 512 1024
--seeds 3 --rates 0.003 0.01 --only self-attention mlp-mixer probe trained-1 trained-4 trained-16 trained-64 found`` on
block 4 of EfficientNet-Lite0, without 1024 on block 8 of the transformer; with ``--choose-with 96 --queries 32 96 256``
and one draw on Lite0's last map. Those of the transformer's last tokens, and older ones of inner tokens, chose scale
and places too, some on all images. The row of full is that of ``--settings 0.5 2 places --queries 256 --only none
--patience 2``.

STORE holds tokens of CIFAR-100, as for `convexhead cifar100 --tokens`. Images, validation part, pooling, principal
components and standardisation are those of the experiment's scale (`convexhead.experiments.cifar100.SCALES`). RUN keeps
what is finished. After ``--minutes`` nothing new begins, families that are finished are written, and the same command
goes on. What is chosen on the validation images:

certified       metric of the tokens, then scale of the queries, then content alone or places too (with
                ``--choose-with`` queries, unless ``--settings`` says what was chosen before; with ``--choose metric``
                the metric alone, as of the heads below); for every number of queries β, on a path that ends after
                ``--patience`` fits in a row without a better score. With ``--choose-on 4`` the first three are chosen
                by paths on every fourth training image, over every second β, which stop at ``SEARCH_TOL``
self-attention, mlp-mixer
                metric and β
trained-J       J queries, log-weights of places, values and classifier by AdamW, from the queries that the certified
                head samples and on its tokens; learning rate and weight decay, then two more seeds
probe           the attentive probe of the experiment (16 queries on standardised tokens), tuned in the same way
found           nothing: queries that a search finds within a minute in four directions, at β/β_max = 0.1

Test images choose nothing. Differences are to the certified head whose number of queries validation chooses, over the
same test images, with 95% intervals of a paired bootstrap. Seconds are of the processor, since other work may share the
machine. Rows: results/attentive.csv, results/attentive_queries.csv.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

import convexhead as ch
from common import Row, hardware, read_csv, write_csv
from convexhead.baselines.adam import train_adam
from convexhead.baselines.attentive_probe import OPTIONS, AttentiveProbe, train_attentive_probe
from convexhead.experiments.cells import finite, network_scores, top
from convexhead.experiments.cifar100 import SCALES
from convexhead.experiments.splits import Part, Splits, chosen_splits
from convexhead.experiments.tuning import Tuned, tune
from convexhead.fitting import pose
from convexhead.path import best
from convexhead.report import drawing
from convexhead.runtime.run_folder import Piece, RunFolder
from convexhead.tokens import whitened

METRICS, QUERY_SCALES = (0.5, 0.0, 1.0), (2.0, 1.0, 4.0)
RATIOS = (0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005)
SEARCH_TOL = 0.02
SAMPLED, CHOSEN_WITH, TRAINED = (32, 96, 256), 96, (1, 4, 16, 64)
COUNTS, SEEDS = (8, 32, 96, 192, 512, 1024), range(5)
ATOMS = 64
"""Of the networks with trained queries, at most; the certified heads have fewer."""
RESAMPLES = 10_000
FOUND_RATIO = 0.1
FOUND = {"queries": "search", "key_dim": 4, "max_time": 60.0}
COUNTED = ("beta_ratio", "heads", "gap", "validation_accuracy", "test_accuracy", "cpu_seconds", "fits")
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "attentive-queries.svg"
Data = dict[str, tuple[np.ndarray, np.ndarray]]
Found = tuple[str, list[Piece], list[Piece]]
"""The name of a row, the chosen runs, and all that were run to choose them."""


class OutOfTime(Exception):
    """The same command goes on."""


class Work:
    """Pieces of one store and scale, made once.

    Parameters
    ----------
    splits : Splits
    folder : RunFolder
    options : argparse.Namespace
        Of the command line.
    """

    def __init__(self, splits: Splits, folder: RunFolder, options: argparse.Namespace) -> None:
        self.splits, self.folder, self.options = splits, folder, options
        self.adam = SCALES[options.scale].adam
        self.data = cache(self._data)
        self._end = time.monotonic() + 60 * options.minutes

    def _data(self, whiten: float) -> Data:
        """Tokens in one metric; they are read from the store once."""
        file = self.folder.path / f"tokens-{whiten:g}.npz"
        if not file.exists():
            train = whitened(self.splits.train.tokens, whiten)
            parts = {"validation": self.splits.validation, "test": self.splits.load_test()}
            arrays = {name: part.tokens.reduced(train.reduction).read() for name, part in parts.items()}
            arrays |= {f"{name} labels": part.labels for name, part in parts.items()}
            part_file = file.with_suffix(f".{os.getpid()}.npz")
            np.savez(part_file, **{"train": train.read(), "train labels": self.splits.train.labels}, **arrays)
            part_file.replace(file)
        read = np.load(file)
        return {name: (read[name], read[f"{name} labels"]) for name in ("train", "validation", "test")}

    def once(self, name: str, make: Callable[[], Piece]) -> Piece:
        """The piece, unless it is late to make it."""

        def made() -> Piece:
            if time.monotonic() > self._end:
                raise OutOfTime
            began = time.process_time()
            piece = make()
            piece.record["cpu_seconds"] = time.process_time() - began
            print(name, piece.record, flush=True)
            return piece

        return self.folder.once(name, made)

    # -- certified heads ----------------------------------------------------------------------------------------------
    def certified(self, name: str, whiten: float, every: int = 1, **options: Any) -> Piece:
        """A path over β on all training images, or one ``every`` so many; the best head goes on to its certificate."""
        data = dict(self.data(whiten))
        data["train"] = tuple(part[::every] for part in data["train"])  # by class, so that all have their part
        settings = {"beta_ratios": RATIOS, "patience": self.options.patience, "tol": self.options.tol}
        if every > 1:
            settings |= {"beta_ratios": RATIOS[1::2], "tol": SEARCH_TOL}

        def make() -> Piece:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                rows = ch.regularization_path(
                    *data["train"], X_val=data["validation"][0], y_val=data["validation"][1],
                    search_tol=SEARCH_TOL, grid=self.splits.grid, **settings | options,
                )  # fmt: skip
            row = best(rows)
            return self.scored(row["model"], row["beta_ratio"], whiten, len(rows), options)

        return self.once(name, make)

    def found(self, ratio: float, whiten: float, **options: Any) -> Piece:
        """A search at one β."""

        def make() -> Piece:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                clf = ch.ConvexHeadClassifier(
                    "attentive",
                    beta_ratio=ratio,
                    tol=self.options.tol,
                    grid=self.splits.grid,
                    random_state=0,
                    **options,
                )
                clf.fit(*self.data(whiten)["train"])
            return self.scored(clf, ratio, whiten, 1, options)

        return self.once(f"found-{ratio:g}-{named(whiten, **options)}", make)

    def scored(self, model: Any, ratio: float, whiten: float, fits: int, options: dict[str, Any]) -> Piece:
        data, certificate = self.data(whiten), model.certificate_
        right = model.predict(data["test"][0]) == data["test"][1]
        record = {
            "whiten": whiten,
            **{key: options[key] for key in ("query_scale", "query_position", "query_norm") if key in options},
            "queries": None if model.queries_ is None else len(model.queries_),
            "beta_ratio": ratio,
            "heads": model.n_heads_,
            "gap": certificate.relative_gap if certificate.estimated_gap is None else certificate.estimated_gap,
            "scope": certificate.scope,
            "validation_accuracy": model.score(*data["validation"]),
            "test_accuracy": float(right.mean()),
            "fits": fits,
        }
        return Piece(record, {"right": torch.from_numpy(right)})

    # -- trained by AdamW ---------------------------------------------------------------------------------------------
    def trained(self, count: int, whiten: float, options: dict[str, Any]) -> Tuned:
        """Networks whose queries start at the sampled ones of the certified head."""
        data = self.data(whiten)
        settings = {**options, "n_queries": count, "random_state": 0, "grid": self.splits.grid, "beta_ratio": 0.1}
        problem = cache(lambda: pose(ch.ConvexHeadClassifier("attentive", **settings), *data["train"]).problem)
        atoms, c = ATOMS, len(self.splits.class_names)

        def run(lr: float, decay: float, seed: int) -> Piece:
            result = train_adam(
                problem(), decay, n_heads=min(atoms, data["train"][0].shape[2], c), lr=lr, epochs=self.adam.epochs,
                batch_size=self.adam.batch_size, seed=seed, weight_decay_mode="decoupled", train_queries=True,
            )  # fmt: skip
            about = {"whiten": whiten, "queries": count, "learning_rate": lr, "weight_decay": decay}
            return self.network(result.module, data, about, result.objective)

        return self.tuned(f"trained-{count}-{named(whiten, **options)}", run)

    def probe(self) -> Tuned:
        """The experiment's attentive probe."""
        data = self.data(0.0)
        splits = replace(self.splits, train=Part(*data["train"]), validation=Part(*data["validation"]))

        def run(lr: float, decay: float, seed: int) -> Piece:
            piece = train_attentive_probe(
                splits, lr=lr, weight_decay=decay, epochs=self.adam.epochs, batch_size=self.adam.batch_size, seed=seed
            )
            network = AttentiveProbe.restored(piece.tensors)
            about = {"whiten": 0.0, "queries": len(network.queries), "learning_rate": lr, "weight_decay": decay}
            return self.network(network, data, about, piece.record["objective"])

        return self.tuned("probe", run)

    def network(self, network: torch.nn.Module, data: Data, about: Row, objective: float | None) -> Piece:
        classes = np.unique(data["train"][1])
        scores = network_scores(network, data["validation"][0])
        right = classes[network_scores(network, data["test"][0]).argmax(1)] == data["test"][1]
        objective = None if objective is None else finite(objective)
        record = {**about, "objective": objective, "validation_accuracy": top(scores, classes, data["validation"][1])}
        return Piece(record, {"right": torch.from_numpy(right)})

    def tuned(self, name: str, run: Callable[[float, float, int], Piece]) -> Tuned:
        """Learning rate and weight decay with one seed, the best with two more."""
        return tune(
            self,  # type: ignore[arg-type]  # of the folder only `once` is used
            [option for option in OPTIONS if option[0] in self.options.rates],
            (0, 1, 2),
            tuning_seeds=1,
            name=lambda option: f"{name}-lr{option[0]:g}-decay{option[1]:g}",
            run=lambda option, seed: run(*option, seed),
        )


def named(whiten: float, *, query_scale: float, query_position: bool, **_: Any) -> str:
    """Settings in the name of a piece."""
    return f"whiten{whiten:g}-scale{query_scale:g}-{'places' if query_position else 'content'}"


def sampled(
    work: Work, count: int, whiten: float, scale: float, places: bool, norm: str = "all", seed: int = 0, every: int = 1
) -> Piece:
    """A certified head with sampled queries."""
    options = {"n_queries": count, "query_scale": scale, "query_position": places, "query_norm": norm}
    name = f"certified-{count}-{named(whiten, **options)}-{norm}-seed{seed}"
    name += "" if every == 1 else f"-every{every}"
    return work.certified(name, whiten, every, head="attentive", random_state=seed, **options)


def choose_settings(work: Work) -> tuple[tuple[float, float, bool], list[Piece]]:
    """Metric, scale and places that validation chooses one after the other, and all fits on the way."""
    if work.options.settings:
        whiten, scale, places = work.options.settings
        return (float(whiten), float(scale), places == "places"), []
    tried: dict[tuple[float, float, bool], Piece] = {}

    def score(*settings: Any) -> float:
        tried[settings] = sampled(work, work.options.choose_with, *settings, every=work.options.choose_on)
        return validation(tried[settings])

    whiten = max(work.options.metrics, key=lambda a: score(a, QUERY_SCALES[0], True))
    if work.options.choose == "metric":
        return (whiten, QUERY_SCALES[0], True), list(tried.values())
    scale = max(QUERY_SCALES, key=lambda kappa: score(whiten, kappa, True))
    places = max((True, False), key=lambda both: score(whiten, scale, both))
    return (whiten, scale, places), list(tried.values())


def validation(piece: Piece) -> float:
    """Its accuracy on the validation images."""
    return float(piece.record["validation_accuracy"])


# -- rows -------------------------------------------------------------------------------------------------------------
def described(name: str, runs: list[Piece], tried: list[Piece]) -> Row:
    """One row: the chosen runs, and what choosing cost. ``right`` is the share of runs that are right on an image."""
    record = runs[0].record
    right = torch.stack([piece.tensors["right"] for piece in runs]).double()
    columns = (
        "queries", "whiten", "query_scale", "query_position", "query_norm", "beta_ratio", "learning_rate",
        "weight_decay", "heads", "gap", "scope",
    )  # fmt: skip
    return {
        "row": name,
        **{key: record.get(key, "") for key in columns},
        "validation": round(float(np.mean([piece.record["validation_accuracy"] for piece in runs])), 4),
        "test": round(float(right.mean()), 4),
        "test_sd": round(float(right.mean(1).std()), 4) if len(runs) > 1 else "",
        "cpu_seconds": round(record["cpu_seconds"], 1),
        "cpu_seconds_with_choice": round(sum(piece.record["cpu_seconds"] for piece in tried), 1),
        "fits": sum(piece.record.get("fits", 1) for piece in tried),
        "right": right.mean(0).numpy(),
    }


def with_differences(rows: list[Row], of: str = "certified") -> list[Row]:
    """Rows with their distance from the one named ``of`` that validation chooses; not the shares themselves."""
    named = (row for row in rows if row["row"] == of)
    reference = max(named, key=lambda row: row["validation"])["right"]
    draws = np.random.default_rng(0).integers(len(reference), size=(RESAMPLES, len(reference)))
    for row in rows:
        difference = reference - row.pop("right")
        if difference.any():
            low, high = np.quantile(difference[draws].mean(1), (0.025, 0.975))
            row |= {f"{of}_ahead": round(difference.mean(), 4), "low": round(low, 4), "high": round(high, 4)}
    return rows


def families(work: Work) -> dict[str, Callable[[], list[Found]]]:
    """What there is to run: the rows of each family."""
    chosen, tried = choose_settings(work)
    whiten, scale, places = chosen
    options = {"query_scale": scale, "query_position": places}

    def certified() -> list[Found]:
        seeds = range(work.options.seeds)
        fits = [[sampled(work, count, *chosen, seed=seed) for seed in seeds] for count in work.options.queries]
        return [
            ("certified", runs, [*(piece for piece in tried if piece.name != runs[0].name), runs[0]]) for runs in fits
        ]

    def each() -> list[Found]:
        fit = sampled(work, SAMPLED[0], *chosen, norm="each")
        return [("certified, a norm for each", [fit], [fit])]

    def other(head: str) -> list[Found]:
        fits = [work.certified(f"{head}-whiten{a:g}", a, head=head, random_state=0) for a in work.options.metrics]
        return [(head, [max(fits, key=validation)], fits)]

    def of(name: str, tuned: Tuned) -> list[Found]:
        return [(name, tuned.runs, tuned.tried)]

    def found() -> list[Found]:
        fit = work.found(FOUND_RATIO, whiten, **FOUND, **options)
        return [("queries found", [fit], [fit])]

    return {
        "certified": certified,
        "each": each,
        **{head: partial(other, head) for head in ("self-attention", "mlp-mixer")},
        "probe": lambda: of("attentive probe, AdamW", work.probe()),
        **{
            f"trained-{count}": lambda count=count: of("queries trained, AdamW", work.trained(count, whiten, options))  # type: ignore[misc]
            for count in TRAINED
        },
        "found": found,
    }


# -- numbers of queries and seeds -------------------------------------------------------------------------------------
def by_count(work: Work) -> list[Row]:
    """A path over β for every number of queries and every seed, with the settings that validation chose."""
    chosen, _ = choose_settings(work)
    rows = []
    for seed in SEEDS:
        for count in COUNTS:
            try:
                record = sampled(work, count, *chosen, seed=seed).record
            except OutOfTime:
                return rows
            rows.append({"queries": count, "seed": seed, **{key: record[key] for key in COUNTED}})
    return rows


def draw(rows: list[Row], title: str) -> None:
    """Accuracy and time against the number of queries: each seed, and the mean."""
    counts = sorted({int(row["queries"]) for row in rows})
    with drawing.grid(2, columns=2, panel=(3.2, 2.2)) as (figure, (left, right)):
        for ax, key, factor in ((left, "test_accuracy", 100), (right, "cpu_seconds", 1)):
            values = [[factor * float(row[key]) for row in rows if int(row["queries"]) == j] for j in counts]
            for j, many in zip(counts, values, strict=True):
                ax.plot([j] * len(many), many, "o", color=drawing.CONVEX, markersize=3, alpha=0.5, mew=0)
            ax.plot(counts, [float(np.mean(many)) for many in values], color=drawing.CONVEX, linewidth=1)
            ax.set(xscale="log", xlabel="sampled queries")
            ax.set_xticks(counts, [str(j) for j in counts])
            ax.minorticks_off()
        left.set(ylabel="test accuracy, %", title=title)
        right.set(ylabel="processor seconds, path over β", yscale="log")
        drawing.log_ticks(right.yaxis, subs=(1, 2, 5))
        IMAGE.write_text(drawing.svg(figure, background="white"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--scale", choices=list(SCALES), default="2k")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="families beside the certified head")
    parser.add_argument("--metrics", nargs="*", type=float, default=METRICS)
    parser.add_argument("--settings", nargs=3, metavar=("METRIC", "SCALE", "places|content"), help="chosen before")
    parser.add_argument("--choose", choices=("all", "metric"), default="all", help="the others are defaults")
    parser.add_argument("--choose-on", type=int, default=1, metavar="N", help="every N-th training image")
    parser.add_argument(
        "--choose-with", type=int, default=CHOSEN_WITH, metavar="J", help="queries that settings are chosen with"
    )
    parser.add_argument("--queries", nargs="*", type=int, default=SAMPLED)
    parser.add_argument("--seeds", type=int, default=1, help="draws of the queries that a row is the mean of")
    parser.add_argument("--patience", type=int, default=1, help="fits in a row without a better score that end a path")
    parser.add_argument("--rates", nargs="*", type=float, default=sorted({rate for rate, _ in OPTIONS}))
    parser.add_argument("--tol", type=float, default=1e-3, help="of certified heads")
    parser.add_argument("--counts", action="store_true")
    parser.add_argument("--minutes", type=float, default=1e6)
    args = parser.parse_args()
    splits, folder = chosen_splits(ch.TokenStore.open(args.store), SCALES[args.scale].images), RunFolder(args.work)
    folder.begin({"data": splits.identity})
    work = Work(splits, folder, args)
    about = {
        "backbone": splits.backbone,
        "scale": args.scale,
        "train": len(splits.train.labels),
        "patience": args.patience,
        "chosen_on": args.choose_on,
        "chosen_with": args.choose_with,
        "chosen": args.choose,
    }
    name, rows = "attentive_queries" if args.counts else "attentive", []
    if args.counts:
        rows = by_count(work)
        draw(rows, f"{about['train']} images, {splits.backbone.partition(':')[2]}")
    for family, run in ({} if args.counts else families(work)).items():
        if not args.only or family in ("certified", *args.only):
            try:
                rows += [described(*found) for found in run()]
            except OutOfTime:
                print(family, "is not finished: the same command goes on")
    if not args.counts and rows:
        rows = with_differences(rows)
    before = {"patience": 1, "chosen_on": 1, "chosen_with": CHOSEN_WITH, "chosen": "all"}  # of rows that do not say
    keys = ("backbone", "scale", *before)
    mine = [str(about[key]) for key in keys]
    others = [row for row in read_csv(name) if [row.get(key) or str(before.get(key)) for key in keys] != mine]
    machine = hardware("convexhead")
    write_csv(name, [*others, *({**about, **row, **machine} for row in rows)])


if __name__ == "__main__":
    main()
