"""What a method of a probe says of the test images, and what that is worth, by what is known of them.

=================  ==============================  ==================================================================
known              score                           beside it
=================  ==============================  ==================================================================
one class          top-1                           top-5, balanced accuracy, calibration error, a paired test
several classes    mean average precision          AUROC, binary cross-entropy, share with all right, a paired test
numbers            R²                              mean absolute error, a paired test
masks              mean IoU                        share of pixels that are right, a paired test
=================  ==============================  ==================================================================

Each has the columns of its rows in the leaderboard, its value for each class or column, and the tensors that are kept.
The paired test of classes is McNemar's where images stand alone; else, and of all others, it is by exchange.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import xlogy
from torch import Tensor

from convexhead.dense import class_iou, mean_iou, pixel_accuracy
from convexhead.experiments.probe_tasks import CLASSES, LABELS, MASKS, NUMBERS
from convexhead.metrics import (
    Predictions,
    accuracy_interval,
    auroc,
    average_precision,
    balanced_accuracy,
    calibration_error,
    mcnemar,
    mean_of_known,
    per_class_accuracy,
    top_k_accuracy,
)
from convexhead.resampling import average_precisions, interval, paired, r_squareds, score

Array = NDArray[Any]
Values = dict[str, Any]
TOP = 5


class Outcome(ABC):
    """See the module's text.

    Attributes
    ----------
    score : str
        The key of the score that methods are compared by.
    """

    score: ClassVar[str]

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def values(self, names: Sequence[str], seed: int, groups: Array | None = None) -> Values:
        """The columns of a row, with ``low`` and ``high`` of the score; ``groups`` as in `resampling.interval`."""

    @abstractmethod
    def against(self, reference: Any, seed: int, groups: Array | None = None) -> Values:
        """How it compares with the linear head on the same images."""

    @abstractmethod
    def by_class(self, names: Sequence[str]) -> dict[str, float | None]:
        """Its value for each class or column; None where it is not defined."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is kept."""


@dataclass(frozen=True)
class OfClasses(Outcome):
    """Of one class an image."""

    predictions: Predictions
    score: ClassVar[str] = "top1"

    def __len__(self) -> int:
        return len(self.predictions.truth)

    def values(self, names: Sequence[str], seed: int, groups: Array | None = None) -> Values:
        if groups is None:
            low, high = accuracy_interval(self.predictions.right)
        else:
            low, high = interval(_Right(self.predictions.right), seed=seed, groups=groups)
        return {
            "top1": top_k_accuracy(self.predictions),
            "low": _known(low),
            "high": _known(high),
            "top5": top_k_accuracy(self.predictions, TOP) if len(names) > TOP else None,
            "balanced_accuracy": balanced_accuracy(self.predictions),
            "calibration_error": calibration_error(self.predictions),
        }

    def against(self, reference: OfClasses, seed: int, groups: Array | None = None) -> Values:
        test = mcnemar(self.predictions, reference.predictions)
        if groups is not None:
            mine, other = _Right(self.predictions.right), _Right(reference.predictions.right)
            test = test._replace(p_value=paired(mine, other, seed=seed, groups=groups).p_value)
        return test._asdict()

    def by_class(self, names: Sequence[str]) -> dict[str, float | None]:
        return {names[label]: value for label, value in per_class_accuracy(self.predictions).items()}

    def tensors(self) -> dict[str, Tensor]:
        return {key: torch.from_numpy(value) for key, value in vars(self.predictions).items()}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor]) -> OfClasses:
        """Inverse of `tensors`."""
        return cls(Predictions(**{key: value.numpy() for key, value in tensors.items()}))


@dataclass(frozen=True)
class _Right:
    """Which images are right, as a `convexhead.resampling.Outcome` whose score is the share of them."""

    right: Array

    def __len__(self) -> int:
        return len(self.right)

    def scores(self, weights: Array) -> Array:
        return weights @ self.right / weights.sum(1)

    def joined(self, other: _Right) -> _Right:
        return _Right(np.concatenate([self.right, other.right]))


@dataclass(frozen=True)
class _Drawn(Outcome):
    """An outcome that keeps arrays with a row for each image, and is compared by drawing and exchanging these."""

    def __len__(self) -> int:
        return len(self.arrays()[0])

    @abstractmethod
    def scores(self, weights: Array) -> Array:
        """See `convexhead.resampling.Outcome`."""

    @abstractmethod
    def more(self) -> Values:
        """The columns beside the score."""

    def joined(self, other: Any) -> Any:
        pairs = zip(self.arrays(), other.arrays(), strict=True)
        return type(self)(*(np.concatenate(pair) for pair in pairs))

    def values(self, names: Sequence[str], seed: int, groups: Array | None = None) -> Values:
        low, high = interval(self, seed=seed, groups=groups)
        return {self.score: score(self), "low": _known(low), "high": _known(high), **self.more()}

    def against(self, reference: Any, seed: int, groups: Array | None = None) -> Values:
        found = paired(self, reference, seed=seed, groups=groups)
        return {
            "difference": found.value, "difference_low": _known(found.low), "difference_high": _known(found.high),
            "p_value": found.p_value,
        }  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in vars(self).items()}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor]) -> Any:
        """Inverse of `tensors`."""
        return cls(**{key: value.numpy() for key, value in tensors.items()})

    def arrays(self) -> list[Array]:
        """What is kept, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]


def _known(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if np.isnan(value) else value


def _named(names: Sequence[str], values: Array) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else float(value) for name, value in zip(names, values, strict=True)}


@dataclass(frozen=True)
class OfLabels(_Drawn):
    """Of several classes an image: probabilities and targets ``(n, c)``; a target of 1/2 or more is a label."""

    p: Array
    targets: Array
    score: ClassVar[str] = "mean_ap"

    @property
    def truth(self) -> Array:
        return self.targets >= 0.5

    def scores(self, weights: Array) -> Array:
        truth, total, known = self.truth, np.zeros(len(weights)), np.zeros(len(weights))
        # A label that all images of a draw have stays in the mean: labels would else leave it by how common they are.
        for k in np.flatnonzero(truth.any(0) & ~truth.all(0)):
            value = average_precisions(self.p[:, k], truth[:, k], weights)
            total, known = total + np.nan_to_num(value), known + ~np.isnan(value)
        return np.divide(total, known, out=np.full(len(weights), np.nan), where=known > 0)

    def more(self) -> Values:
        entropy = -(xlogy(self.targets, self.p) + xlogy(1 - self.targets, 1 - self.p)).mean()
        return {
            "mean_auroc": mean_of_known(auroc(self.p, self.truth)),
            "cross_entropy": float(entropy) if np.isfinite(entropy) else None,
            "exact": float(((self.p >= 0.5) == self.truth).all(1).mean()),
        }

    def by_class(self, names: Sequence[str]) -> dict[str, float | None]:
        return _named(names, average_precision(self.p, self.truth))


@dataclass(frozen=True)
class OfNumbers(_Drawn):
    """Of numbers: outputs and targets ``(n, c)``."""

    f: Array
    targets: Array
    score: ClassVar[str] = "r2"

    def scores(self, weights: Array) -> Array:
        each = [r_squareds(self.f[:, k], self.targets[:, k], weights) for k in range(self.f.shape[1])]
        return np.mean(each, axis=0)

    def more(self) -> Values:
        return {"mae": float(np.abs(self.f - self.targets).mean())}

    def by_class(self, names: Sequence[str]) -> dict[str, float | None]:
        one = np.ones((1, len(self)))
        return _named(names, np.array([
            r_squareds(self.f[:, k], self.targets[:, k], one)[0] for k in range(self.f.shape[1])
        ]))  # fmt: skip


@dataclass(frozen=True)
class OfPixels(_Drawn):
    """Of masks: pixels of each image by their true class (rows) and the predicted one ``(n, c, c)``."""

    confusions: Array
    score: ClassVar[str] = "mean_iou"

    def scores(self, weights: Array) -> Array:
        return np.array([mean_iou(each) for each in np.tensordot(weights, self.confusions, 1)])

    def more(self) -> Values:
        return {"pixel_accuracy": pixel_accuracy(self.confusions.sum(0))}

    def by_class(self, names: Sequence[str]) -> dict[str, float | None]:
        return _named(names, class_iou(self.confusions.sum(0)))


OUTCOMES: dict[str, Any] = {CLASSES: OfClasses, LABELS: OfLabels, NUMBERS: OfNumbers, MASKS: OfPixels}
"""By what is known of the images."""
