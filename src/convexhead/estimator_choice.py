"""Which estimator, with which loss, goes with what a store knows of its images."""

from __future__ import annotations

from typing import Any

from convexhead.errors import InputError
from convexhead.estimators import ConvexHeadClassifier
from convexhead.estimators_cv import ConvexHeadClassifierCV, ConvexHeadRegressorCV
from convexhead.reading import LOSSES
from convexhead.regressor import ConvexHeadRegressor
from convexhead.spec import OF_CLASSIFIERS, Spec

Estimator = ConvexHeadClassifier | ConvexHeadRegressor


def settings_for(view: Any, loss: str | None, parameters: dict[str, Any]) -> dict[str, Any]:
    """``parameters`` with the loss, where that is None the usual one for what a store knows of its images.

    Settings of classifiers that have their defaults are left out where the loss is for numbers.

    Raises
    ------
    InputError
        Another value of such a setting.
    """
    loss = LOSSES[view.task][0] if loss is None else loss
    if loss not in LOSSES["regression"]:
        return {**parameters, "loss": loss}
    for name in OF_CLASSIFIERS:
        if name in parameters and parameters[name] != getattr(Spec, name):
            raise InputError(f"{name}={parameters[name]!r} is for classes, and these are numbers: leave {name} out")
    return {**{name: value for name, value in parameters.items() if name not in OF_CLASSIFIERS}, "loss": loss}


def estimator_for(parameters: dict[str, Any], cv: Any) -> Estimator:
    """The estimator with these parameters; with ``cv``, as of `ConvexHeadClassifierCV`, it chooses β."""
    numbers, folds = parameters["loss"] in LOSSES["regression"], {} if cv is None else {"cv": cv}
    plain = ConvexHeadRegressor if numbers else ConvexHeadClassifier
    choosing = ConvexHeadRegressorCV if numbers else ConvexHeadClassifierCV
    cls: Any = plain if cv is None else choosing
    estimator: Estimator = cls(**parameters, **folds)
    return estimator


def check_cross_validated(parameters: dict[str, Any], saved: dict[str, Any]) -> None:
    """Refuse, and take out, what cross-validation decides itself; ``saved`` are the settings of checkpoints."""
    if parameters.pop("beta", None) is not None or parameters.pop("beta_ratio", Spec.beta_ratio) != Spec.beta_ratio:
        raise InputError("cross-validation chooses β: leave beta and beta_ratio out, or cv")
    if saved:
        raise InputError("cross-validation keeps its own fits: leave checkpoint out, or cv")
