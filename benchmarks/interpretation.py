"""What self-attention did on CIFAR-100 tokens: directions, parts, clusters; for docs/interpretation.md.

    python benchmarks/interpretation.py --images FOLDER --work FOLDER

FOLDER of the images holds train/ and test/ with 80 and 20 images of each of 20 classes of CIFAR-100. Tokens are those
of EfficientNet-Lite0's inner block 4 (7 x 7 x 112, standardised) and a channel of ones. Writes
benchmarks/results/interpretation.csv and docs/images/interpretation-*.png, some minutes on one core.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

import convexhead as ch
from common import hardware, write_csv
from convexhead.baselines.trained_head import fit_by_adam
from convexhead.interpret import (
    FittedHead,
    choose_n_clusters,
    cluster_figures,
    cluster_tokens,
    effective_rank,
    principal_embedding,
    retained_directions,
    spectra,
    token_contributions,
    token_embedding,
)
from convexhead.interpret.fitted import as_fitted
from convexhead.report import drawing
from convexhead.report.pictures import as_seen
from convexhead.tokens import extract, open_source

PICTURES = Path(__file__).parents[1] / "docs" / "images"
RATIOS = (0.3, 0.1, 0.03, 0.01)
SHOWN = 0.03
"""The β/β_max of the pictures and of the single studies."""
SAMPLE = 100
"""Test images that tokens are clustered of."""


@dataclass
class Data:
    """Test tokens and labels."""

    X: np.ndarray
    y: np.ndarray


def fit(train: Any, y: Any, ratio: float) -> ch.ConvexHeadClassifier:
    return ch.ConvexHeadClassifier(beta_ratio=ratio, tol=2e-3, random_state=0, grid=(7, 7)).fit(train, y)


def by_adam(train: Any, y: Any, beta: float, seed: int) -> ch.ConvexHeadClassifier:
    template = ch.ConvexHeadClassifier(beta=beta, grid=(7, 7))
    return fit_by_adam(template, train, y, n_heads=20, lr=0.01, epochs=100, batch_size=256, seed=seed)[0]


def accuracy(fitted: FittedHead, data: Data) -> float:
    logits = token_contributions(fitted, data.X).sum(1) + fitted.atoms.intercept
    return float((logits.argmax(1).numpy() == data.y).mean())


def with_mixing(fitted: FittedHead, U: torch.Tensor) -> FittedHead:
    return replace(fitted, atoms=replace(fitted.atoms, U=U))


def parts(model: Any, data: Data) -> list[dict[str, Any]]:
    """The bilinear form ``x_pᵀ U x_q`` split by the channel of ones: each part alone, and all others."""
    fitted = as_fitted(model)
    d = fitted.head.d
    content, one = (torch.arange(d) < d - 1).double(), (torch.arange(d) == d - 1).double()
    kinds = {
        "probe (ones x ones)": (one, one),
        "saliency (ones x key)": (one, content),
        "gain (query x ones)": (content, one),
        "comparison (query x key)": (content, content),
    }
    total = fitted.atoms.U.square().sum()
    rows = []
    for name, (query, key) in kinds.items():
        mask = torch.outer(query, key)
        alone, without = (with_mixing(fitted, fitted.atoms.U * m) for m in (mask, 1 - mask))
        rows.append(
            {
                "study": "parts",
                "what": name,
                "energy": float((fitted.atoms.U * mask).square().sum() / total),
                "accuracy_alone": accuracy(alone, data),
                "accuracy_without": accuracy(without, data),
            }
        )
    return rows


def truncated(model: Any, data: Data) -> list[dict[str, Any]]:
    """Accuracy when tokens are compared in the leading directions alone: ``U`` between projections on them."""
    fitted, A = as_fitted(model), retained_directions(model, energy=1.0)
    rows = []
    for r in (1, 2, 4, 8, 16, 32, 64, A.shape[1]):
        P = A[:, :r] @ A[:, :r].T
        rows.append(
            {
                "study": "directions kept",
                "what": r,
                "accuracy": accuracy(with_mixing(fitted, P @ fitted.atoms.U @ P), data),
            }
        )
    return rows


def overlap(one: Any, other: Any, name: str) -> list[dict[str, Any]]:
    """``‖A_rᵀ B_r‖²_F / r``: 1 if both heads retain the same ``r`` directions, ``r / d`` for random ones."""
    A, B = retained_directions(one, energy=1.0), retained_directions(other, energy=1.0)
    return [
        {
            "study": "overlap of directions",
            "what": name,
            "directions": r,
            "overlap": float((A[:, :r].T @ B[:, :r]).square().sum() / r),
            "random": r / len(A),
        }
        for r in (1, 4, 16)
    ]


def clustering(cloud: torch.Tensor, name: str, ratio: float | None) -> dict[str, Any]:
    k = choose_n_clusters(cloud)
    found = cluster_figures(cloud, k)
    row: dict[str, Any] = {"study": "clusters", "what": name, "beta_ratio": ratio, "dimensions": cloud.shape[2]}
    row["clusters"] = k
    for key in ("silhouette", "similarity_ratio", "agreement"):
        value, mean, largest = getattr(found, key)
        row |= {key: value, f"{key}_permuted": mean, f"{key}_permuted_largest": largest}
    return row


def rank_row(model: Any, name: str, ratio: float, data: Data) -> dict[str, Any]:
    ranks = {f"rank of {axis}": effective_rank(values) for axis, values in spectra(model).items()}
    directions = {f"directions for {e:.0%}": retained_directions(model, energy=e).shape[1] for e in (0.5, 0.9, 0.99)}
    return {
        "study": "ranks",
        "what": name,
        "beta_ratio": ratio,
        "relative_gap": model.certificate_.relative_gap,
        "heads": model.n_heads_,
        "accuracy": accuracy(as_fitted(model), data),
        **ranks,
        **directions,
    }


# -- pictures ----------------------------------------------------------------------------------------------------------
def draw(columns: list[dict[str, Any]], path: Path, titles: list[str]) -> None:
    """Rows of maps over images: ``columns`` hold an image and its maps, signed ``(7, 7)`` or clusters (integers)."""
    from matplotlib.colors import ListedColormap

    palette = ListedColormap(["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442"])
    lines = len(titles)
    with drawing.new_figure((1.05 * len(columns) + 0.3, 1.08 * lines + 0.2)) as figure:
        axes = figure.subplots(lines, len(columns), squeeze=False)
        for c, column in enumerate(columns):
            for r, shown in enumerate([None, *column["maps"]]):
                ax = axes[r, c]
                ax.imshow(column["image"], extent=(0, 7, 7, 0), interpolation="none", alpha=1 if shown is None else 0.6)
                if shown is not None and shown.dtype.kind == "i":
                    ax.imshow(shown, cmap=palette, vmin=0, vmax=6, extent=(0, 7, 7, 0), alpha=0.6, interpolation="none")
                elif shown is not None:
                    top = float(np.abs(shown).max()) or 1.0
                    opacity = 0.8 * np.abs(shown) / top
                    ax.imshow(shown, cmap=drawing.MAP, vmin=-top, vmax=top, extent=(0, 7, 7, 0), alpha=opacity,
                              interpolation="none")  # fmt: skip
                ax.grid(False)
                ax.set(xticks=[], yticks=[])
                for spine in ax.spines.values():
                    spine.set_visible(False)
                if c == 0:
                    ax.set_ylabel(titles[r], fontsize=7)
                if r == 0:
                    ax.set_title(column["title"], fontsize=7)
    with drawing.require("matplotlib", "report").rc_context(drawing.STYLE):
        figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})


def pictures(model: Any, store: Any, data: Data, source: Any) -> None:
    view, files, preprocessing = store["test"], source.files("test"), store.info()["preprocessing"]
    classes = view.class_names
    picked = [int(np.flatnonzero(data.y == c)[1]) for c in (0, 1, 3, 6, 8, 15, 16, 19)]
    predicted = model.predict(data.X[picked])
    added = token_contributions(model, data.X[picked]).numpy()
    A = retained_directions(model)
    # A direction has no sign of its own: let its largest response be positive.
    along = (torch.from_numpy(data.X).double() @ A[:, :3]).numpy()
    along *= np.sign(np.take_along_axis(along.reshape(-1, 3), np.abs(along).reshape(-1, 3).argmax(0)[None], 0))
    sample = list(range(0, len(data.X), len(data.X) // SAMPLE))
    both = sorted({*sample, *picked})
    tokens = torch.from_numpy(data.X[both]).double()
    seen, raw = (cluster_tokens(cloud, 4) for cloud in (token_embedding(model, tokens), tokens))
    columns: dict[str, list[dict[str, Any]]] = {"maps": [], "clusters": []}
    for j, i in enumerate(picked):
        image = np.asarray(as_seen(source.load("test", files.index(view.files[i])), preprocessing))
        right = predicted[j] == data.y[i]
        base = {"image": image, "title": classes[data.y[i]] + ("" if right else f" ✗ {classes[predicted[j]]}")}
        maps = [added[j, :, predicted[j]].reshape(7, 7), *(along[i, :, r].reshape(7, 7) for r in range(3))]
        columns["maps"].append(base | {"maps": maps})
        at = both.index(i)
        columns["clusters"].append(base | {"maps": [c[at].view(7, 7).numpy().astype(np.int64) for c in (seen, raw)]})
    names = ["image", "to the logit", "direction 1", "direction 2", "direction 3"]
    draw(columns["maps"], PICTURES / "interpretation-maps.png", names)
    draw(columns["clusters"], PICTURES / "interpretation-clusters.png", ["image", "as the head sees", "raw features"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    source = open_source(arguments.images)
    store = extract(
        source, "packaged:efficientnet-lite0", arguments.work / "tokens", layer=4, token_pool=7, constant=True
    )
    X, y = store["train"].read(), store["train"].labels
    data = Data(store["test"].read(), store["test"].labels)
    sample = torch.from_numpy(data.X[:: len(data.X) // SAMPLE]).double()

    rows: list[dict[str, Any]] = []
    convex = {}
    for ratio in RATIOS:
        convex[ratio] = fit(X, y, ratio)
        adam = by_adam(X, y, convex[ratio].beta_, seed=0)
        for model, name in ((convex[ratio], "convex"), (adam, "Adam")):
            rows.append(rank_row(model, name, ratio, data))
            rows.append(clustering(token_embedding(model, sample), name, ratio))
            print(rows[-2], rows[-1], sep="\n", flush=True)
    rows.append(clustering(sample, "raw features", None))
    rows.append(clustering(principal_embedding(sample, 8), "raw features, 8 principal components", None))
    model = convex[SHOWN]
    rows += truncated(model, data) + parts(model, data)
    halves = [fit(X[i::2], y[i::2], SHOWN) for i in (0, 1)]
    both = [by_adam(X, y, model.beta_, seed) for seed in (0, 1)]
    rows += overlap(halves[0], halves[1], "convex, two halves of the images")
    rows += overlap(model, both[0], "convex and Adam, all images")
    rows += overlap(both[0], both[1], "two seeds of Adam, all images")
    machine = hardware("scikit-learn", "matplotlib")
    print("written:", write_csv("interpretation", [row | machine for row in rows]))
    pictures(model, store, data, source)


if __name__ == "__main__":
    main()
