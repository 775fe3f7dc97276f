"""Scores of a trained head on images that it was not trained on, by what is known of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from convexhead.dense import mean_iou, pixel_accuracy, pixel_scores
from convexhead.errors import InputError
from convexhead.estimators import ConvexHeadClassifier
from convexhead.metrics import accuracy_interval, auroc, average_precision, mean_of_known
from convexhead.reading import supervision
from convexhead.regressor import ConvexHeadRegressor
from convexhead.runtime.ranks import Ranks

Scores = dict[str, Any]


def scores_of(
    head: ConvexHeadClassifier | ConvexHeadRegressor, view: Any, images: str, ranks: Ranks | None = None
) -> Scores:
    """Score a head on a split of a store.

    Parameters
    ----------
    head : fitted estimator
    view : SplitView
        With what the head predicts: classes, several labels, numbers or masks.
    images : path
        Where images with masks are.
    ranks : Ranks or None
        The processes that share the images; all get the same scores. Of masks each looks at all.

    Returns
    -------
    dict
        * of one class an image the shares ``top1``, with its 95% interval, and ``top5``;
        * of several labels ``mean_ap`` and ``mean_auroc``, means over the labels that some images have and others have
          not, the share ``exact`` of images with all labels right, and ``ap`` of each label (None of the others);
        * of numbers ``r2``, ``rmse`` and ``mae``, means over the columns, and ``rmse_of`` each column;
        * of masks ``mean_iou`` and ``pixel_accuracy`` with 95% intervals over images (None of a single one), ``iou`` of
          each class, and the share ``unseen`` of pixels.

    Raises
    ------
    InputError
        A store with something else than what the head predicts.
    """
    model = head.model_
    read, ranks = model.as_labelled(view), ranks or Ranks()
    truth, _ = supervision(read, None, None, model.spec)  # refuses what the head is not for
    if not isinstance(head, ConvexHeadClassifier):
        return _of_numbers(_shared(head.predict, view, ranks), truth, read.class_names)
    if view.task == "masks":
        return _of_pixels(head, view, images)
    if view.task == "classes":
        return _of_classes(head, _shared(head.predict_proba, view, ranks), truth)
    return _of_labels(_shared(head.predict_proba, view, ranks), truth >= 0.5, read.class_names)


def _shared(predict: Callable[[Any], Any], view: Any, ranks: Ranks) -> Any:
    """What is predicted of all images, of which each process predicts some."""
    if ranks.size == 1:
        return predict(view)
    rows = ranks.share(len(view))
    mine = torch.from_numpy(predict(view.subset(np.arange(rows.start, rows.stop))))
    return ranks.join(mine, len(view)).numpy()


def _of_classes(head: ConvexHeadClassifier, p: Any, labels: Any) -> Scores:
    position = {label: i for i, label in enumerate(head.classes_.tolist())}
    truth = np.array([position.get(label, -1) for label in labels.tolist()])
    ranked = np.argsort(-p, axis=1)
    right, near = ((ranked[:, :k] == truth[:, None]).any(1) for k in (1, 5))
    return {"top1": float(right.mean()), "top1_interval": [*accuracy_interval(right)], "top5": float(near.mean())}


def _of_labels(p: Any, truth: Any, names: list[str]) -> Scores:
    ap, area = average_precision(p, truth), auroc(p, truth)
    return {
        "mean_ap": mean_of_known(ap),
        "mean_auroc": mean_of_known(area),
        "exact": float(((p >= 0.5) == truth).all(1).mean()),
        "ap": {name: None if np.isnan(value) else float(value) for name, value in zip(names, ap, strict=True)},
    }


def _of_numbers(f: Any, truth: Any, names: list[str]) -> Scores:
    if len(truth) < 2:
        raise InputError("R² of a single image is not defined: give two or more")
    f = f.reshape(truth.shape)
    each = root_mean_squared_error(truth, f, multioutput="raw_values")
    return {
        "r2": float(r2_score(truth, f)),
        "rmse": float(each.mean()),
        "mae": float(mean_absolute_error(truth, f)),
        "rmse_of": dict(zip(names, each.tolist(), strict=True)),
    }


def _of_pixels(head: ConvexHeadClassifier, view: Any, images: str) -> Scores:
    scores = pixel_scores(head, view, images)
    return {
        "mean_iou": scores.mean_iou,
        "mean_iou_interval": scores.interval(mean_iou),
        "pixel_accuracy": scores.accuracy,
        "pixel_accuracy_interval": scores.interval(pixel_accuracy),
        "iou": {
            name: None if np.isnan(iou) else float(iou)
            for name, iou in zip(scores.class_names, scores.iou, strict=True)
        },
        "unseen": scores.unseen,
    }
