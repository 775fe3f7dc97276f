"""A model as JSON values and arrays, and back, with everything checked that can be without the data."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from convexhead._version import __version__
from convexhead.certificate.certificate import Certificate
from convexhead.errors import InputError
from convexhead.model_folder import Config, Tensors
from convexhead.program.atoms import Atoms
from convexhead.program.blocks import atoms_from_blocks
from convexhead.program.heads import Head
from convexhead.program.heads.attentive import Attentive
from convexhead.program.heads.query_ball import QueryBall
from convexhead.spec import OF_CLASSIFIERS, Spec
from convexhead.tokens.reduce import Reduction
from convexhead.tokens.store.origin import TokenOrigin

if TYPE_CHECKING:
    from convexhead.model import Model

CLASSIFIER, REGRESSOR = "ConvexHeadClassifier", "ConvexHeadRegressor"
TRAINED_BY = "trained by "
"""How the stop reason of a head begins that was trained the usual way."""


# -- to JSON values and arrays ----------------------------------------------------------------------------------------
def described(model: Model) -> tuple[Config, Tensors]:
    """All of ``model``.

    Raises
    ------
    InputError
        It holds what JSON cannot (a loss of one's own), or has no certificate.
    """
    if model.certificate is None:
        raise InputError("this head has no certificate and cannot be saved: fit it to the end")
    config: Config = {
        "convexhead": __version__,
        "estimator": REGRESSOR if model.classes is None else CLASSIFIER,
        "parameters": _parameters(model),
        "certificate": model.certificate.to_dict(),
        "grid": list(model.head.grid),
        "beta_": model.beta,
        "beta_max_": model.beta_max,
        "n_heads_": len(model.atoms),
        "n_tokens_": model.head.s,
        "n_features_in_": model.head.d,
        "n_outputs_": model.n_outputs,
        "stop_reason_": model.stop_reason,
        "history_": model.history,
    }
    if model.optimizer is not None:
        config["optimizer"] = model.optimizer
    if model.any_length:
        config["any_length"] = True
    if model.classes is None:
        config["target_shape"] = list(model.target_shape)
    else:
        config["classes"] = {"dtype": model.classes.dtype.str, "values": model.classes.tolist()}
    if model.feature_names is not None:
        config["feature_names"] = model.feature_names.tolist()
    if model.reduction is not None:
        config["reduction"] = {"constant": model.reduction.constant, "options": model.reduction.options}
    if model.origin is not None:
        config["tokens"] = model.origin.to_dict()
    try:
        config = json.loads(json.dumps(config, default=_plain))
    except TypeError as error:
        raise InputError(f"this estimator cannot be saved: {error}; use a loss and parameters given by name") from error
    return config, _tensors(model)


def _parameters(model: Model) -> dict[str, Any]:
    """The settings by name; gates and queries lie beside the weights."""
    beside = ("gates", "queries")
    values = {each.name: getattr(model.spec, each.name) for each in fields(Spec) if each.name not in beside}
    if model.spec.searches_queries:
        values["queries"] = model.spec.queries
    for each in fields(Spec):
        if each.name in OF_CLASSIFIERS and (model.classes is None or values[each.name] == each.default):
            del values[each.name]
    if model.classes is not None and values["loss"] == "cross-entropy":
        del values["loss"]
    if isinstance(values.get("class_weight"), dict):  # JSON has no other keys than words
        values["class_weight"] = [list(pair) for pair in values["class_weight"].items()]
    if values["random_state"] is not None and not isinstance(values["random_state"], (int, np.integer)):
        values["random_state"] = None  # a generator's state is not a setting
    return values


def _tensors(model: Model) -> Tensors:
    tensors = {"intercept": model.atoms.intercept.numpy()}
    if model.gates is not None:
        tensors["gates"] = model.gates.numpy()
    if model.queries is not None:
        tensors["queries"] = model.queries.numpy()
    if (ball := model.head.ball) is not None:
        tensors["ball.basis"], tensors["ball.centre"] = ball.basis.numpy(), ball.centre.numpy()
    if model.coef is not None:
        tensors["coef"] = model.coef
    else:
        assert model.mixing is not None
        assert model.values is not None
        sizes = [len(block) for block in model.mixing]
        tensors["block"] = np.repeat(np.arange(len(sizes)), sizes)
        tensors["mixing"] = np.concatenate(model.mixing)
        tensors["values"] = np.concatenate(model.values)
    if model.reduction is not None:
        for name in ("mean", "scale", "basis"):
            if getattr(model.reduction, name) is not None:
                tensors[f"reduction.{name}"] = getattr(model.reduction, name)
    if model.origin is not None and model.origin.rows is not None:
        tensors["tokens.rows"] = model.origin.rows
    return tensors


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.device):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


# -- and back ---------------------------------------------------------------------------------------------------------
def restored(config: Config, tensors: Tensors) -> dict[str, Any]:
    """The fields of the `Model` that `described` made these of.

    Raises
    ------
    KeyError, TypeError, ValueError, IndexError
        A part is missing, or parts contradict each other.
    """
    spec = _spec(config)
    n_outputs, shape = config["n_outputs_"], (config["n_tokens_"], config["n_features_in_"])
    classes = config.get("classes")
    if classes is not None:
        classes = np.array(classes["values"], dtype=np.dtype(classes["dtype"]))
    _check_tensors(spec, tensors, n_outputs, shape[1], None if classes is None else len(classes))
    queries, grid, ball = None, tuple(config["grid"]), None
    if "queries" in tensors:
        queries = torch.tensor(tensors["queries"])
    if spec.searches_queries:
        basis, centre = torch.tensor(tensors["ball.basis"]), torch.tensor(tensors["ball.centre"])
        ball = QueryBall(basis, spec.query_scale, grid if spec.query_position else None, centre)
    head = spec.make_head(*shape, grid=grid, queries=queries, ball=ball)
    if list(head.grid) != config["grid"]:
        raise ValueError(f"grid {config['grid']} of a head on the grid {head.grid}")
    names = config.get("feature_names")
    reduction = None
    if "reduction" in config:
        parts: dict[str, Any] = {name: tensors.get(f"reduction.{name}") for name in ("mean", "scale", "basis")}
        reduction = Reduction(**parts, **config["reduction"])
    origin = None
    if "tokens" in config:
        origin = TokenOrigin.from_dict(config["tokens"], tensors.get("tokens.rows"), reduction)
    return {
        "spec": spec,
        "head": head,
        "gates": torch.tensor(tensors["gates"]) if "gates" in tensors else None,
        "atoms": _atoms(head, tensors, n_outputs, config["n_heads_"]),
        "beta": config["beta_"],
        "beta_max": config["beta_max_"],
        "certificate": _certificate(config, spec),
        "history": config["history_"],
        "stop_reason": config["stop_reason_"],
        "optimizer": config.get("optimizer", _optimizer_of_old(config["stop_reason_"])),
        "classes": classes,
        "target_shape": tuple(config["target_shape"]) if classes is None else (),
        "feature_names": None if names is None else np.array(names, dtype=object),
        "origin": origin,
        "reduction": reduction,
        "any_length": config.get("any_length", False),
    }


def _optimizer_of_old(stop_reason: str) -> str | None:
    """Models of version 0.1 told in no other place that Adam had trained them."""
    return stop_reason.removeprefix(TRAINED_BY) if stop_reason.startswith(TRAINED_BY) else None


def _spec(config: Config) -> Spec:
    if config["estimator"] not in (CLASSIFIER, REGRESSOR):
        raise ValueError(f"unknown estimator {config['estimator']!r}")
    parameters = dict(config["parameters"])
    if parameters.get("grid") is not None:
        parameters["grid"] = tuple(parameters["grid"])
    if isinstance(parameters.get("class_weight"), list):
        parameters["class_weight"] = dict(parameters["class_weight"])
    return Spec(**parameters)


def _certificate(config: Config, spec: Spec) -> Certificate:
    """The certificate, whose numbers must agree with each other and with the settings."""
    values = dict(config["certificate"])
    if config["version"] == 1:
        values = {**values, "identity": None, "beta": None, "tol": None}
    certificate = Certificate(**values)
    given = {
        "sampled-gates": spec.activation == "gated-relu",
        "sampled-queries": spec.head == Attentive.name and not spec.searches_queries,
    }
    if any(is_so != (certificate.scope == scope) for scope, is_so in given.items()):
        raise ValueError(f"scope {certificate.scope!r} of a {spec.activation} {spec.head} head")
    if certificate.converged and certificate.tol is None and certificate.relative_gap > spec.tol:
        raise ValueError(f"converged at relative_gap {certificate.relative_gap!r} > tol {spec.tol!r}")
    return certificate


def _check_tensors(spec: Spec, tensors: Tensors, c: int, d: int, n_classes: int | None) -> None:
    """Raise unless what does not depend on the head has its shape and is finite: nothing broadcasts."""
    if tensors["intercept"].shape != (c,) or ("coef" in tensors and tensors["coef"].shape != (d, c)):
        raise ValueError(f"weights do not have the shapes of {c} outputs")
    if n_classes not in (None, c):
        raise ValueError(f"{n_classes} classes for {c} outputs")
    if ("gates" in tensors) != (spec.activation == "gated-relu"):
        raise ValueError(f"gates with activation {spec.activation!r}")
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("weights are not finite")


def _atoms(head: Head, tensors: Tensors, n_outputs: int, n_heads: int) -> Atoms:
    intercept = torch.tensor(tensors["intercept"])
    if not head.learns_mixing:
        zero = torch.zeros(1, dtype=torch.int64)
        return Atoms(torch.ones(1, dtype=torch.float64), torch.tensor(tensors["coef"])[None], zero, intercept)
    n_blocks = head.n_groups * (len(tensors["gates"]) if "gates" in tensors else 1)
    block, mixing, values = tensors["block"], tensors["mixing"], tensors["values"]
    columns = n_outputs if head.output_mask(n_outputs) is None else n_outputs // head.n_groups
    if (
        mixing.shape[1:] != head.mixing_shape
        or values.shape[1:] != (head.value_rows, columns)
        or not len(block) == len(mixing) == len(values) == n_heads
        or not np.isin(block, np.arange(n_blocks)).all()
    ):
        raise ValueError("weights do not have the shapes that config.json states")
    U, V = ([part[block == j] for j in range(n_blocks)] for part in (mixing, values))
    return atoms_from_blocks(head, U, V, n_outputs, intercept)
