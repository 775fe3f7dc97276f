"""CamVid from images to mean IoU: certified heads with an output for every token, beside scikit-learn and Adam.

    python benchmarks/camvid.py IMAGES [--backbone SPEC] [--layer N ...] [--heads linear mlp ...]

``IMAGES`` holds ``train/``, ``val/`` and ``test/`` with ``images/`` and ``labels/``; 11 is void. β is chosen by the
mean IoU of ``val``; of the Mixer and self-attention by the accuracy of its tokens, since only the chosen one of these
goes on to its certificate. ``test`` is scored once. Rows go to ``results/camvid.csv``. ``--pictures FOLDER`` writes
image, truth and prediction of a few test images beside each other.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from common import Table, hardware
from convexhead import ConvexHeadClassifier, TokenStore, regularization_path
from convexhead.baselines.trained_head import fit_by_adam
from convexhead.dense import mean_iou, pixel_accuracy, pixel_scores, predict_masks
from convexhead.path import best
from convexhead.tokens import extract

NAMES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
HEADS = ("linear", "mlp", "mlp-mixer", "self-attention")
MIXING = ("mlp-mixer", "self-attention")
SEARCH_TOL = 0.05
LEARNING_RATES = (0.003, 0.01, 0.03)


def measured(clf: Any, store: TokenStore, images: str, split: str) -> dict[str, Any]:
    """Mean IoU and pixel accuracy of a split, with intervals over its images."""
    scores = pixel_scores(clf, store[split], images)
    (low, high), (least, most) = scores.interval(mean_iou), scores.interval(pixel_accuracy)
    return {
        f"{split}_miou": f"{scores.mean_iou:.4f}",
        f"{split}_miou_low": f"{low:.4f}", f"{split}_miou_high": f"{high:.4f}",
        f"{split}_accuracy": f"{scores.accuracy:.4f}", f"{split}_accuracy_low": f"{least:.4f}",
        f"{split}_accuracy_high": f"{most:.4f}", "unseen": f"{scores.unseen:.4f}",
    }  # fmt: skip


def now() -> NDArray[np.float64]:
    """Wall and CPU seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def spent(began: NDArray[np.float64]) -> dict[str, str]:
    """Columns of the time since ``began``; on a busy machine CPU seconds tell more."""
    wall, cpu = now() - began
    return {"seconds": f"{wall:.0f}", "cpu_seconds": f"{cpu:.0f}"}


def chosen(head: str, store: TokenStore, images: str, options: argparse.Namespace) -> tuple[Any, dict[str, str]]:
    """The certified head of the grid that ``val`` chooses, and the time of path and choice."""
    began = now()
    path = partial(
        regularization_path, store["train"], head=head, pool=None, beta_ratios=options.ratios, random_state=0
    )
    if head in MIXING:
        each = None if options.max_time is None else options.max_time / (len(options.ratios) + 1)
        rows = path(X_val=store["val"], patience=1, search_tol=SEARCH_TOL, tol=options.tol, max_time=each)
        return best(rows)["model"], spent(began)
    rows = path(tol=1e-6 if head == "linear" else options.tol)  # scikit-learn's solution is that near
    models = [row["model"] for row in rows]
    return max(models, key=lambda clf: pixel_scores(clf, store["val"], images).mean_iou), spent(began)


class Coefficients:
    """scikit-learn's linear head on tokens, as scores of pixels ask for probabilities."""

    def __init__(self, clf: Any, coef: NDArray[Any]) -> None:
        self.pool, self.class_names_, self.as_fitted_on, self.coef = clf.pool, clf.class_names_, clf.as_fitted_on, coef

    def predict_proba(self, view: Any) -> NDArray[Any]:
        return softmax(np.asarray(view, np.float64) @ self.coef.T, axis=2)


def by_sklearn(clf: Any, store: TokenStore, images: str, tol: float) -> dict[str, Any]:
    """Objective and scores of scikit-learn's solution of the linear head's program, and its time.

    A token is a row for each class that it has pixels of, weighted by their share.
    """
    train = store["train"]
    X, Y, w = train.read(), train.targets.astype(np.float64), train.weights.astype(np.float64)
    share = Y * w[..., None]
    i, t, k = np.nonzero(share)
    weight = share[i, t, k] * len(i) / share.sum()
    began = now()
    C = 1 / (len(i) * clf.beta_)
    sk = LogisticRegression(C=C, fit_intercept=False, tol=tol, max_iter=2000).fit(X[i, t], k, sample_weight=weight)
    time_spent = spent(began)
    f = X.astype(np.float64) @ sk.coef_.T.astype(np.float64)
    largest = f.max(2, keepdims=True)
    log_sum = (largest + np.log(np.exp(f - largest).sum(2, keepdims=True)))[..., 0]
    loss = (w * (log_sum - (Y * f).sum(2))).sum() / w.sum()
    objective = float(loss + clf.beta_ / 2 * (sk.coef_**2).sum())
    return {"objective": objective, **time_spent, **measured(Coefficients(clf, sk.coef_), store, images, "test")}


def by_adam(clf: Any, store: TokenStore, epochs: int) -> Any:
    """The same head, β and number of atoms, trained by Adam at the learning rate with the lowest objective."""
    network = ConvexHeadClassifier(clf.head, pool=None, beta=clf.beta_, random_state=0)
    options = {"n_heads": clf.n_heads_, "epochs": epochs, "batch_size": 16}
    found = [fit_by_adam(network, store["train"], lr=lr, **options)[0] for lr in LEARNING_RATES]
    return min(found, key=lambda each: each.certificate_.primal)


def pictures(clf: Any, store: TokenStore, images: str, folder: Path, count: int = 4) -> None:
    """Image, truth and prediction beside each other, of test images at equal distances."""
    folder.mkdir(parents=True, exist_ok=True)
    hues = np.random.default_rng(3).integers(40, 256, (len(NAMES) + 1, 3)).astype(np.uint8)
    hues[-1] = 0
    view = store["test"]
    some = view.subset(np.linspace(0, len(view) - 1, count).astype(int))
    for each in predict_masks(clf, some, images):
        image = np.asarray(Image.open(Path(images) / each.name).convert("RGB"))
        sheet = np.concatenate([image, hues[each.truth], hues[each.labels]], 1)
        Image.fromarray(sheet).save(folder / f"{clf.head}-{Path(each.name).stem}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("--backbone", default="packaged:efficientnet-lite0")
    parser.add_argument("--layer", nargs="+", default=["last"], help="blocks, or last; several stand side by side")
    parser.add_argument("--channels", type=int, default=None)
    parser.add_argument("--image-size", type=int, nargs=2, default=(288, 384))
    parser.add_argument("--heads", nargs="+", default=list(HEADS))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.01, 0.003, 0.001])
    parser.add_argument("--tol", type=float, default=1e-2)
    parser.add_argument("--max-time", type=float, default=None, help="seconds of the fits of a head that mixes tokens")
    parser.add_argument("--adam-epochs", type=int, default=20)
    parser.add_argument("--store", type=Path, default=Path("camvid-tokens"))
    parser.add_argument("--pictures", type=Path, default=None)
    options = parser.parse_args()
    began = now()
    layers = [None if each == "last" else int(each) for each in options.layer]
    store = extract(
        options.images, options.backbone, options.store, layer=layers, image_size=tuple(options.image_size),
        crop_pct=1.0, channels=options.channels, reduce=None if options.channels is None else "pca", constant=True,
        void=11, class_names=NAMES,
    )  # fmt: skip
    tokens = {"backbone": options.backbone, "layer": " ".join(options.layer),
              "pixels": "x".join(map(str, options.image_size)), "channels": options.channels or "all"}  # fmt: skip
    print(f"{store}: {spent(began)}", flush=True)
    table = Table("camvid", [*tokens, "head", "method"], hardware("scikit-learn", "timm"))
    for head in options.heads:
        clf, time_spent = chosen(head, store, options.images, options)
        certificate = clf.certificate_
        about = {"beta_ratio": clf.beta_ratio, "heads": clf.n_heads_, "tokens_a_sample": clf.n_tokens_}
        table.run(
            lambda clf=clf, c=certificate, about=about, time_spent=time_spent: {
                **about, "objective": c.primal, "relative_gap": c.relative_gap, **time_spent,
                **measured(clf, store, options.images, "val"), **measured(clf, store, options.images, "test"),
            }, **tokens, head=head, method="certified",
        )  # fmt: skip
        if options.pictures is not None:
            pictures(clf, store, options.images, options.pictures)
        if head == "linear":
            for tol in (1e-4, 1e-6):
                row = {**about, **by_sklearn(clf, store, options.images, tol)}
                table.run(lambda row=row: row, **tokens, head=head, method=f"scikit-learn tol={tol:g}")
        elif options.adam_epochs:
            started = now()
            fitted = by_adam(clf, store, options.adam_epochs)
            row = {**about, "objective": fitted.certificate_.primal, **spent(started)}
            row |= measured(fitted, store, options.images, "test")
            table.run(lambda row=row: row, **tokens, head=head, method=f"Adam, {options.adam_epochs} epochs")
    print(f"from images to table: {spent(began)}")


if __name__ == "__main__":
    main()
