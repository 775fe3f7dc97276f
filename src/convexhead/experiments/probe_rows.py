"""A row of a probe's table: what one fit does on the test images, and how it was trained."""

from __future__ import annotations

from typing import Any

from convexhead.experiments.probe_data import ProbeData
from convexhead.experiments.probe_fits import Fit, ProbeSettings
from convexhead.experiments.probe_outcomes import Outcome
from convexhead.experiments.probe_tasks import BASELINES


def row_of(fit: Fit, outcome: Outcome, reference: Outcome, data: ProbeData, settings: ProbeSettings) -> dict[str, Any]:
    """Flat but for ``per_class``; every row has the same keys, with None where there is no value.

    What is scored depends on the task, see `convexhead.experiments.probe_outcomes`; ``low`` and ``high`` bound the
    score. What compares with the linear head on the same images the linear head itself has not. ``chosen`` is β/β_max
    of a head, k of the neighbours, learning rate and weight decay of the attentive probe; ``whiten`` a head's metric of
    the tokens.
    """
    record, budget, names = fit.piece.record, fit.budget, data.store.class_names
    certificate = record.get("certificate", {})
    compared = outcome.against(reference, settings.seed, data.test_groups)
    if fit.method == "linear":
        compared = dict.fromkeys(compared)
    return {
        "method": fit.method,
        "kind": "baseline" if fit.method in BASELINES else "head",
        "budget": budget.title,
        "shots": budget.shots,
        "fraction": budget.fraction,
        "draw": None if budget.is_all else budget.draw,
        "train_images": len(fit.rows),
        "test_images": len(outcome),
        **outcome.values(names, settings.seed, data.test_groups),
        **compared,
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
        "cv_score": record.get("cv_score"),
        "seconds": record["seconds"],
        "run": record.get("run"),
        "per_class": outcome.by_class(names),
    }
