"""How much of a comparison of features is the optimiser? The usual linear probes beside the certified optimum.

    python benchmarks/optimiser_noise.py FEATURES [FEATURES ...] [--table NAME] [--seeds N] [--epochs N ...]
                                         [--grid C ...] [--untimed]
    python benchmarks/optimiser_noise.py --figure [--table NAME]

Each FEATURES is ``DATASET/NAME.npz`` with ``X_train (n, d)``, ``y_train (n,)``, the same of val and test, and perhaps
``test_groups (n,)``, samples that belong together; or a token store, whose mean tokens are taken. Features of one
DATASET, the name of the folder, have the same test samples: their order by accuracy is compared.
`probe_features.py` writes those of docs/optimiser-noise.md.

All methods get the same features, standardised on train, and all choices are made on val:

=====================  ===============================================================================================
certified              the optimum to a proven gap of 1e-5, at each C of the grid
certified path         the field's 45 values of C, each to a proven gap of 1e-3, upwards from 1e-6 until three decades
                       bring no better accuracy on val
scikit-learn default   `LogisticRegression` with ``tol=1e-4, max_iter=100`` and float32 features, at each C of the grid
scikit-learn tight     ``tol=1e-8``, no limit of steps, float64, at the C of the grid that the certified head chooses
SGD                    as DINOv2's linear evaluation: 13 rates x batch/256, momentum 0.9, batch 128, cosine, no
                       penalty, start N(0, 0.01²); 10 passes over the data
SGD with L2            the same with the penalty of the certified head's C in the gradient: its objective
AdamW                  three rates, decay 0.01, the same schedule, 20 passes
=====================  ===============================================================================================

``excess`` is that of the objective over a proven lower bound, relative to it, at the row's C: the true one is at most
that. ``difference`` is test accuracy minus that of the certified head at the C that val chooses from the grid, with a
bootstrap interval over the test samples or groups, the same draws for both. Each row is kept at once in
``benchmarks/results/NAME.csv``; what each method gets right is kept in ``--work``, and the same command goes on.
``NAME_order.csv`` has the pairs of features whose order differs. CPU seconds, one thread.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

import convexhead as ch
from common import Row, Table, hardware, read_csv, write_csv
from convexhead.experiments.splits import splits_of_store
from convexhead.path import best
from convexhead.report import drawing
from convexhead.runtime.clock import count_processor_time
from linear_head import PATH, objective, timed_on_cpu

GRID = (1e-3, 1e-2, 0.1, 1.0)
DINO_RATES = (*(k * 10.0**e for e in range(-5, -1) for k in (1, 2, 5)), 0.1)
ADAMW_RATES, ADAMW_DECAY, ADAMW_EPOCHS = (1e-4, 1e-3, 1e-2), 0.01, 20
BATCH = 128
PATIENCE = 12
"""Values of C in a row without a better accuracy on val, after which the path ends: three decades."""
DRAWS = 1000
"""Of the bootstrap."""
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "optimiser-noise.svg"
Array = NDArray[Any]


@dataclass
class Features:
    """Standardised features, labels ``0 .. c-1`` (-1: a class that train lacks), and which test samples go together."""

    dataset: str
    name: str
    X: dict[str, Array]
    y: dict[str, Array]
    groups: Array

    @classmethod
    def read(cls, path: Path) -> Features:
        """From an .npz file or a token store."""
        if path.suffix == ".npz":
            arrays = dict(np.load(path))
        else:
            splits = splits_of_store(ch.TokenStore.open(path))
            parts = {"train": splits.train, "val": splits.validation, "test": splits.load_test()}
            arrays = {f"X_{name}": part.mean_tokens() for name, part in parts.items()}
            arrays |= {f"y_{name}": part.labels for name, part in parts.items()}
        splits_of = ("train", "val", "test")
        scaler = StandardScaler().fit(arrays["X_train"].astype(np.float64))
        classes = np.unique(arrays["y_train"])
        place = {label: k for k, label in enumerate(classes.tolist())}
        return cls(
            path.resolve().parent.name,
            path.stem,
            {name: scaler.transform(arrays[f"X_{name}"].astype(np.float64)) for name in splits_of},
            {name: np.array([place.get(each, -1) for each in arrays[f"y_{name}"].tolist()]) for name in splits_of},
            np.unique(arrays.get("test_groups", np.arange(len(arrays["y_test"]))), return_inverse=True)[1],
        )

    @property
    def classes(self) -> int:
        return int(self.y["train"].max()) + 1

    def beta(self, C: float) -> float:
        """scikit-learn's ``C`` as β. Of two classes it has one row of weights, whose penalty is twice that of ours."""
        return (2 if self.classes == 2 else 1) / (len(self.y["train"]) * C)

    def right(self, split: str, W: Array, b: Array) -> Array:
        """Whether each sample is classified right by ``W (d, c)``, ``b (c,)``."""
        return (self.X[split] @ W + b).argmax(1) == self.y[split]


# -- the methods ------------------------------------------------------------------------------------------------------
def certified_path(f: Features, Cs: Sequence[float], tol: float, patience: int | None = None) -> list[Row]:
    """Certified heads at each C, as rows of `convexhead.regularization_path`."""
    parameters = {"head": "linear", "fit_intercept": True, "random_state": 0, "device": "cpu"}
    held_out = {"X_val": f.X["val"], "y_val": f.y["val"]}
    return ch.regularization_path(
        f.X["train"], f.y["train"], Cs=Cs, patience=patience, tol=tol, **held_out, **parameters
    )


def by_sklearn(f: Features, C: float, dtype: type, **options: Any) -> tuple[Array, Array, int]:
    """Weights ``(d, c)``, intercept ``(c,)`` and steps."""
    model = LogisticRegression(C=C, **options).fit(f.X["train"].astype(dtype), f.y["train"])
    W, b = model.coef_.T.astype(np.float64), model.intercept_.astype(np.float64)
    if W.shape[1] == 1:  # two classes have one row of weights there, the difference of their logits
        W, b = np.hstack([-W, W]) / 2, np.concatenate([-b, b]) / 2
    return W, b, int(model.n_iter_.max())


def by_steps(
    f: Features, optimizer: Callable[..., torch.optim.Optimizer], rates: Sequence[float], decay: float, epochs: int,
    seed: int,
) -> tuple[Array, Array]:  # fmt: skip
    """Heads for each of ``rates`` side by side on the same batches: weights ``(k, d, c)``, intercepts ``(k, c)``."""
    X, y = torch.from_numpy(f.X["train"]).float(), torch.from_numpy(f.y["train"])
    (n, d), c, k = X.shape, f.classes, len(rates)
    generator = torch.Generator().manual_seed(seed)
    W, b = 0.01 * torch.randn(k, d, c, generator=generator), torch.zeros(k, c)
    at_W, at_b = torch.empty_like(W), torch.empty_like(b)
    groups: list[dict[str, Any]] = []
    for i, rate in enumerate(rates):
        weight, bias = W[i], b[i]
        weight.grad, bias.grad = at_W[i], at_b[i]
        groups += [{"params": [weight], "lr": rate, "weight_decay": decay}, {"params": [bias], "lr": rate}]
    steps = optimizer(groups, weight_decay=0.0)
    size = min(BATCH, n)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(steps, epochs * (n // size))
    for _ in range(epochs):
        for rows in torch.randperm(n, generator=generator).split(size):
            if len(rows) < size:
                continue
            R = _residual(X[rows] @ W + b.unsqueeze(1), y[rows])
            torch.matmul(X[rows].T, R, out=at_W)
            torch.sum(R, 1, out=at_b)
            steps.step()
            schedule.step()
    return W.double().numpy(), b.double().numpy()


def _residual(outputs: Tensor, y: Tensor) -> Tensor:
    """The gradient ``(k, n, c)`` of the mean cross-entropy with respect to the outputs."""
    R = torch.softmax(outputs, 2)
    R[:, torch.arange(len(y)), y] -= 1
    return R.div_(len(y))


# -- rows -------------------------------------------------------------------------------------------------------------
@dataclass
class Measured:
    """The rows of one set of features, and what is right on its test samples."""

    features: Features
    table: Table
    work: Path
    timed: bool = True

    def key(self, method: str, C: float, seed: int | str = "") -> Row:
        return {"dataset": self.features.dataset, "features": self.features.name, "method": method, "C": f"{C:.4g}",
                "seed": seed}  # fmt: skip

    def rows(self, method: str) -> list[Row]:
        about = {"dataset": self.features.dataset, "features": self.features.name}
        return list(self.table.where(**about, method=method))

    def done(self, **key: Any) -> bool:
        return self.table.has(**key) and _file(self.work, key).exists()

    def add(self, key: Row, W: Array, b: Array, bound: float, **about: Any) -> None:
        """Score and keep a fit; ``bound`` is a proven lower bound on the objective at the key's C."""
        f = self.features
        value = objective(W, b, f.X["train"], f.y["train"], f.beta(float(key["C"])))
        right = f.right("test", W, b)
        row = {
            "n": len(f.y["train"]), "d": W.shape[0], "classes": W.shape[1], **about,
            "objective": f"{value:.8g}", "bound": f"{bound:.8g}", "excess": f"{value / bound - 1:.3g}",
            "val_accuracy": f"{f.right('val', W, b).mean():.5f}", "test_accuracy": f"{right.mean():.5f}",
        }  # fmt: skip
        self.work.mkdir(parents=True, exist_ok=True)
        if key["method"] != "certified":
            reference = np.load(_file(self.work, chosen(self.rows("certified"))))
            low, high = np.quantile(np.diff(draws(f.groups, [reference, right]), axis=0), [0.025, 0.975])
            difference = right.mean() - reference.mean()
            row |= {"difference": f"{difference:.5f}", "low": f"{low:.5f}", "high": f"{high:.5f}"}
        np.save(_file(self.work, key), right)
        if not self.timed:
            del row["seconds"]
        self.table.add({**key, **row})
        print("  ".join(f"{name}={value}" for name, value in {**key, **row}.items()), flush=True)


def _file(work: Path, key: Row) -> Path:
    """Where it is kept what a fit gets right."""
    names = (str(key.get(name, "")).replace(" ", "-") for name in ("dataset", "features", "method", "C", "seed"))
    return work / f"{'--'.join(names)}.npy"


def chosen(rows: Sequence[Row]) -> Row:
    """The row that val chooses; among equals that of the smallest C."""
    return max(rows, key=lambda row: (float(row["val_accuracy"]), -float(row["C"])))


def draws(groups: Array, right: Sequence[Array], seed: int = 0) -> Array:
    """Accuracies ``(k, DRAWS)`` of ``k`` methods on the same draws of groups with replacement."""
    sizes = np.bincount(groups)
    times = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), DRAWS)
    return np.stack([times @ np.bincount(groups, weights=each) for each in right]) / (times @ sizes)


def measure(measured: Measured, *, seeds: int, epochs: Sequence[int], grid: Sequence[float] = GRID) -> None:
    """All methods on one set of features, those that are not there yet."""
    f = measured.features
    if not all(measured.done(**measured.key("certified", C)) for C in grid):
        seconds, rows = timed_on_cpu(partial(certified_path, f, grid, 1e-5))
        for row in rows:
            model = row["model"]
            about = {"seconds": f"{row['seconds']:.4g}", "settings": f"gap {row['relative_gap']:.1e}"}
            measured.add(measured.key("certified", row["C"]), model.coef_, model.intercept_, row["dual"], **about)
        print(f"{seconds:.1f} s for {len(rows)} values of C", flush=True)
    reference = chosen(measured.rows("certified"))
    bounds = {row["C"]: float(row["bound"]) for row in measured.rows("certified")}

    def fit(method: str, C: float, dtype: type, **options: Any) -> None:
        key = measured.key(method, C)
        if not measured.done(**key):
            seconds, (W, b, steps) = timed_on_cpu(partial(by_sklearn, f, C, dtype, **options))
            measured.add(key, W, b, bounds[key["C"]], seconds=f"{seconds:.4g}", settings=f"{steps} steps")

    for C in grid:
        fit("scikit-learn default", C, np.float32)
    fit("scikit-learn tight", float(reference["C"]), np.float64, tol=1e-8, max_iter=100_000)

    sgd, C = partial(torch.optim.SGD, momentum=0.9), float(reference["C"])
    scaled = [rate * BATCH / 256 for rate in DINO_RATES]
    ways = [(f"SGD, {each} epochs", sgd, DINO_RATES, scaled, 0.0, each) for each in epochs]
    ways += [(f"SGD with L2, {each} epochs", sgd, DINO_RATES, scaled, f.beta(C), each) for each in epochs[:1]]
    ways += [("AdamW", torch.optim.AdamW, ADAMW_RATES, list(ADAMW_RATES), ADAMW_DECAY, ADAMW_EPOCHS)]
    for method, optimizer, names, rates, decay, passes in ways:
        for seed in range(seeds):
            key = measured.key(method, C, seed)
            if measured.done(**key):
                continue
            seconds, (W, b) = timed_on_cpu(partial(by_steps, f, optimizer, rates, decay, passes, seed))
            accuracy = [float(f.right("val", *head).mean()) for head in zip(W, b, strict=True)]
            k = int(np.argmax(accuracy))
            told = f"rate {names[k]:g}" + (" (edge of the grid)" if k in (0, len(names) - 1) else "")
            measured.add(key, W[k], b[k], bounds[key["C"]], seconds=f"{seconds:.4g}", settings=told)
    path = measured.rows("certified path")
    if not (path and _file(measured.work, path[-1]).exists()):
        seconds, rows = timed_on_cpu(partial(certified_path, f, PATH, 1e-3, PATIENCE))
        row = best(rows)
        told = f"{len(rows)} values, largest gap {max(row['relative_gap'] for row in rows):.1e}"
        measured.add(measured.key("certified path", row["C"]), row["model"].coef_, row["model"].intercept_,
                     row["dual"], seconds=f"{seconds:.4g}", settings=told)  # fmt: skip


# -- order ------------------------------------------------------------------------------------------------------------
def orders(table: Table, all_features: Sequence[Features], work: Path) -> list[Row]:
    """Of each dataset and method: the pairs of features whose order by test accuracy is not that of the optimum."""
    found = []
    for dataset in dict.fromkeys(f.dataset for f in all_features):
        some = [f for f in all_features if f.dataset == dataset]
        if any(not np.array_equal(f.y["test"], some[0].y["test"]) for f in some):
            raise SystemExit(f"the features of {dataset} have other test labels: put other data into another folder")
        rows = [row for row in table.where(dataset=dataset) if row["features"] in {f.name for f in some}]
        for method in dict.fromkeys(row["method"] for row in rows):
            wheres = [("chosen on val", "certified")] + [("C = 1", "certified")] * (method == "scikit-learn default")
            for where, truth in wheres:
                mine, theirs = (_right(rows, some, each, where, work) for each in (method, truth))
                if len(some) > 1 and mine:
                    found.append(
                        {"dataset": dataset, "method": method, "where": where, **_order(some[0].groups, mine, theirs)}
                    )
    return found


def _right(rows: Sequence[Row], some: Sequence[Features], method: str, where: str, work: Path) -> list[list[Array]]:
    """What a method gets right on each of the features, one array a seed; at one C, or at the C that val chooses."""
    right = []
    for f in some:
        mine = [row for row in rows if (row["features"], row["method"]) == (f.name, method)]
        mine = [row for row in mine if where != "C = 1" or float(row["C"]) == 1]
        seeds = dict.fromkeys(row.get("seed", "") for row in mine)
        kept = [chosen([row for row in mine if row.get("seed", "") == seed]) for seed in seeds]
        right.append([np.load(_file(work, row)) for row in kept])
    return right if all(right) else []


def _order(groups: Array, mine: list[list[Array]], theirs: list[list[Array]]) -> Row:
    """Pairs whose order differs, a mean over seeds with an interval, and those of them that the optimum separates."""
    truth = draws(groups, [each[0] for each in theirs])
    exact = np.array([each[0].mean() for each in theirs])
    pairs = list(combinations(range(len(mine)), 2))
    low, high = np.quantile([truth[i] - truth[j] for i, j in pairs], [0.025, 0.975], axis=1)
    clear = (low > 0) | (high < 0)
    flipped, resampled = [], []
    for seed in range(min(map(len, mine))):
        accuracy = np.array([each[seed].mean() for each in mine])
        drawn = draws(groups, [each[seed] for each in mine])
        flipped.append([(accuracy[i] - accuracy[j]) * (exact[i] - exact[j]) < 0 for i, j in pairs])
        resampled.append([(drawn[i] - drawn[j]) * (truth[i] - truth[j]) < 0 for i, j in pairs])
    share = np.mean(resampled, axis=(0, 1))
    apart = [abs(each.mean() - right[0].mean()) for right, runs in zip(theirs, mine, strict=True) for each in runs]
    return {
        "pairs": len(pairs), "seeds": len(flipped), "flips": f"{np.mean(np.sum(flipped, 1)):.3g}",
        "flips_low": f"{len(pairs) * np.quantile(share, 0.025):.3g}",
        "flips_high": f"{len(pairs) * np.quantile(share, 0.975):.3g}", "clear_pairs": int(clear.sum()),
        "clear_flips": f"{np.mean(np.sum(np.array(flipped) & clear, 1)):.3g}",
        "largest_difference": f"{max(apart):.4f}",
    }  # fmt: skip


# -- figure -----------------------------------------------------------------------------------------------------------
MARKS = {
    "scikit-learn default": ("#d55e00", "o"), "scikit-learn tight": ("#0072b2", "s"),
    "SGD, 10 epochs": ("#009e73", "^"), "SGD, 50 epochs": ("#e69f00", "v"),
    "SGD with L2, 10 epochs": ("#cc79a7", "D"), "AdamW": ("#56b4e9", "X"),
}  # fmt: skip


def draw(rows: Sequence[Row]) -> None:
    """A line of dots for each set of features: how far objectives are above the optimum, and accuracies from it."""
    names = list(dict.fromkeys((row["dataset"], row["features"]) for row in rows))
    methods = [method for method in MARKS if any(row["method"] == method for row in rows)]
    with drawing.new_figure((7.2, 0.9 + 0.3 * len(names))) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for line, name in enumerate(names):
            mine = [row for row in rows if (row["dataset"], row["features"]) == name]
            certain = chosen([row for row in mine if row["method"] == "certified"])
            for k, method in enumerate(methods):
                color, mark = MARKS[method]
                some = [row for row in mine if row["method"] == method]
                at = [row for row in some if row["C"] == certain["C"]]
                y = line + 0.6 * (k / max(1, len(methods) - 1) - 0.5)
                style = {"color": color, "marker": mark, "markersize": 4, "linestyle": "none", "alpha": 0.8}
                left.plot([max(1e-6, float(row["excess"])) for row in at], [y] * len(at), **style)
                kept = [chosen([row for row in some if row.get("seed", "") == seed])
                        for seed in dict.fromkeys(row.get("seed", "") for row in some)]  # fmt: skip
                points = np.array(
                    [[100 * float(row[key]) for key in ("low", "difference", "high")] for row in kept]
                ).reshape(-1, 3)
                right.plot(points[:, 1], [y] * len(kept), **style)
                right.hlines([y] * len(kept), points[:, 0], points[:, 2], color=color, lw=0.6, alpha=0.6)
        left.set_yticks(range(len(names)), [" ".join(name) for name in names])
        left.set(xscale="log", xlabel="excess of the objective, same C", ylim=(len(names) - 0.5, -0.5))
        drawing.log_ticks(left.xaxis, drawing.percent, numticks=5)
        right.set_xlabel("test accuracy minus the optimum's, points")
        right.axvline(0, color=drawing.INK, lw=0.8)
        entries = [(name, {"color": MARKS[name][0], "marker": MARKS[name][1], "linestyle": "none"}) for name in methods]
        drawing.legend(figure, entries, 3)
        FIGURE.write_text(drawing.svg(figure, background="white"))


def run(paths: Sequence[Path], name: str, work: Path, *, timed: bool = True, **options: Any) -> None:
    """Measure all features, and write both tables."""
    machine = {**hardware("scikit-learn", clock=time.process_time), "clock": "CPU seconds"}
    table = Table(name, ("dataset", "features", "method", "C", "seed"), machine)
    all_features = [Features.read(path) for path in paths]
    torch.optim.SGD([torch.zeros(1)], lr=1.0).step()  # the first one imports for a second
    for f in all_features:
        measure(Measured(f, table, work, timed), **options)
    others = [row for row in read_csv(f"{name}_order") if row["dataset"] not in {f.dataset for f in all_features}]
    if rows := others + orders(table, all_features, work):
        write_csv(f"{name}_order", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", nargs="*", type=Path)
    parser.add_argument("--table", default="optimiser_noise")
    parser.add_argument("--work", type=Path, default=Path("optimiser-noise"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, nargs="+", default=[10], help="of SGD; the first with L2 too")
    parser.add_argument("--grid", type=float, nargs="+", default=list(GRID), metavar="C")
    parser.add_argument("--untimed", action="store_true", help="leave seconds out: others use the machine")
    parser.add_argument("--figure", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    torch.set_num_threads(1)
    threadpool_limits(1)
    count_processor_time()
    if args.features:
        options = {"seeds": args.seeds, "epochs": args.epochs, "grid": args.grid, "timed": not args.untimed}
        run(args.features, args.table, args.work, **options)
    if args.figure:
        draw(read_csv(args.table))


if __name__ == "__main__":
    main()
