"""Models on disk: a folder with ``config.json`` and ``weights.safetensors``; nothing is ever unpickled.

A folder appears whole or not at all: it is written beside its place and moved there. ``config.json`` holds the SHA-256
of the weights' file and one of itself, so a model is read as it was saved or not at all. Models of format 1 had
neither. They are read, but nothing ties their certificate to a problem, and it is no reference for others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_bytes
from safetensors.numpy import save_file

from convexhead._version import __version__
from convexhead.certificate.certify import Certificate
from convexhead.errors import FileFormatError, InputError
from convexhead.estimators import ConvexHeadClassifier, ConvexHeadRegressor
from convexhead.runtime.surroundings import undisturbed
from convexhead.tokens.store.manifest import digest_json

FORMAT, VERSION = "convexhead-model", 2
ESTIMATORS = {cls.__name__: cls for cls in (ConvexHeadClassifier, ConvexHeadRegressor)}
SCALARS = (
    "beta_",
    "beta_max_",
    "n_heads_",
    "n_tokens_",
    "n_features_in_",
    "n_outputs_",
    "stop_reason_",
    "history_",
)


def save(estimator: Any, path: str | Path) -> None:
    """Write a fitted estimator to the folder ``path``, replacing a model that is there.

    Raises
    ------
    InputError
        ``path`` is something else than a model folder, or the estimator holds what JSON cannot (a loss of one's own).
    OSError
        The place cannot be written; what was there is kept.
    """
    path = Path(path)
    check_target(path)
    config, tensors = _describe(estimator)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        save_file(tensors, fresh / "weights.safetensors")
        config["weights_sha256"] = hashlib.sha256((fresh / "weights.safetensors").read_bytes()).hexdigest()
        config["checksum"] = digest_json(config)
        (fresh / "config.json").write_text(json.dumps(config, indent=1))
        fresh.chmod(0o755)
        old = path.with_name(f".{path.name}-replaced")
        if path.exists():
            keep_others(path, fresh)
            path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def check_target(path: Path) -> None:
    """Refuse a place that a model cannot be saved in, before hours of training are spent on it.

    Raises
    ------
    InputError
        ``path`` is something else than a model folder.
    """
    if path.exists() and not (path / "config.json").is_file() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not a model folder: choose another path")


def keep_others(old: Path, fresh: Path) -> None:
    """Copy what a user keeps beside the model in its folder."""
    for item in old.iterdir():
        if not (fresh / item.name).exists():
            (shutil.copytree if item.is_dir() else shutil.copy2)(item, fresh / item.name)


def _describe(estimator: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    params = estimator.get_params(deep=False)
    tensors = {"intercept": estimator.intercept_}
    params.pop("gates")
    if estimator.gates_ is not None:
        tensors["gates"] = estimator.gates_
    if hasattr(estimator, "coef_"):
        tensors["coef"] = estimator.coef_
    else:
        sizes = [len(block) for block in estimator.mixing_]
        tensors["block"] = np.repeat(np.arange(len(sizes)), sizes)
        tensors["mixing"] = np.concatenate(estimator.mixing_)
        tensors["values"] = np.concatenate(estimator.values_)
    if params.get("random_state") is not None and not isinstance(params["random_state"], (int, np.integer)):
        params["random_state"] = None  # a generator's state is not a setting
    config: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "convexhead": __version__,
        "estimator": type(estimator).__name__,
        "parameters": params,
        "certificate": estimator.certificate_.to_dict(),
        "grid": list(estimator.grid_),
        **{name: getattr(estimator, name) for name in SCALARS},
    }
    if hasattr(estimator, "classes_"):
        config["classes"] = {"dtype": estimator.classes_.dtype.str, "values": estimator.classes_.tolist()}
    else:
        config["target_shape"] = list(estimator._target_shape)
    if hasattr(estimator, "feature_names_in_"):
        config["feature_names"] = estimator.feature_names_in_.tolist()
    reduction = getattr(estimator, "reduction_", None)
    if reduction is not None:
        config["reduction"] = {"constant": reduction.constant, "options": reduction.options}
        for name in ("mean", "scale", "basis"):
            if getattr(reduction, name) is not None:
                tensors[f"reduction.{name}"] = getattr(reduction, name)
    origin = getattr(estimator, "origin_", None)
    if origin is not None:
        config["tokens"] = origin.to_dict()
        if origin.rows is not None:
            tensors["tokens.rows"] = origin.rows
    try:
        config = json.loads(json.dumps(config, default=_plain))
    except TypeError as error:
        raise InputError(f"this estimator cannot be saved: {error}; use a loss and parameters given by name") from error
    return config, {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")


@undisturbed()
def load(path: str | Path) -> ConvexHeadClassifier | ConvexHeadRegressor:
    """Read a model that `save` wrote.

    Raises
    ------
    FileFormatError
        Not a model folder, of a newer version, truncated, changed after it was saved, or its two files do not belong
        together.
    """
    path = Path(path)
    config = _read_config(path)
    try:
        content = (path / "weights.safetensors").read_bytes()
        tensors = load_bytes(content)
    except (OSError, SafetensorError) as error:
        raise FileFormatError(
            f"{path / 'weights.safetensors'} is missing or damaged ({error}): save the model again"
        ) from error
    if config["version"] > 1 and config.get("weights_sha256") != hashlib.sha256(content).hexdigest():
        raise FileFormatError(
            f"{path / 'weights.safetensors'} holds other weights than were saved with its config.json, so the "
            "certificate there is not theirs: save the model again"
        )
    try:
        return _restore(config, tensors)
    except InputError as error:
        raise FileFormatError(f"{path} does not hold a complete model ({error}): save the model again") from error
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FileFormatError(f"{path} does not hold a complete model ({error!r}): save the model again") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileFormatError(f"{path} is not a model folder: it has no config.json") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path / 'config.json'} is damaged ({error}): save the model again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise FileFormatError(f"{path} is not a convexhead model: its config.json says nothing of {FORMAT!r}")
    if config.get("version") not in (1, VERSION):
        raise FileFormatError(
            f"{path} has format version {config.get('version')}, this convexhead reads {VERSION}: upgrade convexhead"
        )
    if config["version"] > 1 and config.pop("checksum", None) != digest_json(config):
        raise FileFormatError(
            f"{path} does not hold a complete model as it was saved (the checksum of config.json differs): "
            "save the model again"
        )
    return config


def _restore(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    cls = ESTIMATORS[config["estimator"]]
    params = dict(config["parameters"])
    if params.get("grid") is not None:
        params["grid"] = tuple(params["grid"])
    estimator = cls(**params)
    estimator.gates_ = tensors.get("gates")
    for name in SCALARS:
        setattr(estimator, name, config[name])
    estimator.certificate_ = _restore_certificate(config)
    estimator.grid_ = tuple(config["grid"])
    estimator.intercept_ = tensors["intercept"]
    if "classes" in config:
        estimator.classes_ = np.array(config["classes"]["values"], dtype=np.dtype(config["classes"]["dtype"]))
    else:
        estimator._target_shape = tuple(config["target_shape"])
    if "feature_names" in config:
        estimator.feature_names_in_ = np.array(config["feature_names"], dtype=object)
    estimator.reduction_ = estimator.origin_ = None
    if "reduction" in config:
        from convexhead.tokens.reduce import Reduction

        parts: dict[str, Any] = {name: tensors.get(f"reduction.{name}") for name in ("mean", "scale", "basis")}
        estimator.reduction_ = Reduction(**parts, **config["reduction"])
    if "tokens" in config:
        from convexhead.tokens.store.origin import TokenOrigin

        estimator.origin_ = TokenOrigin.from_dict(config["tokens"], tensors.get("tokens.rows"), estimator.reduction_)
    _check_tensors(estimator, tensors)
    if "coef" in tensors:
        estimator.coef_ = tensors["coef"]
        estimator.singular_values_ = [np.linalg.svd(estimator.coef_, compute_uv=False)]
        return estimator
    head = estimator._fitted_head()
    n_blocks = head.n_groups * (1 if estimator.gates_ is None else len(estimator.gates_))
    block, mixing, values = tensors["block"], tensors["mixing"], tensors["values"]
    shared = head.output_mask(estimator.n_outputs_) is None
    columns = estimator.n_outputs_ if shared else estimator.n_outputs_ // head.n_groups
    if (
        mixing.shape[1:] != head.mixing_shape
        or values.shape[1:] != (head.value_rows, columns)
        or not len(block) == len(mixing) == len(values) == config["n_heads_"]
        or not np.isin(block, np.arange(n_blocks)).all()
    ):
        raise ValueError("weights do not have the shapes that config.json states")
    estimator.mixing_ = [mixing[block == j] for j in range(n_blocks)]
    estimator.values_ = [values[block == j] for j in range(n_blocks)]
    estimator.singular_values_ = [np.square(u).sum(axis=tuple(range(1, u.ndim))) for u in estimator.mixing_]
    return estimator


def _restore_certificate(config: dict[str, Any]) -> Certificate:
    """The certificate, whose numbers must agree with each other and with the settings."""
    fields, parameters = dict(config["certificate"]), config["parameters"]
    if config["version"] == 1:
        fields = {**fields, "identity": None, "beta": None, "tol": None}
    certificate = Certificate(**fields)
    gated = parameters["activation"] == "gated-relu"
    if gated != (certificate.scope == "sampled-gates"):
        raise ValueError(f"scope {certificate.scope!r} of a {parameters['activation']} head")
    if certificate.converged and certificate.tol is None and certificate.relative_gap > parameters["tol"]:
        raise ValueError(f"converged at relative_gap {certificate.relative_gap!r} > tol {parameters['tol']!r}")
    return certificate


def _check_tensors(estimator: Any, tensors: dict[str, np.ndarray]) -> None:
    """Raise unless what does not depend on the head has its shape and is finite: nothing broadcasts."""
    c, d = estimator.n_outputs_, estimator.n_features_in_
    if tensors["intercept"].shape != (c,) or ("coef" in tensors and tensors["coef"].shape != (d, c)):
        raise ValueError(f"weights do not have the shapes of {c} outputs")
    if hasattr(estimator, "classes_") and len(estimator.classes_) != c:
        raise ValueError(f"{len(estimator.classes_)} classes for {c} outputs")
    if ("gates" in tensors) != (estimator.activation == "gated-relu"):
        raise ValueError(f"gates with activation {estimator.activation!r}")
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("weights are not finite")
