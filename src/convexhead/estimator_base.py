"""What the estimators share: parameters become a `Spec`, a fit leaves a `Model`, fitted attributes are views of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data

from convexhead import inputs
from convexhead.errors import FileFormatError, InputError
from convexhead.fitting import fit
from convexhead.model import Model, read_only
from convexhead.modules import HeadModule
from convexhead.padding import Padded, as_padded, with_lengths
from convexhead.reading import Data, supervision
from convexhead.solvers.monitor import Progress
from convexhead.spec import Spec

T = TypeVar("T")
E = TypeVar("E", bound="HeadEstimator")
SETTINGS = tuple(each.name for each in fields(Spec))
"""Names of parameters; an estimator that a user derives may take others, and fix some of these."""


class View(Generic[T]):
    """An attribute of a fitted estimator that its model holds. It is there after ``fit`` only, and cannot be set."""

    def __init__(self, read: Callable[[Model], T | None], *, optional: bool = False) -> None:
        self.read = read
        self.optional = optional

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, estimator: None, owner: type) -> View[T]: ...
    @overload
    def __get__(self, estimator: BaseEstimator, owner: type) -> T: ...
    def __get__(self, estimator: Any, owner: type) -> Any:
        if estimator is None:
            return self
        model = vars(estimator).get("model_")
        if model is None:
            raise AttributeError(f"{owner.__name__} has no {self.name} yet: call fit first")
        value = self.read(model)
        if value is None and not self.optional:
            raise AttributeError(f"this {owner.__name__} has no {self.name}")
        return value

    def __set__(self, estimator: BaseEstimator, value: Any) -> None:
        raise AttributeError(
            f"{self.name} cannot be set, it is a part of the fitted model_: dataclasses.replace makes another model of "
            "that, and from_model its estimator"
        )


class HeadEstimator(BaseEstimator):
    """What classifier and regressor share; see `ConvexHeadClassifier` for parameters and attributes.

    Attributes
    ----------
    model_ : Model
        What was trained, after ``fit``.
    """

    distributed: bool
    device: str
    model_: Model

    certificate_ = View(lambda model: model.certificate)
    beta_ = View(lambda model: model.beta)
    beta_max_ = View(lambda model: model.beta_max)
    n_heads_ = View(lambda model: len(model.atoms))
    singular_values_ = View(lambda model: model.singular_values)
    mixing_ = View(lambda model: model.mixing)
    values_ = View(lambda model: model.values)
    coef_ = View(lambda model: model.coef)
    intercept_ = View(lambda model: read_only(model.atoms.intercept.numpy()))
    gates_ = View(lambda model: None if model.gates is None else read_only(model.gates.numpy()), optional=True)
    queries_ = View(lambda model: None if model.queries is None else read_only(model.queries.numpy()), optional=True)
    history_ = View(lambda model: model.history)
    stop_reason_ = View(lambda model: model.stop_reason)
    n_tokens_ = View(lambda model: model.head.s)
    n_outputs_ = View(lambda model: model.n_outputs)
    grid_ = View(lambda model: model.head.grid)
    origin_ = View(lambda model: model.origin, optional=True)
    reduction_ = View(lambda model: model.reduction, optional=True)

    # -- settings and data --------------------------------------------------------------------------------------------
    def to_spec(self) -> Spec:
        """The parameters, checked.

        Raises
        ------
        InputError
            A value that is not possible.
        """
        return Spec(**{name: getattr(self, name) for name in SETTINGS if hasattr(self, name)})

    def read(self, X: Any, y: Any, sample_weight: Any = None, *, classes: NDArray[Any] | None = None) -> Data:
        """The data of a fit, checked; ``classes`` are those of a classifier, None: the ones that ``y`` names."""
        raise NotImplementedError

    def _checked(self, X: Any, *, reset: bool) -> Any:
        """scikit-learn's checks of names and counts for 2-D input; other tokens are checked when they are opened."""
        X = with_lengths(as_padded(X))
        X = X if isinstance(X, Padded) else inputs.plain(X, "X")
        if isinstance(X, Padded) or not inputs.is_table(X):
            if reset and hasattr(self, "feature_names_in_"):
                del self.feature_names_in_
            return X
        few = {"ensure_min_samples": 2} if reset else {}
        with inputs.told_plainly():
            return validate_data(self, X, reset=reset, dtype=(np.float64, np.float32), **few)

    def _named(self, data: Data) -> Data:
        """``data`` with the names of the columns that scikit-learn's checks have found."""
        data.feature_names = getattr(self, "feature_names_in_", None)
        return data

    # -- fitting ------------------------------------------------------------------------------------------------------
    def _train(
        self: E,
        X: Any,
        y: Any,
        sample_weight: Any,
        callback: Callable[[Progress], None] | None,
        checkpoint: str | Path | None,
        minutes: float,
    ) -> E:
        """Fit, see `ConvexHeadClassifier.fit`."""
        model = fit(self, X, y, sample_weight, callback=callback, checkpoint=checkpoint, minutes=minutes)
        return hold(self, model)

    @classmethod
    def from_model(cls: type[E], model: Model) -> E:
        """The fitted estimator of a model, however that was trained.

        Raises
        ------
        InputError
            A regressor's model for a classifier, or the other way round.
        """
        if hasattr(cls, "classes_") != (model.classes is not None):
            raise InputError(f"{cls.__name__} is not the estimator of this model, which has classes {model.classes!r}")
        settings = {name: getattr(model.spec, name) for name in _settings_of(cls)}  # type: ignore[arg-type]
        return hold(cls(**settings), model)

    def __dir__(self) -> list[str]:
        """The names that are there: views of what this model has."""
        names = super().__dir__()
        return [name for name in names if not isinstance(getattr(type(self), name, None), View) or hasattr(self, name)]

    def __setstate__(self, state: Any) -> None:
        """Refuse what versions before 0.2 pickled: they had no model, and would look unfitted."""
        if "certificate_" in state:
            raise FileFormatError(
                "this head was pickled by an earlier version: load what its `save` wrote with convexhead.load, "
                "or fit it again"
            )
        super().__setstate__(state)

    def __sklearn_is_fitted__(self) -> bool:
        return "model_" in vars(self)

    def _score(self, X: Any, y: Any, sample_weight: Any, f: NDArray[np.float64] | None) -> float:
        """Accuracy or R² of tokens, `Padded` where they have masks, whose outputs ``f (n, r, c)`` may be known."""
        raise NotImplementedError

    def validation_score(
        self, X: Any, y: Any = None, sample_weight: Any = None, *, outputs: NDArray[np.float64] | None = None
    ) -> float:
        """What β is chosen by on held-out samples: `score`, but of several labels the mean average precision.

        ``outputs (n, r, c)`` are those of the samples, where they are known.
        """
        return self._score(X, y, sample_weight, outputs)

    def _to_compare(self, X: Any, y: Any, sample_weight: Any) -> tuple[Any, Any]:
        """What predictions are compared with, and weights: ``y``, or a store's own numbered as this head numbers them.

        They are a store's own where ``y`` is None, or where it is equal to what the store says.
        """
        X, model = inputs.resolve_store(X), self._fitted()
        if inputs.is_store(X):
            named = y is not None and model.origin is not None and model.origin.class_names is not None
            y = None if named and np.array_equal(y, X.known) else y
            X = model.as_labelled(X) if y is None else X
        return supervision(X, y, sample_weight, model.spec)

    # -- using the model ----------------------------------------------------------------------------------------------
    def _fitted(self) -> Model:
        """``model_``.

        Raises
        ------
        NotFittedError
            There is none yet.
        """
        check_is_fitted(self)
        return self.model_

    def _outputs(self, X: Any, mask: Any = None) -> NDArray[np.float64]:
        """``f (n, r, c)`` in float64."""
        model, X = self._fitted(), inputs.resolve_store(X)
        X = as_padded(X, mask)
        if inputs.is_store(X):  # the model says how it reads one
            return model.outputs(X, device=self.device)
        return model.outputs(self._checked(X, reset=False), device=self.device)

    def as_fitted_on(self, X: Any) -> Any:
        """Tokens as this head takes them, see `Model.as_fitted_on`."""
        return self._fitted().as_fitted_on(X)

    def as_trained_on(self, X: Any) -> Any:
        """Those of the images of its training, see `Model.as_trained_on`."""
        return self._fitted().as_trained_on(X)

    def to_module(self, dtype: torch.dtype = torch.float32, *, raw_tokens: bool = False) -> HeadModule:
        """The head as an ordinary `torch.nn.Module`, see `Model.to_module`."""
        return self._fitted().to_module(dtype, raw_tokens=raw_tokens)

    def save(self, path: str | Path) -> None:
        """Write a folder ``config.json`` + ``weights.safetensors``; read it back with `convexhead.load`."""
        self._fitted().save(path)


@cache
def _settings_of(cls: type[HeadEstimator]) -> tuple[str, ...]:
    """The parameters of an estimator that are settings of a head."""
    return tuple(name for name in cls._get_param_names() if name in SETTINGS)


def hold(estimator: E, model: Model) -> E:
    """The estimator, fitted with ``model``."""
    estimator.model_ = model
    estimator.n_features_in_ = model.head.d  # these two are scikit-learn's to write
    if model.feature_names is not None:
        estimator.feature_names_in_ = model.feature_names
    return estimator
