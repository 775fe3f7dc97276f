"""What a head is trained on: tokens and targets, checked, with what their numbers mean."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from sklearn.utils import assert_all_finite
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d
from torch import Tensor

from convexhead import inputs
from convexhead.errors import InputError
from convexhead.program.heads import HEADS
from convexhead.runtime.content import content_hash
from convexhead.runtime.stored_tokens import Tokens
from convexhead.tokens.reduce import Reduction
from convexhead.tokens.store.origin import TokenOrigin


@dataclass(eq=False)
class Data:
    """Checked tokens and targets of a fit, all samples of them.

    Attributes
    ----------
    tokens : Tensor (n, s, d) or StoredTokens
    targets : Tensor (n, r, c)
    y : array or Tensor
        What ``targets`` were made of.
    grid : (int, int) or None
        That a store's tokens lie on.
    classes, target_shape, feature_names, origin, reduction
        As in `Model`.
    """

    tokens: Tokens
    targets: Shaped[Tensor, "n r c"]
    y: NDArray[Any] | Tensor
    grid: tuple[int, int] | None
    origin: TokenOrigin | None
    reduction: Reduction | None
    classes: NDArray[Any] | None = None
    target_shape: tuple[int, ...] = ()
    feature_names: NDArray[Any] | None = None

    def meaning(self) -> dict[str, Any]:
        """What a `Model` keeps of the data, by the names of its fields."""
        names = ("classes", "target_shape", "feature_names", "origin", "reduction")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What tells the data from others: in parts, so that a message can say which of them differs."""
        return {
            "shape of the tokens": str(tuple(self.tokens.shape)),
            "type of the tokens": str(self.tokens.dtype).removeprefix("torch."),
            "data (tokens)": inputs.tokens_hash(self.tokens),
            "shape of the targets": str(tuple(self.y.shape)),
            "data (targets)": f"sha256:{content_hash(self.y)}",
        }


def read_labelled(X: Any, y: NDArray[Any]) -> Data:
    """Tokens and labels ``y (n,)`` from `labels_of`, as one-hot targets.

    Raises
    ------
    InputError
        Tokens that cannot be used, another number of labels, or a single class.
    """
    tokens, origin, about = _read_tokens(X)
    if origin is not None and not np.array_equal(y, X.labels):
        origin = origin.without_class_names()
    inputs.check_lengths(tokens, len(y))
    classes, indices = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"only one class is present ({classes[0]!r}): a classifier needs at least two classes")
    return Data(tokens, inputs.one_hot(indices, len(classes)), y, origin=origin, classes=classes, **about)


def read_measured(X: Any, y: Any, *, every_token: bool) -> Data:
    """Tokens and float targets, one a sample or one for ``every_token``.

    Raises
    ------
    InputError
        Tokens or targets that cannot be used, or that do not fit together.
    """
    tokens, origin, about = _read_tokens(X)
    targets = inputs.as_targets(y, n_tokens=tokens.shape[1], every_token=every_token)
    inputs.check_lengths(tokens, len(targets))
    shape = tuple(np.shape(inputs.plain(y, "y"))[1:])
    return Data(tokens, targets, targets, origin=origin, target_shape=shape, **about)


def _read_tokens(X: Any) -> tuple[Tokens, TokenOrigin | None, dict[str, Any]]:
    """Tokens, where they come from, and what a store tells besides."""
    stored = inputs.is_store(X)
    tokens = inputs.open_tokens(X)
    inputs.check_informative(tokens)
    about = {"grid": X.grid if stored else None, "reduction": getattr(X, "reduction", None) if stored else None}
    return tokens, X.origin() if hasattr(X, "origin") else None, about


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


def labels_of(X: Any, y: Any) -> NDArray[Any]:
    """Labels ``(n,)`` of the tokens ``X``: ``y``, or a store's own where it is None.

    Raises
    ------
    InputError
        There are none, or they are no labels.
    """
    if y is None:
        if not inputs.is_store(X):
            raise InputError("This estimator requires y to be passed, but the target y is None")
        return np.asarray(X.labels)
    with inputs.told_plainly():
        y = column_or_1d(inputs.plain(y, "y"), warn=True)
        if y.dtype == object and len({type(label) for label in y.tolist()}) > 1:
            raise InputError("y mixes labels of several types, or lacks some: give every sample a string, or a number")
        assert_all_finite(y, input_name="y")
        check_classification_targets(y)
    return y


def targets_of(classes: NDArray[Any], labels: NDArray[Any], n_outputs: int) -> Shaped[torch.Tensor, "n 1 c"]:
    """One-hot rows of ``labels`` in the order of a head's ``classes``, matched by value.

    Raises
    ------
    InputError
        A label that is none of the classes, or classes without samples.
    """
    present, names = np.unique(labels).tolist(), classes.tolist()
    place = {name: i for i, name in enumerate(names)}
    foreign = [label for label in present if label not in place]
    if foreign:
        raise InputError(
            f"labels {', '.join(map(repr, foreign[:5]))} are not among the classes of this head "
            f"({', '.join(map(repr, names[:5]))}{', …' if len(names) > 5 else ''})"
        )
    if len(present) != n_outputs:
        raise InputError(f"the labels have {len(present)} classes, but the weights have {n_outputs} outputs")
    return inputs.one_hot(np.array([place[label] for label in labels.tolist()]), n_outputs)
