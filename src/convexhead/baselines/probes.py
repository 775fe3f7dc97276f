"""Baselines that a head is compared with: probes of one vector an image, neighbours, and a softmax attentive probe.

Each is tuned on the validation part and leaves a `Piece`; `probe_scores` gives its scores on other images.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from convexhead.baselines.attentive_probe import AttentiveProbe, tune_attentive_probe
from convexhead.experiments.cells import AdamSettings, network_scores
from convexhead.experiments.run_folder import Piece, RunFolder
from convexhead.experiments.splits import Part, Splits
from convexhead.experiments.tuning import Tuned
from convexhead.runtime.clock import now

Array = NDArray[Any]
PROBES = {
    "mean-token": "Linear probe, mean token",
    "class-token": "Linear probe, class token",
    "k-nn": "k-NN, mean token",
    "attentive-probe": "Attentive probe",
}
INVERSE_WEIGHTS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
NEIGHBOURS = (1, 5, 10, 20, 50)


def fit_probe(name: str, splits: Splits, settings: AdamSettings, folder: RunFolder) -> Tuned:
    """Tune the probe ``name`` (a key of `PROBES`) on the validation part."""
    if name == "attentive-probe":
        return tune_attentive_probe(splits, settings, folder)
    fits = _fit_neighbours if name == "k-nn" else _fit_linear
    piece = folder.once(f"probes/{name}", lambda: fits(name, splits))
    return Tuned([piece], [piece])


def _fit_linear(name: str, splits: Splits) -> Piece:
    """scikit-learn's logistic regression on one standardised vector an image, ``C`` chosen on the validation part."""
    began = now()
    X, X_val = _vectors(name, splits.train), _vectors(name, splits.validation)
    fits = []
    for C in INVERSE_WEIGHTS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a weak penalty may not be worth more iterations
            model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=500)).fit(X, splits.train.labels)
        fits.append((float(model.score(X_val, splits.validation.labels)), -C, model))
    score, minus_C, model = max(fits, key=lambda fit: fit[:2])
    scaler, logistic = model[0], model[1]
    # Two classes have one row of weights, the difference of their logits.
    weight, bias = (np.vstack([0 * a, a]) if len(a) == 1 else a for a in (logistic.coef_, logistic.intercept_[:, None]))
    weight = weight / scaler.scale_
    bias = bias[:, 0] - weight @ scaler.mean_
    return Piece(
        _record(score, began, len(fits), weight.size + bias.size)
        | {"detail": f"logistic regression on standardised vectors, C={-minus_C:g} chosen on validation"},
        {"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)},
    )


def _fit_neighbours(name: str, splits: Splits) -> Piece:
    """``k`` chosen on the validation part."""
    began = now()
    X, X_val = _vectors(name, splits.train), _vectors(name, splits.validation)
    fits = []
    for k in (k for k in NEIGHBOURS if k <= len(X)):
        model = neighbours(k).fit(X, splits.train.labels)
        fits.append((float(model.score(X_val, splits.validation.labels)), -k))
    score, minus_k = max(fits)
    return Piece(
        _record(score, began, len(fits), X.size) | {"k": -minus_k, "detail": f"k={-minus_k} chosen on validation"}
    )


def neighbours(k: int) -> KNeighborsClassifier:
    return KNeighborsClassifier(k, metric="cosine", weights="distance")


def _record(score: float, began: float, fits: int, parameters: int) -> dict[str, Any]:
    seconds = now() - began
    return {
        "validation_accuracy": score,
        "seconds": seconds,
        "fit_seconds": seconds / fits,
        "fits": fits,
        "parameters": parameters,
    }


def _vectors(name: str, part: Part) -> Array:
    """One vector an image."""
    return part.class_tokens() if name == "class-token" else part.mean_tokens()


def probe_scores(name: str, piece: Piece, train: Part, part: Part) -> Array:
    """Scores ``(n, c)`` on ``part`` of one run of the probe ``name``."""
    if name == "attentive-probe":
        return network_scores(AttentiveProbe.restored(piece.tensors), part.tokens)
    vectors = _vectors(name, part)
    if name == "k-nn":
        return neighbours(piece.record["k"]).fit(_vectors(name, train), train.labels).predict_proba(vectors)
    return vectors @ piece.tensors["weight"].numpy().T + piece.tensors["bias"].numpy()
