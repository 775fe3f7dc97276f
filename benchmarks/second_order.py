"""Certified self-attention beside probes on second moments of the tokens, everything chosen on validation images.

    python benchmarks/second_order.py STORE --work RUN [--scale 2k] [--only moments bilinear …]

STORE, RUN, images and their parts are those of `attentive.py`. With ``S = XᵀX/s`` of one image's tokens (64 channels,
one of them constant, so that ``S`` holds their mean ``m``) the rows are

self-attention  certified: ``mᵀ U S V``, nuclear norm
second-order    certified: ``uᵀ S V``, nuclear norm. It is self-attention whose query is a token in front of the others
                that is 0 but for the constant channel
moments         a certified linear head (L2) on the entries of ``S``
bilinear        the same on their signed roots, scaled to length 1 (bilinear pooling, Lin et al., ICCV 2015)
matrix-root     the same on the mean and on the root of the covariance (MPN-COV, Li et al., ICCV 2017)
moment-probe    a linear classifier on the mean and one on convolved cross-covariances of groups of channels, by AdamW
                (after moment probing, Gao et al., ICCV 2023; written from its description)

Chosen are the metric of the tokens and β; for the linear heads also whether features are standardised. The last row is
on standardised tokens; its learning rate and weight decay are chosen, and the best is run with two more seeds.
Differences are those of `attentive.py`, to self-attention. Rows: results/second_order.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import convexhead as ch
from attentive import METRICS, RATIOS, SEARCH_TOL, Data, Found, Work, described, validation, with_differences
from common import hardware, read_csv, write_csv
from convexhead.baselines.attentive_probe import OPTIONS, train_probe
from convexhead.baselines.probes import INVERSE_WEIGHTS
from convexhead.experiments.cifar100 import SCALES
from convexhead.experiments.splits import chosen_splits
from convexhead.experiments.tuning import Tuned
from convexhead.path import best
from convexhead.runtime.run_folder import Piece, RunFolder

GROUPS, WIDTH = 4, 32
"""Groups of channels of the moment probe, and the width of each."""
Array = np.ndarray


def moments(X: Array) -> Array:
    """The entries of ``S`` on and above the diagonal, ``(n, d (d + 1) / 2)``, with the length that ``S`` has."""
    S = np.einsum("nsd,nse->nde", X, X, optimize=True) / X.shape[1]
    rows, columns = np.triu_indices(X.shape[2])
    return S[:, rows, columns] * np.where(rows == columns, 1.0, 2**0.5)


def bilinear(X: Array) -> Array:
    """Signed roots of the same, each image scaled to length 1."""
    entries = moments(X)
    roots = np.sign(entries) * np.sqrt(np.abs(entries))
    return roots / np.linalg.norm(roots, axis=1, keepdims=True)


def matrix_root(X: Array) -> Array:
    """The mean token, and the upper half of the root of the covariance."""
    mean = X.mean(1)
    covariance = np.einsum("nsd,nse->nde", X, X, optimize=True) / X.shape[1] - mean[:, :, None] * mean[:, None]
    values, vectors = np.linalg.eigh(covariance)
    root = np.einsum("nde,ne,nfe->ndf", vectors, np.sqrt(values.clip(0)), vectors, optimize=True)
    rows, columns = np.triu_indices(X.shape[2])
    return np.hstack([mean, root[:, rows, columns] * np.where(rows == columns, 1.0, 2**0.5)])


FEATURES: dict[str, Callable[[Array], Array]] = {"moments": moments, "bilinear": bilinear, "matrix-root": matrix_root}


def with_constant_query(X: Array) -> Array:
    """A token in front of the others that is 0 but for the constant channel, the last one."""
    if not np.allclose(X[:, :, -1], 1):
        raise SystemExit("the last channel must be the constant one")
    query = np.zeros_like(X[:, :1])
    query[:, :, -1] = 1
    return np.concatenate([query, X], axis=1)


class MomentProbe(nn.Module):
    """First and second moments of the tokens, see the text of this file.

    Parameters
    ----------
    n_channels, n_outputs : int
    seed : int
        Of the start.
    """

    def __init__(self, n_channels: int, n_outputs: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mean = nn.Linear(n_channels, n_outputs)
        self.project = nn.Linear(n_channels, GROUPS * WIDTH)
        self.norm = nn.LayerNorm(GROUPS * WIDTH)
        self.small = nn.Sequential(
            nn.Conv2d(GROUPS, 2 * GROUPS, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(2 * GROUPS, 4 * GROUPS, 3, stride=2, padding=1), nn.GELU(), nn.Flatten(),
        )  # fmt: skip
        self.second = nn.Linear(4 * GROUPS * (WIDTH // 4) ** 2, n_outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(n, c)`` of tokens ``(n, s, d)``."""
        groups = self.norm(self.project(tokens)).unflatten(2, (GROUPS, WIDTH))  # (n, s, g, w)
        groups = groups - groups.mean(1, keepdim=True)
        neighbours = groups.roll(-1, dims=2)
        cross = torch.einsum("nsgw,nsgv->ngwv", groups, neighbours) / tokens.shape[1]
        return self.mean(tokens.mean(1)) + self.second(self.small(cross))


class SecondOrder(Work):
    """Pieces of this page; those of certified self-attention are `Work`'s."""

    def constant_query(self, whiten: float) -> Piece:
        """A path of second-order pooling with a nuclear norm."""
        data = {part: (with_constant_query(X), y) for part, (X, y) in self.data(whiten).items()}
        options = {"head": "self-attention", "pool": "cls", "random_state": 0}
        return self.once(
            f"second-order-whiten{whiten:g}", lambda: self._path(data, whiten, 1, beta_ratios=RATIOS, **options)
        )

    def linear(self, name: str, whiten: float, standardised: bool) -> Piece:
        """A path of the linear head on features of one image each."""

        def make() -> Piece:
            data = {part: (FEATURES[name](X.astype(np.float64)), y) for part, (X, y) in self.data(whiten).items()}
            if standardised:
                scaler = StandardScaler().fit(data["train"][0])
                data = {part: (scaler.transform(X), y) for part, (X, y) in data.items()}
            options = {"head": "linear", "fit_intercept": True, "random_state": 0, "Cs": INVERSE_WEIGHTS[::2]}
            path = self._path(data, whiten, None, **options)
            path.record["standardised"] = standardised
            return path

        return self.once(f"{name}-whiten{whiten:g}-{'standardised' if standardised else 'plain'}", make)

    def _path(self, data: Data, whiten: float, patience: int | None, **options: Any) -> Piece:
        """A path as those of `Work`, and its best head on the test images."""
        rows = ch.regularization_path(
            *data["train"], X_val=data["validation"][0], y_val=data["validation"][1], patience=patience,
            search_tol=SEARCH_TOL, tol=self.options.tol, **options,
        )  # fmt: skip
        row = best(rows)
        model = row["model"]
        ends = [rows[0], *rows[len(options.get("Cs", RATIOS)) - 1 :]]
        right = model.predict(data["test"][0]) == data["test"][1]
        record = {
            "whiten": whiten,
            "features": data["train"][0].shape[-1],
            "beta_ratio": row["beta_ratio"],
            "edge": any(row is end for end in ends),
            "heads": model.n_heads_,
            "gap": model.certificate_.relative_gap,
            "scope": model.certificate_.scope,
            "validation_accuracy": model.score(*data["validation"]),
            "fits": len(rows),
        }
        return Piece(record, {"right": torch.from_numpy(right)})

    def moment_probe(self) -> Tuned:
        """The trained probe, on standardised tokens as the attentive probe of `attentive.py`."""
        data = self.data(0.0)
        classes, y = np.unique(data["train"][1], return_inverse=True)

        def run(lr: float, decay: float, seed: int) -> Piece:
            probe, loss = train_probe(
                MomentProbe(data["train"][0].shape[2], len(classes), seed), data["train"][0], torch.from_numpy(y),
                nn.functional.cross_entropy, lr=lr, weight_decay=decay, epochs=self.adam.epochs,
                batch_size=self.adam.batch_size, seed=seed,
            )  # fmt: skip
            return self.network(probe, data, {"whiten": 0.0, "learning_rate": lr, "weight_decay": decay}, loss)

        return self.tuned("moment-probe", run)


def families(work: SecondOrder) -> dict[str, Callable[[], Found]]:
    """What there is to run: the row of each."""
    metrics = work.options.metrics

    def best_of(name: str, fits: list[Piece]) -> Found:
        return name, [max(fits, key=validation)], fits

    def attention() -> Found:
        fits = [work.certified(f"self-attention-{a:g}", a, head="self-attention", random_state=0) for a in metrics]
        return best_of("self-attention", fits)

    def linear(name: str) -> Found:
        return best_of(name, [work.linear(name, a, standard) for a in metrics for standard in (True, False)])

    def moment_probe() -> Found:
        tuned = work.moment_probe()
        return "moment-probe", tuned.runs, tuned.tried

    return {
        "self-attention": attention,
        "second-order": lambda: best_of("second-order", [work.constant_query(a) for a in metrics]),
        **{name: lambda name=name: linear(name) for name in FEATURES},  # type: ignore[misc]
        "moment-probe": moment_probe,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--scale", choices=list(SCALES), default="2k")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="rows beside self-attention")
    parser.add_argument("--metrics", nargs="*", type=float, default=METRICS)
    parser.add_argument("--rates", nargs="*", type=float, default=sorted({rate for rate, _ in OPTIONS}))
    parser.add_argument("--tol", type=float, default=1e-3, help="of certified heads")
    parser.add_argument("--minutes", type=float, default=1e6)
    args = parser.parse_args()
    splits, folder = chosen_splits(ch.TokenStore.open(args.store), SCALES[args.scale].images), RunFolder(args.work)
    folder.begin({"data": splits.identity})
    work = SecondOrder(splits, folder, args)
    about = {"backbone": splits.backbone, "scale": args.scale, "train": len(splits.train.labels)}
    wanted = {
        name: run for name, run in families(work).items() if not args.only or name in ("self-attention", *args.only)
    }
    found = [run() for run in wanted.values()]
    extra = ("features", "standardised", "edge")
    rows = [described(*one) | {key: one[1][0].record.get(key, "") for key in extra} for one in found]
    rows = with_differences(rows, of="self-attention")
    others = [
        row for row in read_csv("second_order") if (row["backbone"], row["scale"]) != (splits.backbone, args.scale)
    ]
    write_csv("second_order", [*others, *({**about, **row, **hardware("convexhead")} for row in rows)])


if __name__ == "__main__":
    main()
