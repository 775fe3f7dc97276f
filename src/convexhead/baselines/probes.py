"""Baselines that a head is compared with: probes of one vector an image, neighbours, and a softmax attentive probe.

Each is tuned on the validation part and leaves a `Piece`; `probe_scores` gives its scores on other images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from convexhead.baselines.attentive_probe import AttentiveProbe, tune_attentive_probe
from convexhead.experiments.cells import AdamSettings, network_scores
from convexhead.experiments.splits import Part, Splits
from convexhead.experiments.tuning import Tuned
from convexhead.path import best, regularization_path
from convexhead.runtime.clock import now
from convexhead.runtime.run_folder import Piece, RunFolder

Array = NDArray[Any]
PROBES = {
    "mean-token": "Linear probe, mean token",
    "class-token": "Linear probe, class token",
    "k-nn": "k-NN, mean token",
    "attentive-probe": "Attentive probe",
}
INVERSE_WEIGHTS = np.logspace(-6, 5, 45)
"""scikit-learn's ``C``: the values that the field sweeps."""
TOL = 1e-3
"""Certified relative gap of a linear probe at each of them."""
NEIGHBOURS = (1, 5, 10, 20, 50)


def fit_probe(name: str, splits: Splits, settings: AdamSettings, folder: RunFolder) -> Tuned:
    """Tune the probe ``name`` (a key of `PROBES`) on the validation part."""
    if name == "attentive-probe":
        return tune_attentive_probe(splits, settings, folder)
    fits = _fit_neighbours if name == "k-nn" else _fit_linear
    piece = folder.once(f"probes/{name}", lambda: fits(name, splits))
    return Tuned([piece], [piece])


def _fit_linear(name: str, splits: Splits) -> Piece:
    """The certified linear head on one standardised vector an image, ``C`` chosen on the validation part."""
    began, scaler = now(), StandardScaler()
    X, y = scaler.fit_transform(_vectors(name, splits.train)), splits.train.labels
    path = regularization_path(
        X,
        y,
        Cs=INVERSE_WEIGHTS,
        X_val=scaler.transform(_vectors(name, splits.validation)),
        y_val=splits.validation.labels,
        head="linear",
        fit_intercept=True,
        tol=TOL,
        random_state=0,
    )
    chosen = best(path)
    model, C = chosen["model"], chosen["C"]
    weight = model.coef_.T / scaler.scale_
    bias = model.intercept_ - weight @ scaler.mean_
    certificate = model.certificate_.to_dict()
    kept = ("relative_gap", "dual", "scope", "converged", "failure_probability")
    return Piece(
        _record(chosen["val_score"], began, len(path), weight.size + bias.size)
        | {
            "detail": f"certified linear head on standardised vectors, C={C:.3g} of {len(path)} chosen on validation",
            "objective": certificate["primal"],
            "beta": chosen["beta"],
            "beta_ratio": chosen["beta_ratio"],
            **{key: certificate[key] for key in kept},
        },
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
    """Votes of the ``k`` nearest vectors by cosine, weighted by distance."""
    return KNeighborsClassifier(k, metric="cosine", weights="distance")


def neighbours_mean(k: int) -> KNeighborsRegressor:
    """Means of the targets of the same neighbours, with the same weights."""
    return KNeighborsRegressor(k, metric="cosine", weights="distance")


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
