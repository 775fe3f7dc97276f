"""A run folder as plain values: everything that its part of a report says, apart from the gallery."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convexhead.errors import InputError
from convexhead.interpret import effective_rank, fourier_filters, mixing_matrix, spectra
from convexhead.metrics import accuracy_interval
from convexhead.path import EDGES
from convexhead.report import evidence as evidences
from convexhead.report.evidence import Evidence
from convexhead.report.gallery import patch_grid, strongest_heads
from convexhead.report.pixels import described
from convexhead.report.tables import probability, relative
from convexhead.tokens.backbones.base import layers_in_words
from convexhead.tokens.like import side_or_sides
from convexhead.tokens.store.store import TokenStore

KEPT = ("command", "environment", "path", "at_edge", "selection")
"""What evidence says of the making of a run, whatever store it is scored on."""
CONFUSED, SERVED = 12, 3
"""Numbers of pairs of classes, and of classes of a head, that are named."""


def read_run(
    folder: Path, store: TokenStore | None = None, images: str | None = None
) -> tuple[dict[str, Any], Any, Evidence | None]:
    """What a report says of the run in ``folder``, its model, and its evidence where there is some.

    Parameters
    ----------
    folder : Path
        Of `convexhead fit`, `path` or `adam`, or of a saved classifier.
    store : TokenStore or None
        Score the model on this store anew, whatever the folder holds.
    images : str or None
        Where images with masks are now, for that.

    Raises
    ------
    InputError
        A regressor.
    FileFormatError
        Not a model folder, or damaged.
    """
    from convexhead.persistence import load

    model = load(folder)
    if not hasattr(model, "classes_"):
        raise InputError(f"{folder} holds a regressor: a report shows classifiers")
    if store is None:
        evidence = evidences.read(folder)
    else:
        kept = evidences.read(folder) if (folder / "evidence.json").is_file() else None
        evidence = evidences.collect(model, store, images=images)
        if kept is not None:
            evidence.about |= {key: kept.about.get(key) for key in KEPT}
    run = describe(model, folder.resolve().name)
    if evidence is not None:
        run |= _making(evidence.about)
        run["trained_on"] = _trained_on(model, evidence.about)
    if evidence is not None and model.pool is None:
        run |= _pixels(evidence.about)
    elif evidence is not None:
        run |= _scores(evidence)
        run["lift"] = evidence.arrays["lift"][strongest_heads(model)].tolist()
        for atom, row in zip(run["atoms"], run["lift"], strict=True):
            atom["serves"] = _serves(np.asarray(row), run["classes"])
    return run, model, evidence


def describe(model: Any, name: str) -> dict[str, Any]:
    """What the model alone tells."""
    params = {key: value for key, value in model.get_params(deep=False).items() if key not in ("gates", "queries")}
    run: dict[str, Any] = {
        "name": name,
        "head": model.head,
        "activation": model.activation,
        "by_adam": model.model_.optimizer is not None,
        "stopped": model.stop_reason_,
        "certificate": model.certificate_.to_dict(),
        "words": certificate_in_words(model),
        "beta": model.beta_,
        "beta_max": model.beta_max_,
        "beta_ratio": model.beta_ / model.beta_max_ if model.beta_max_ else None,
        "n_heads": model.n_heads_,
        "seconds": model.history_[-1]["seconds"] if model.history_ else 0.0,
        "history": model.history_,
        "tokens": [model.n_tokens_, model.n_features_in_],
        "grid": list(patch_grid(model)),
        "classes": [str(label) for label in model.classes_],
        "parameters": {key: "–" if value is None else str(value) for key, value in params.items()},
        "atoms": _atoms(model),
        "path": [],
        "at_edge": None,
        "trained_on": _trained_on(model, {}),
        "scores": None,
        "pixels": None,
        "missing_pixels": "",
        "queries": None,
    }
    run["spectra"] = {key: values.tolist() for key, values in spectra(model).items()}
    run["effective_ranks"] = _effective_ranks(run["spectra"])
    order = strongest_heads(model)
    if model.head == "mlp-mixer":
        run["mixing_matrix"] = mixing_matrix(model).tolist()
    if model.head in ("fno", "block-fno"):
        run["filters"] = {key: value[order].tolist() for key, value in fourier_filters(model)._asdict().items()}
    return run


def _trained_on(model: Any, about: dict[str, Any]) -> str | None:
    """The images of the training, in words, and those that chose β; None where nothing tells them."""
    origin, selection = model.origin_, about.get("selection") or {}
    if origin is None:
        return None
    if origin.rows is not None:
        n, others = len(origin.rows), origin.images - len(origin.rows)
        chose = "chose β" if about.get("path") else "were left out"
        return f"{n} of the {origin.images} images of the split {origin.split!r}; the other {others} {chose}"
    every = f"all {origin.images} images of the split {origin.split!r}"
    if selection.get("folds"):
        kept = ", which keep groups together" if selection.get("grouped") else ""
        return f"{every}; β was chosen on them by cross-validation with {selection['folds']} folds{kept}"
    if selection.get("split") == "val":
        return f"{every}; the {selection['held_out']} images of the split 'val' chose β"
    if selection.get("refit"):
        return f"{every}; {selection['held_out']} of them had been held out to choose β, and were trained on after that"
    return every


def certificate_in_words(model: Any) -> str:
    """What was proved, in a sentence for people."""
    c = model.certificate_
    if c.scope == "estimated":
        return f"{str(c)[0].upper()}{str(c)[1:]}."
    gap = f"{100 * c.relative_gap:.2g}%"
    more = "could bring the objective down by more"
    heads = "" if model.head == "linear" else ", with any number of heads,"
    where = {
        "global": f"the global optimum: no weights whatever{heads} {more}",
        "sampled-gates": f"the optimum for these gates: no weights with the same gates {more}",
        "sampled-queries": f"the optimum for these queries: no weights with the same queries {more}",
    }[c.scope]
    chance = probability(c.failure_probability)
    doubt = f" The bound may fail with a probability of {chance}." if c.failure_probability else ""
    if model.model_.optimizer is None:
        asked = "" if c.converged else f" The tolerance that was asked for ({model.tol:g}) was not reached."
        return f"By the certified bound these weights are within {gap} of {where}.{doubt}{asked}"
    loose = "" if c.converged else (
        " That is proven from these weights alone. The true distance may be far smaller: it is measured from a "
        "certified optimum of the same problem."
    )  # fmt: skip
    return f"By the certified bound Adam's weights are within {gap} of {where}.{doubt}{loose}"


def distances_in_words(runs: list[dict[str, Any]]) -> None:
    """Give every run that Adam trained its ``distance`` from the best optimum that another run of its problem found.

    ``distance`` is a sentence, or None where no run of the problem (by its number) was certified.
    """
    for run in runs:
        run["distance"] = None
        solved = [
            other for other in runs
            if run["by_adam"] and run["problem"] and other["problem"] == run["problem"] and not other["by_adam"]
        ]  # fmt: skip
        if solved:
            own = run["certificate"]["primal"]
            best = min(solved, key=lambda other: other["certificate"]["primal"])
            dual = max(other["certificate"]["dual"] for other in (*solved, run))
            least, scale = max(own - best["certificate"]["primal"], 0.0), abs(own) or 1.0
            shares = dict.fromkeys((relative(least / scale), relative((own - dual) / scale)))
            run["distance"] = (
                f"Of its objective, {' to '.join(shares)} lies above the optimum, by the certified optimum of "
                f"{best['name']}."
            )


def _atoms(model: Any) -> list[dict[str, Any]]:
    """One row a head, strongest first; ``number`` counts from 1 in this order."""
    if hasattr(model, "coef_"):
        size = float(np.linalg.norm(model.coef_))
        return [{"number": 1, "strength": size, "share": 1.0, "gate": None, "group": None, "serves": []}]
    sigma = np.concatenate(model.singular_values_)
    block = np.repeat(np.arange(len(model.mixing_)), [len(U) for U in model.mixing_])
    groups = model.model_.head.n_groups
    total = float(sigma.sum()) or 1.0
    return [
        {
            "number": i + 1,
            "strength": float(sigma[k]),
            "share": float(sigma[k]) / total,
            "gate": None if model.gates_ is None else int(block[k]) // groups + 1,
            "group": None if groups == 1 else int(block[k]) % groups + 1,
            "serves": [],
        }
        for i, k in enumerate(strongest_heads(model))
    ]


def _scores(evidence: Evidence) -> dict[str, Any]:
    """What the scored images tell."""
    about, a = evidence.about, evidence.arrays
    classes, known = about["classes"], a["labels"] >= 0
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (a["labels"][known], a["predicted"][known]), 1)
    wrong = [(int(confusion[i, j]), i, j) for i, j in np.argwhere(confusion) if i != j]
    return {
        "scores": {
            "split": about["split"],
            "images": len(a["labels"]),
            "top1": evidence.accuracy,
            "interval": accuracy_interval(evidence.right),
            "top5": float(a["top5"].mean()) if len(classes) > 5 else None,
            "loss": float(a["loss"][known].mean()),
        },
        "confusion": confusion.tolist(),
        "confused": [
            {"true": classes[i], "predicted": classes[j], "count": n, "share": n / int(confusion[i].sum())}
            for n, i, j in sorted(wrong, key=lambda entry: (-entry[0], entry[1], entry[2]))[:CONFUSED]
        ],
    }


def _pixels(about: dict[str, Any]) -> dict[str, Any]:
    """What the pixels of images tell."""
    if about["pixels"] is None:
        return {"missing_pixels": about["missing"]}
    told = described(about["pixels"], about["classes"])
    return {"pixels": told | {"split": about["split"]}, "confusion": told["confusion"]}


def _making(about: dict[str, Any]) -> dict[str, Any]:
    """How the run was made."""
    rows = about["path"] or []
    return {
        "classes": about["classes"],
        "path": [
            {key: row[key] for key in ("beta_ratio", "n_heads", "relative_gap", "train_score", "val_score", "spectra")}
            | {"effective_ranks": _effective_ranks(row["spectra"])}
            for row in rows
        ],
        "at_edge": EDGES.get(about.get("at_edge") or ""),
        "commands": [
            *_extraction(about["tokens"], about["classes"]),
            *([about["command"]] if about["command"] else []),
        ],
        "store": about["tokens"],
        "layers": layers_in_words(about["tokens"]["layer"], about["tokens"].get("class_channels", False)),
        "environment": about["environment"],
    }


def _serves(lift: Any, classes: list[str]) -> list[dict[str, Any]]:
    best = np.argsort(-lift, kind="stable")[:SERVED]
    return [{"name": classes[c], "lift": float(lift[c])} for c in best if lift[c] > 0]


def _effective_ranks(values: dict[str, list[float]]) -> dict[str, float]:
    return {name: effective_rank(torch.tensor(v, dtype=torch.float64)) for name, v in values.items()}


def _layers(layer: Any) -> Any:
    """What the command line says for it."""
    return ",".join("last" if each is None else str(each) for each in layer) if isinstance(layer, list) else layer


def _masks(void: int | None, classes: list[str]) -> list[str]:
    """The options that say what the numbers in masks mean, of classes that have names."""
    words = [] if void is None else ["--void", str(void)]
    if all(name.isdecimal() for name in classes):
        return words
    before = len(classes) if void is None else min(void, len(classes))
    names = [*classes[:before], *([] if before == len(classes) else ["void"]), *classes[before:]]
    return [*words, "--class-names", ",".join(names)]


def _extraction(tokens: dict[str, Any], classes: list[str]) -> list[str]:
    """The command that makes the same tokens; none of those that were imported, which somebody else made."""
    if "imported" in tokens["preprocessing"]:
        return []
    fitted, made = tokens["reduction"], tokens["preprocessing"]
    size = side_or_sides(made.get("input_size") or made.get("image_size"))
    components = fitted.get("components")
    options: dict[str, Any] = {
        "--backbone": tokens["backbone"],
        "--layer": _layers(tokens["layer"]),
        "--image-size": "x".join(map(str, size)) if isinstance(size, tuple) else size,
        "--crop-pct": tokens["preprocessing"].get("crop_pct"),
        "--channels": components or tokens["channel_pool"],
        "--reduce": "pca" if components else None,
        "--token-pool": tokens["token_pool"][0] if tokens["token_pool"] else None,
        "--dtype": tokens["dtype"],
        "--out": tokens["path"],
    }
    words = ["convexhead", "extract", tokens["source"]]
    words += [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    words += _masks(tokens["masks"]["void"], classes) if tokens.get("masks") else []
    words += ["--class-channels"] if tokens.get("class_channels") else []
    words += ["--constant"] if fitted.get("constant") else []
    words += [] if fitted.get("standardize", True) else ["--no-standardize"]
    return [shlex.join(words)]
