"""What a probe does by what is known of the images: how heads are trained, by what β is chosen, what stands beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, softmax
from sklearn.metrics import r2_score
from torch import Tensor, nn

from convexhead.dense import token_iou
from convexhead.metrics import average_precision, mean_of_known
from convexhead.program.heads import HEADS

Array = NDArray[Any]
BASELINES = ("k-nn", "attentive-probe")
CLASSES, LABELS, NUMBERS, MASKS = "classes", "multi-label", "regression", "masks"


@dataclass(frozen=True)
class Task:
    """See the module's text.

    Attributes
    ----------
    name : str
        As `SplitView.task`.
    choice : str
        What cross-validation compares, in words.
    settings : dict
        Of the estimators.
    scoring : callable or None
        Of `ConvexHeadClassifierCV`; None: what it takes itself.
    lacks : dict
        Methods that cannot do this, with a sentence each.
    loss : callable (outputs, targets) -> Tensor
        Of networks.
    said : callable (logits) -> array
        What a network says.
    score : callable (said, y) -> float
        What baselines are chosen by; the same as ``choice``.
    """

    name: str
    choice: str
    settings: dict[str, Any] = field(default_factory=dict)
    scoring: Callable[..., float] | None = None
    lacks: dict[str, str] = field(default_factory=dict)
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    said: Callable[[Array], Array] = np.asarray
    score: Callable[[Array, Array], float] = r2_score


def _probabilities(logits: Array) -> Array:
    return softmax(logits, axis=1)


def _accuracy(p: Array, y: Array) -> float:
    """``y`` are positions of the columns of ``p``."""
    return float((p.argmax(1) == y).mean())


def _mean_ap(p: Array, y: Array) -> float:
    return mean_of_known(average_precision(p, y >= 0.5))


def _squared_error(f: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(f, y)


def _binary_cross_entropy(f: Tensor, y: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(f, y)


def _token_iou(clf: Any, view: Any, y: Array, sample_weight: Array) -> float:
    return token_iou(clf, view, y, sample_weight)


ONE_OUTPUT = "has one output an image, and masks need one for every token"
BY_POSITION = "mixes tokens by their position, and these images have different numbers of tokens"
EQUAL = "is trained on images of one number of tokens"
TASKS = {
    task.name: task
    for task in (
        Task(CLASSES, "accuracy", said=_probabilities, score=_accuracy),
        Task(LABELS, "mean average precision", {"fit_intercept": True}, loss=_binary_cross_entropy, said=expit,
             score=_mean_ap),
        Task(NUMBERS, "R²", {"fit_intercept": True}, loss=_squared_error),
        Task(MASKS, "mean IoU of tokens", {"pool": None}, _token_iou,
             dict.fromkeys((*BASELINES, "attentive"), ONE_OUTPUT)),
    )
}  # fmt: skip
"""The tasks by their names."""


def lacking(task: Task, ragged: bool, query_position: bool) -> dict[str, str]:
    """Methods that cannot do the task, with a sentence each.

    Parameters
    ----------
    task : Task
    ragged : bool
        Images have different numbers of tokens.
    query_position : bool
        Whether sampled queries depend on the place.
    """
    found = dict(task.lacks)
    if ragged:
        found |= {name: BY_POSITION for name, head in HEADS.items() if not head.any_length and name != "attentive"}
        found |= {"attentive-probe": EQUAL}
        if query_position:
            found |= {"attentive": f"{BY_POSITION}: --no-query-position reads what tokens are alone"}
    return found | task.lacks


def positions(y: Array) -> tuple[Tensor, int, Array | None]:
    """What a network's loss takes: labels as positions among the classes that there are, or targets in float32.

    Returns
    -------
    targets : Tensor (n,) or (n, c)
    n_outputs : int
    classes : array (c,) or None
    """
    if y.ndim == 1:
        classes, index = np.unique(y, return_inverse=True)
        return torch.from_numpy(index), len(classes), classes
    return torch.from_numpy(y.astype(np.float32)), y.shape[1], None
