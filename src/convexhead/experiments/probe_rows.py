"""A row of a probe's table: what one fit does on the test images, and how it was trained."""

from __future__ import annotations

from typing import Any

from convexhead.experiments.probe_data import ProbeData
from convexhead.experiments.probe_fits import BASELINES, Fit, ProbeSettings
from convexhead.metrics import (
    Predictions,
    balanced_accuracy,
    bootstrap_interval,
    calibration_error,
    mcnemar,
    per_class_accuracy,
    top_k_accuracy,
)

TOP = 5


def row_of(
    fit: Fit, predictions: Predictions, reference: Predictions, data: ProbeData, settings: ProbeSettings
) -> dict[str, Any]:
    """Flat but for ``per_class``; every row has the same keys, with None where there is no value.

    ``low`` and ``high`` bound ``top1``, see `bootstrap_interval`. ``gained``, ``lost`` and ``p_value`` compare with the
    linear head on the same images, see `mcnemar`; the linear head itself has none. ``chosen`` is β/β_max of a head, k
    of the neighbours, learning rate and weight decay of the attentive probe; ``whiten`` a head's metric of the tokens.
    """
    record, budget = fit.piece.record, fit.budget
    certificate = record.get("certificate", {})
    low, high = bootstrap_interval(predictions, seed=settings.seed)
    names, of_class = data.store.class_names, per_class_accuracy(predictions)
    test = mcnemar(predictions, reference)._asdict() if fit.method != "linear" else {}
    return {
        "method": fit.method,
        "kind": "baseline" if fit.method in BASELINES else "head",
        "budget": budget.title,
        "shots": budget.shots,
        "fraction": budget.fraction,
        "draw": None if budget.is_all else budget.draw,
        "train_images": len(fit.rows),
        "test_images": len(predictions.truth),
        "top1": top_k_accuracy(predictions),
        "low": low,
        "high": high,
        "top5": top_k_accuracy(predictions, TOP) if len(names) > TOP else None,
        "balanced_accuracy": balanced_accuracy(predictions),
        "calibration_error": calibration_error(predictions),
        "gained": test.get("gained"),
        "lost": test.get("lost"),
        "p_value": test.get("p_value"),
        "relative_gap": certificate.get("relative_gap"),
        "converged": certificate.get("converged"),
        "scope": certificate.get("scope"),
        "objective": certificate.get("primal"),
        "lower_bound": certificate.get("dual"),
        "heads": record.get("heads"),
        "beta": record.get("beta"),
        "chosen": record["chosen"],
        "whiten": record.get("whiten"),
        "chosen_by": record["chosen_by"],
        "cv_accuracy": record.get("cv_accuracy"),
        "seconds": record["seconds"],
        "run": record.get("run"),
        "per_class": {names[c]: of_class[c] for c in of_class},
    }
