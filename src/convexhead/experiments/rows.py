"""The results of a comparison from its finished pieces, as `convexhead.report` takes them."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict
from typing import Any

from convexhead.baselines.probes import PROBES
from convexhead.errors import ConvexHeadError
from convexhead.experiments.cells import AdamRuns, mean
from convexhead.experiments.splits import Splits
from convexhead.experiments.training import Settings, Trained
from convexhead.experiments.tuning import Tuned
from convexhead.runtime.hardware import environment
from convexhead.runtime.run_folder import Piece

Results = dict[str, Any]
ROUNDING = 1e-9
"""Relative amount by which rounding may put Adam's objective below a certified bound. Chosen by hand."""


def results_of(
    splits: Splits,
    settings: Settings,
    probes: dict[str, Tuned],
    trained: list[Trained],
    scores: dict[str, Any],
    title: str,
    clock: str,
) -> Results:
    n, s, d = splits.train.tokens.shape
    baseline = None
    if "mean-token" in probes:
        piece = probes["mean-token"].runs[0]
        baseline = {
            "name": "Linear probe (certified, mean token)",
            "validation_accuracy": piece.record["validation_accuracy"],
            "test_accuracy": scores[piece.name][0],
            "relative_gap": piece.record["relative_gap"],
            "seconds": piece.record["seconds"],
            "detail": piece.record["detail"],
        }
    return {
        "title": title,
        "subtitle": f"{len(trained)} heads trained to a certified optimum on frozen tokens",
        "dataset": {
            "name": splits.name,
            "train": n,
            "validation": len(splits.validation.labels),
            "test": scores["images"][0],
            "tokens": s,
            "channels": d,
            "classes": len(splits.class_names),
            "backbone": splits.backbone,
        },
        "environment": environment() | {"clock": clock},
        "settings": asdict(settings),
        "rows": [_row(each, scores) for each in trained],
        "baseline": baseline,
        "methods": [row for each in trained for row in _cell_methods(each, scores)]
        + [_probe_method(name, tuned, scores) for name, tuned in probes.items()],
        "attention": None,
        "reproduce": [],
    }


def _row(each: Trained, scores: dict[str, Any]) -> dict[str, Any]:
    """A cell with Adam's runs of its head."""
    adam = each.main_adam
    return {
        **each.path.record,
        "test_accuracy": scores[each.path.name][0],
        "test_top5": scores[each.path.name][1],
        "twin": None if adam is None else _adam_row(adam, each.path.record["certificate"], scores),
    }


def _adam_row(adam: AdamRuns, certificate: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    kept = ("seed", "learning_rate", "objective", "seconds", "history")

    def run(piece: Piece) -> dict[str, Any]:
        excess = excess_of(piece, certificate)
        return {key: piece.record[key] for key in kept} | {"relative_excess": excess}

    record = adam.tuned.runs[0].record
    return {
        "optimizer": record["optimizer"],
        "n_heads": adam.n_heads,
        "learning_rate": record["learning_rate"],
        "tuning_seconds": adam.tuned.seconds,
        "runs": [run(piece) | {"test_accuracy": scores[piece.name][0]} for piece in adam.tuned.runs],
        "tried": [run(piece) for piece in adam.tuned.tried],
    }


def excess_of(piece: Piece, certificate: dict[str, Any]) -> float | None:
    """How far a training run ended above the certified optimum, relatively; None where it diverged.

    With trained queries it may end below: that is another problem, of which its record has no identity.

    Raises
    ------
    ConvexHeadError
        It ended below the certified lower bound, which would refute the certificate, or it was another problem's.
    """
    objective = piece.record["objective"]
    if objective is None:
        return None
    # Records without an identity are older; the settings of their folder say that they are of the same problem.
    of_another = piece.record.get("identity", "") is None
    told = [key for key in ("beta", "identity") if piece.record.get(key) is not None and key in certificate]
    if any(piece.record[key] != certificate[key] for key in told):
        raise ConvexHeadError(
            f"{piece.name} was trained on another problem than the convex head was certified for, so the two cannot be "
            "compared: delete the folder and run the same again"
        )
    lowest, scale = piece.record["convex_objective"], abs(certificate["primal"])
    if not of_another and lowest < certificate["dual"] - ROUNDING * scale:
        raise ConvexHeadError(
            f"{piece.name} has objective {lowest!r}, below the certified bound {certificate['dual']!r}: "
            "this refutes the certificate, please report it"
        )
    return float((objective - certificate["primal"]) / scale)


def _cell_methods(each: Trained, scores: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row for the convex head, and one for each width of Adam's runs."""
    record = each.path.record
    certificate = record["certificate"]
    about = {"head": record["head"], "activation": record["activation"]}
    about |= {key: record[key] for key in ("beta_ratio", "beta")}
    keys = ("relative_gap", "estimated_gap", "dual", "scope", "converged", "failure_probability")
    convex = _method(
        **about,
        method="convex",
        heads=record["heads"],
        validation_accuracy=record["validation_accuracy"],
        test_top1=scores[each.path.name][0],
        test_top5=scores[each.path.name][1],
        objective=certificate["primal"],
        **{key: certificate[key] for key in keys},
        seconds=record["fit_seconds"],
        seconds_total=record["seconds"],
        fits=len(record["path"]),
        parameters=record["parameters"],
    )
    rows = [convex]
    for adam in each.adam:
        excess, of_all = (
            [value for piece in pieces if (value := excess_of(piece, certificate)) is not None]
            for pieces in (adam.tuned.runs, adam.tuned.tried)
        )
        rows.append(
            _method(
                **about,
                method=adam.tuned.runs[0].record["optimizer"],
                heads=adam.n_heads,
                learning_rate=adam.tuned.runs[0].record["learning_rate"],
                **_tuned_values(adam.tuned, scores),
                excess_median=statistics.median(excess) if excess else None,
                excess_worst=max(excess, default=None),
                excess_best=min(of_all, default=None),
                convex_seconds_ratio=record["seconds"] / adam.tuned.seconds,
                parameters=adam.tuned.runs[0].record["parameters"],
            )
        )
    return rows


def _probe_method(name: str, tuned: Tuned, scores: dict[str, Any]) -> dict[str, Any]:
    record = tuned.runs[0].record
    values = _tuned_values(tuned, scores) | {key: record[key] for key in PROOF if key in record}
    row = _method(head=PROBES[name], method="probe", **values, parameters=record["parameters"])
    row["learning_rate"] = record.get("learning_rate")
    row["fits"] = record.get("fits", row["fits"])
    row["seconds"] = record.get("fit_seconds", row["seconds"])
    return row


def _tuned_values(tuned: Tuned, scores: dict[str, Any]) -> dict[str, Any]:
    """Means and spread over the seeds of a tuned method, and what tuning cost."""
    top1, top5 = ([scores[piece.name][k] for piece in tuned.runs] for k in (0, 1))
    return {
        "validation_accuracy": mean(tuned.runs, "validation_accuracy"),
        "test_top1": statistics.fmean(top1),
        "test_top1_sd": statistics.stdev(top1) if len(top1) > 1 else None,
        "test_top5": None if top5[0] is None else statistics.fmean(top5),
        "objective": mean(tuned.runs, "objective"),
        "seconds": mean(tuned.runs, "seconds"),
        "seconds_total": tuned.seconds,
        "fits": len(tuned.tried),
        "seeds": len(tuned.runs),
        "diverged": sum(piece.record.get("objective", 0.0) is None for piece in tuned.tried),
    }


PROOF = ("beta_ratio", "beta", "dual", "relative_gap", "scope", "converged", "failure_probability")
"""What the record of a certified probe has beside those of the others."""
METHOD = (
    "head", "activation", "method", "heads", "learning_rate", "beta_ratio", "beta", "validation_accuracy", "test_top1",
    "test_top1_sd", "test_top5", "objective", "relative_gap", "estimated_gap", "dual", "scope", "converged",
    "failure_probability", "excess_median", "excess_worst", "excess_best", "seconds", "seconds_total",
    "convex_seconds_ratio", "fits", "seeds", "diverged", "parameters",
)  # fmt: skip
"""Columns of the flat table. Every row has all of them, with None where there is no value."""


def _method(**values: Any) -> dict[str, Any]:
    values = {key: None if value == -math.inf else value for key, value in values.items()}
    return {key: values.pop(key, None) for key in METHOD} | values
