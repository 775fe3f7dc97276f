"""What a head is trained on: tokens and targets, checked, with what their numbers mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

from convexhead import inputs
from convexhead.errors import InputError
from convexhead.padding import Padded, padded_like
from convexhead.program.heads import HEADS
from convexhead.program.losses import BinaryCrossEntropy, CrossEntropy, Huber, Squared, make_loss
from convexhead.runtime.content import content_hash
from convexhead.runtime.stored_tokens import StoredTokens, Tokens
from convexhead.spec import Spec
from convexhead.targets import Targets, as_labels, every_token, read_classes, read_numbers
from convexhead.tokens.reduce import Reduction
from convexhead.tokens.store.origin import TokenOrigin

LOSSES = {
    "classes": (CrossEntropy.name,),
    "masks": (CrossEntropy.name,),
    "multi-label": (BinaryCrossEntropy.name,),
    "regression": (Squared.name, Huber.name),
}
"""Losses for what a store knows of its images, the usual one first. A loss of the user's own is for numbers."""
KNOWN = {
    "classes": "one class an image",
    "masks": "a class for every pixel",
    "multi-label": "several classes an image",
    "regression": "numbers",
}
"""What these are, in words."""


@dataclass(eq=False)
class Data:
    """Checked tokens and targets of a fit, all samples of them.

    Attributes
    ----------
    spec : Spec
        The settings that they were read by.
    tokens : Tensor (n, s, d) or StoredTokens
    targets : Tensor (n, r, c)
    y : array or Tensor
        What ``targets`` were made of.
    weights : Tensor (n, r or 1, c or 1) or None
        ``ω`` of the losses; None where all count alike.
    counts : Tensor (n, r or 1) or None
        What a row of outputs counts in a score; None where all count alike.
    padded : Padded or None
        ``tokens`` with the mask of samples of different length.
    grid : (int, int) or None
        That a store's tokens lie on.
    total_weight : float
        ``W``, the sum of all weights of a classifier as they were given.
    classes, target_shape, feature_names, origin, reduction
        As in `Model`.
    """

    spec: Spec
    tokens: Tokens
    targets: Shaped[Tensor, "n r c"]
    y: NDArray[Any] | Tensor
    grid: tuple[int, int] | None
    origin: TokenOrigin | None
    reduction: Reduction | None
    weights: Tensor | None = None
    counts: Tensor | None = None
    padded: Padded | None = None
    total_weight: float = math.nan
    classes: NDArray[Any] | None = None
    target_shape: tuple[int, ...] = ()
    feature_names: NDArray[Any] | None = None

    def meaning(self) -> dict[str, Any]:
        """What a `Model` keeps of the data, by the names of its fields."""
        names = ("classes", "target_shape", "feature_names", "origin", "reduction")
        return {**{name: getattr(self, name) for name in names}, "any_length": self.padded is not None}

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What tells the data from others: in parts, so that a message can say which of them differs."""
        weights = {} if self.weights is None else {"sample weights": f"sha256:{content_hash(self.weights)}"}
        mask = {} if self.padded is None else {"mask": f"sha256:{content_hash(self.padded.mask)}"}
        return {
            **weights,
            **mask,
            "shape of the tokens": str(tuple(self.tokens.shape)),
            "type of the tokens": str(self.tokens.dtype).removeprefix("torch."),
            "data (tokens)": inputs.tokens_hash(self.tokens),
            "shape of the targets": str(tuple(self.y.shape)),
            "data (targets)": f"sha256:{content_hash(self.y)}",
        }


def read_labelled(X: Any, y: Any, spec: Spec, sample_weight: Any = None, classes: NDArray[Any] | None = None) -> Data:
    """Tokens, and labels or probabilities of classes, as `read_classes` takes them.

    Raises
    ------
    InputError
        Tokens, labels or weights that cannot be used, or that do not fit together; a single class.
    """
    tokens, mask = tokens_of(X)
    counted = mask if sample_weight is None and every_token(spec) else sample_weight
    y = as_labels(padded_like(mask, y, spec.ignore_index) if every_token(spec) else y, spec, counted)
    inputs.check_lengths(tokens, len(y))
    targets = read_classes(y, spec, tokens.shape[1], sample_weight, classes, mask)
    data = _data(spec, X, tokens, targets, y if targets.kept is None else y[targets.kept])
    return _named_by(data, X, y)


def read_measured(X: Any, y: Any, spec: Spec, sample_weight: Any = None) -> Data:
    """Tokens and float targets, one a sample or one for every token.

    Raises
    ------
    InputError
        Tokens, targets or weights that cannot be used, or that do not fit together.
    """
    tokens, mask = tokens_of(X)
    y = padded_like(mask, y, 0.0) if every_token(spec) else y
    inputs.check_lengths(tokens, len(inputs.plain(y, "y")))
    targets = read_numbers(y, tokens.shape[1], sample_weight, every_token=every_token(spec), mask=mask)
    data = _data(spec, X, tokens, targets, targets.Y)
    data.target_shape = tuple(np.shape(inputs.plain(y, "y"))[1:])
    return _named_by(data, X, y)


def _named_by(data: Data, X: Any, y: Any) -> Data:
    """``data`` without the store's names of classes or columns where ``y`` is the user's own."""
    X = X.source if isinstance(X, Padded) else X
    if data.origin is not None and not np.array_equal(y, X.known):
        data.origin = data.origin.without_class_names()
    return data


def tokens_of(X: Any) -> tuple[Tokens, NDArray[np.bool_] | None]:
    """Tokens, and which of them there are; None where that is all."""
    return (X.tokens, X.mask.numpy()) if isinstance(X, Padded) else (inputs.open_tokens(X), None)


def _data(spec: Spec, X: Any, tokens: Tokens, targets: Targets, y: NDArray[Any] | Tensor) -> Data:
    """The samples that have a weight, where their tokens come from, and what a store tells besides."""
    if isinstance(X, Padded):
        X = X if targets.kept is None else X.rows(targets.kept)
        tokens = X.tokens
    elif targets.kept is not None:
        X = inputs.some_samples(X if isinstance(tokens, StoredTokens) else tokens, targets.kept)
        tokens = inputs.open_tokens(X) if isinstance(tokens, StoredTokens) else X
    inputs.check_informative(tokens)
    padded, X = (X, X.source) if isinstance(X, Padded) else (None, X)
    stored = inputs.is_store(X)
    return Data(
        spec,
        tokens,
        targets.Y,
        y,
        weights=targets.weights,
        counts=targets.counts,
        total_weight=targets.total,
        classes=targets.classes,
        grid=X.grid if stored and padded is None else None,
        origin=X.origin() if hasattr(X, "origin") else None,
        reduction=getattr(X, "reduction", None) if stored else None,
        padded=padded,
    )


def split_for(X: Any, head: str, pool: str | None) -> Any:
    """``X``; of a token store the split that is meant, with the class token in front where ``pool="cls"`` reads it.

    Raises
    ------
    InputError
        The class token of a store that has none, or for a head that reads the grid, on which that token does not lie.
    """
    X = inputs.resolve_store(X)
    if pool != "cls" or not hasattr(X, "with_class_token"):
        return X
    if not X.n_prefix:
        raise InputError(f"pool='cls' reads the class token, and {X!r} has none: use pool='mean'")
    if getattr(HEADS.get(head), "reads_grid", False):
        raise InputError(f"the class token lies on no grid, which {head!r} reads: use pool='mean' or another head")
    return X.with_class_token()


def has_masks(X: Any) -> bool:
    """Whether ``X`` is a split of a store of images with masks."""
    return getattr(X, "task", None) == "masks"


def supervision(X: Any, y: Any, sample_weight: Any, spec: Spec) -> tuple[Any, Any]:
    """Labels or targets of the tokens ``X``, and weights: those given, or where ``y`` is None a store's own.

    Of images with masks these are the targets of tokens, and their weights times those of samples.

    Raises
    ------
    InputError
        There are none, or what is known of the images of a store is not what the loss or ``pool`` is for.
    """
    X = X.source if isinstance(X, Padded) else X
    if y is not None:
        return y, sample_weight
    if not inputs.is_store(X):
        raise InputError("This estimator requires y to be passed, but the target y is None")
    task, loss = getattr(X, "task", "classes"), make_loss(spec.loss).name
    own = task == "regression" and not any(loss in of for of in LOSSES.values())
    if loss not in LOSSES[task] and not own:
        whose = "ConvexHeadRegressor" if task == "regression" else "ConvexHeadClassifier"
        raise InputError(
            f"{X!r} has {KNOWN[task]}, and loss={loss!r} is for something else: use loss={LOSSES[task][0]!r} ({whose})"
        )
    if task == "masks":
        if spec.pool is not None:
            raise InputError(
                f"{X!r} has masks: each token has a target, and an image none; use pool=None (--pool none)"
            )
        if sample_weight is None:
            return X.targets, X.weights
        with inputs.told_plainly():
            w = np.asarray(sample_weight, np.float64)
            return X.targets, X.weights * (w[:, None] if w.ndim == 1 else w)
    if spec.pool is None:
        raise InputError(f"{X!r} has {KNOWN[task]} and its tokens have none: use pool='mean' (--pool mean)")
    return np.asarray(X.labels if task == "classes" else X.targets), sample_weight
