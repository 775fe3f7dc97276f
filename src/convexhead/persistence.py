"""Fitted estimators on disk, see `convexhead.model_folder` for the format."""

from __future__ import annotations

from pathlib import Path

from convexhead.estimators import ConvexHeadClassifier
from convexhead.model import Model
from convexhead.model_folder import check_target
from convexhead.regressor import ConvexHeadRegressor

__all__ = ["check_target", "load", "save"]


def save(model: Model | ConvexHeadClassifier | ConvexHeadRegressor, path: str | Path) -> None:
    """Write a trained head to the folder ``path``, replacing a model that is there; see `Model.save`."""
    (model if isinstance(model, Model) else model.model_).save(path)


def load(path: str | Path) -> ConvexHeadClassifier | ConvexHeadRegressor:
    """Read a model that was saved, as the estimator that it is of; see `Model.load`."""
    model = Model.load(path)
    return (ConvexHeadRegressor if model.classes is None else ConvexHeadClassifier).from_model(model)
