"""Models on disk: a folder with ``config.json`` and ``weights.safetensors``; nothing is ever unpickled.

A folder appears whole or not at all: it is written beside its place and moved there.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from convexhead._version import __version__
from convexhead.certificate import Certificate
from convexhead.errors import FileFormatError, InputError
from convexhead.estimators import ConvexHeadClassifier, ConvexHeadRegressor

FORMAT, VERSION = "convexhead-model", 1
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
    if path.exists() and not (path / "config.json").is_file() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not a model folder: choose another path")
    config, tensors = _describe(estimator)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        save_file(tensors, fresh / "weights.safetensors")
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


def keep_others(old: Path, fresh: Path) -> None:
    """Copy what a user keeps beside the model in its folder."""
    for item in old.iterdir():
        if not (fresh / item.name).exists():
            (shutil.copytree if item.is_dir() else shutil.copy2)(item, fresh / item.name)


def _describe(estimator: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    params = estimator.get_params(deep=False)
    tensors = {"intercept": estimator.intercept_}
    if params.pop("gates") is not None or estimator.gates_ is not None:
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


def load(path: str | Path) -> ConvexHeadClassifier | ConvexHeadRegressor:
    """Read a model that `save` wrote.

    Raises
    ------
    FileFormatError
        Not a model folder, of a newer version, truncated, or its two files do not belong together.
    """
    path = Path(path)
    config = _read_config(path)
    try:
        tensors = load_file(path / "weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise FileFormatError(
            f"{path / 'weights.safetensors'} is missing or damaged ({error}): save the model again"
        ) from error
    try:
        return _restore(config, tensors)
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
    if config.get("version") != VERSION:
        raise FileFormatError(
            f"{path} has format version {config.get('version')}, this convexhead reads {VERSION}: upgrade convexhead"
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
    estimator.certificate_ = Certificate(**config["certificate"])
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
        from convexhead.tokens import Reduction

        parts: dict[str, Any] = {name: tensors.get(f"reduction.{name}") for name in ("mean", "scale", "basis")}
        estimator.reduction_ = Reduction(**parts, **config["reduction"])
    if "tokens" in config:
        from convexhead.tokens.origin import TokenOrigin

        estimator.origin_ = TokenOrigin.from_dict(config["tokens"], tensors.get("tokens.rows"), estimator.reduction_)
    if "coef" in tensors:
        estimator.coef_ = tensors["coef"]
        estimator.singular_values_ = [np.linalg.svd(estimator.coef_, compute_uv=False)]
        return estimator
    head = estimator._fitted_head()
    n_blocks = head.n_groups * (1 if estimator.gates_ is None else len(estimator.gates_))
    block, mixing, values = tensors["block"], tensors["mixing"], tensors["values"]
    if mixing.shape[1:] != head.mixing_shape or not len(block) == len(mixing) == len(values) == config["n_heads_"]:
        raise ValueError("weights do not have the shapes that config.json states")
    estimator.mixing_ = [mixing[block == j] for j in range(n_blocks)]
    estimator.values_ = [values[block == j] for j in range(n_blocks)]
    estimator.singular_values_ = [np.square(u).sum(axis=tuple(range(1, u.ndim))) for u in estimator.mixing_]
    return estimator
