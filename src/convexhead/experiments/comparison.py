"""Every head on the same tokens: certified, tuned on a validation split, beside its non-convex twin and a linear probe.

For each head and activation

1. a warm-started path over β on the training split, scored on the validation split, which chooses β;
2. the same head with as many atoms trained by Adam at that β, the learning rate chosen by training objective;
3. at the very end, one pass over the test split for everything that was chosen.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from convexhead._version import __version__
from convexhead.heads import HEADS
from convexhead.path import best, regularization_path
from convexhead.training import TrainingResult, train_adam, tune_learning_rate

Array = NDArray[Any]
Notify = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What a comparison runs.

    Attributes
    ----------
    heads, activations
        Cells of the table; the linear head is linear only.
    beta_ratios : tuple of float
        The path.
    tol : float
        Certified relative gap of every fit.
    n_gates : int
        Of the gated ReLU.
    validation : float
        Share of the training split held out to choose by, where there is no validation split.
    patience : int
        The path ends after this many fits in a row without a better validation score.
    seeds : tuple of int
        Adam's; none: no twins.
    learning_rates : tuple of float
        Tried with the first seed.
    epochs, batch_size : int
        Adam's.
    spare_heads : int
        Atoms that a twin has at least.
    random_state : int
        Of the validation split, the gates and the random starts.
    """

    heads: tuple[str, ...] = tuple(HEADS)
    activations: tuple[str, ...] = ("linear", "gated-relu")
    beta_ratios: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01, 0.003)
    tol: float = 1e-3
    n_gates: int = 8
    validation: float = 0.2
    patience: int = 2
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    epochs: int = 100
    batch_size: int = 256
    spare_heads: int = 10
    random_state: int = 0

    def cells(self) -> list[tuple[str, str]]:
        """``(head, activation)`` of every row."""
        pairs = [(head, activation) for activation in self.activations for head in self.heads]
        return [(head, activation) for head, activation in pairs if head != "linear" or activation == "linear"]


@dataclass
class Splits:
    """Tokens ``(n, s, d)`` and labels of the splits; the test split is behind a function, called once, at the end."""

    train: tuple[Array, Array]
    validation: tuple[Array, Array]
    load_test: Callable[[], tuple[Array, Array]]
    class_names: list[str]
    grid: tuple[int, int]
    name: str
    backbone: str
    test_files: list[str] = field(default_factory=list)


def splits_of_store(store: Any, settings: Settings) -> Splits:
    """Splits of a token store; a validation split is held out of the training split where the store has none."""
    train = store["train"] if "train" in store.splits else store[store.splits[0]]
    X, y = train.read(), np.asarray(train.labels)
    if "val" in store.splits:
        held_out = store["val"].read(), np.asarray(store["val"].labels)
        kept = X, y
    else:
        kept_rows, held_rows = train_test_split(
            np.arange(len(y)), test_size=settings.validation, stratify=y, random_state=settings.random_state
        )
        kept, held_out = (X[kept_rows], y[kept_rows]), (X[held_rows], y[held_rows])
    if "test" not in store.splits:
        raise ValueError("a comparison needs a test split: extract images with train/ and test/ beside each other")
    test = store["test"]
    info = store.info()
    return Splits(
        train=kept,
        validation=held_out,
        load_test=lambda: (test.read(), np.asarray(test.labels)),
        class_names=list(train.class_names),
        grid=tuple(train.grid),
        name=str(info["source"]),
        backbone=str(info["backbone"]) + ("" if info["layer"] is None else f", block {info['layer']}"),
        test_files=list(test.files),
    )


def compare(splits: Splits, settings: Settings, *, title: str, notify: Notify | None = None) -> dict[str, Any]:
    """Run all cells and return the results as JSON-able values, as `convexhead.report` takes them."""
    cells = settings.cells()
    total = len(cells) + 2
    say = notify or (lambda what, done, total: None)
    say("linear probe", 0, total)
    probe = _linear_probe(splits)
    fitted = []
    for i, (head, activation) in enumerate(cells):
        say(f"{head}, {activation}", i + 1, total)
        fitted.append(_fit_cell(splits, settings, head, activation))
    say("test images", total - 1, total)
    X_test, y_test = splits.load_test()
    rows = [_row(cell, X_test, y_test) for cell in fitted]
    baseline = {
        "name": "Linear probe (scikit-learn, L2, mean token)",
        "validation_accuracy": probe["validation_accuracy"],
        "test_accuracy": float(probe["model"].score(X_test.mean(1), y_test)),
        "seconds": probe["seconds"],
        "detail": f"logistic regression on standardised mean tokens, C={probe['C']:g} chosen on validation",
    }
    n, s, d = splits.train[0].shape
    results: dict[str, Any] = {
        "title": title,
        "subtitle": f"{len(rows)} heads trained to a certified optimum on frozen tokens",
        "dataset": {
            "name": splits.name,
            "train": n,
            "validation": len(splits.validation[0]),
            "test": len(X_test),
            "tokens": s,
            "channels": d,
            "classes": len(splits.class_names),
            "backbone": splits.backbone,
        },
        "environment": environment(),
        "settings": {key: list(v) if isinstance(v, tuple) else v for key, v in vars(settings).items()},
        "rows": rows,
        "baseline": baseline,
        "attention": None,
        "reproduce": [],
    }
    say("done", total, total)
    results["models"] = {(cell["head"], cell["activation"]): cell["chosen"]["model"] for cell in fitted}
    results["test"] = X_test, y_test
    return results


def _fit_cell(splits: Splits, settings: Settings, head: str, activation: str) -> dict[str, Any]:
    X, y = splits.train
    parameters: dict[str, Any] = {
        "head": head,
        "activation": activation,
        "grid": splits.grid,
        "tol": settings.tol,
        "n_gates": settings.n_gates,
        "n_blocks": _divisor(X.shape[2], 4),
        "random_state": settings.random_state,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the table shows every gap
        path = regularization_path(
            X,
            y,
            beta_ratios=settings.beta_ratios,
            X_val=splits.validation[0],
            y_val=splits.validation[1],
            patience=settings.patience,
            **parameters,
        )
    chosen = best(path)
    return {
        "head": head,
        "activation": activation,
        "path": path,
        "chosen": chosen,
        "twin": _twin(chosen["model"], X, y, settings) if settings.seeds else None,
    }


def _divisor(channels: int, wanted: int) -> int:
    """The largest divisor of ``channels`` that is at most ``wanted``."""
    return max(b for b in range(1, wanted + 1) if channels % b == 0)


def _twin(model: Any, X: Array, y: Array, settings: Settings) -> dict[str, Any]:
    """Adam on the same problem: same gates, same β, at least as many heads."""
    problem, _ = model._prepare(X, y)
    n_heads = max(settings.spare_heads, model.n_heads_)

    def train(lr: float, seed: int) -> TrainingResult:
        return train_adam(
            problem,
            model.beta_,
            n_heads=n_heads,
            lr=lr,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            seed=seed,
        )

    tuning = tune_learning_rate(lambda lr: train(lr, settings.seeds[0]), settings.learning_rates)
    runs = [tuning.best, *(train(tuning.learning_rate, seed) for seed in settings.seeds[1:])]
    return {"n_heads": n_heads, "tuning": tuning, "runs": runs}


def _row(cell: dict[str, Any], X_test: Array, y_test: Array) -> dict[str, Any]:
    chosen, model = cell["chosen"], cell["chosen"]["model"]
    weights = [model.coef_] if hasattr(model, "coef_") else [*model.mixing_, *model.values_]
    row = {
        "head": cell["head"],
        "activation": cell["activation"],
        "beta_ratio": chosen["beta_ratio"],
        "beta": chosen["beta"],
        "validation_accuracy": chosen["val_score"],
        "test_accuracy": float(model.score(X_test, y_test)),
        "certificate": model.certificate_.to_dict(),
        "heads": model.n_heads_,
        "seconds": sum(point["seconds"] for point in cell["path"]),
        "fit_seconds": chosen["seconds"],
        "parameters": int(sum(w.size for w in weights)),
        "history": model.history_,
        "singular_values": [block.tolist() for block in model.singular_values_],
        "path": [
            {
                "beta_ratio": point["beta_ratio"],
                "validation_accuracy": point["val_score"],
                "heads": point["n_heads"],
                "relative_gap": point["relative_gap"],
                "seconds": point["seconds"],
            }
            for point in cell["path"]
        ],
        "twin": None,
    }
    if cell["twin"] is not None:
        row["twin"] = _twin_row(cell["twin"], model, X_test, y_test)
    return row


def _twin_row(twin: dict[str, Any], model: Any, X_test: Array, y_test: Array) -> dict[str, Any]:
    optimum = model.certificate_.primal
    runs = []
    for run in twin["runs"]:
        with torch.no_grad():
            logits = run.module(torch.as_tensor(X_test, dtype=run.module.values.dtype)).numpy()
        runs.append(
            {
                "seed": run.seed,
                "test_accuracy": float((model.classes_[logits.argmax(1)] == y_test).mean()),
                "objective": run.objective,
                "relative_excess": (run.objective - optimum) / abs(optimum),
                "seconds": run.seconds,
                "history": [{"seconds": h.seconds, "objective": h.objective} for h in run.history],
            }
        )
    return {
        "optimizer": twin["runs"][0].optimizer,
        "n_heads": twin["n_heads"],
        "learning_rate": twin["tuning"].learning_rate,
        "tuning_seconds": twin["tuning"].seconds,
        "runs": runs,
    }


def _linear_probe(splits: Splits) -> dict[str, Any]:
    """scikit-learn's L2 logistic regression on mean tokens, ``C`` chosen on the validation split."""
    began = time.perf_counter()
    (X, y), (X_val, y_val) = splits.train, splits.validation
    fits = []
    for C in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000)).fit(X.mean(1), y)
        fits.append((float(model.score(X_val.mean(1), y_val)), -C, model))
    score, minus_C, model = max(fits, key=lambda fit: fit[:2])
    seconds = time.perf_counter() - began
    return {"model": model, "C": -minus_C, "validation_accuracy": score, "seconds": seconds}


def environment() -> dict[str, Any]:
    """Hardware and versions that figures were measured with."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "convexhead": __version__,
        "date": datetime.date.today().isoformat(),
    }
