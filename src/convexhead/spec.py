"""Every setting of a fit, written and validated once.

The estimators make a `Spec` of their parameters when they are fitted, and a fitted model keeps it. Checkpoints and
saved models hold its values. Defaults of signatures and of the command line are the ones here: `tests/test_spec.py`
compares them.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from torch import Tensor

from convexhead.errors import InputError, choose
from convexhead.program.activations import ACTIVATIONS
from convexhead.program.heads import HEADS, Head, make_head
from convexhead.program.heads.attentive import QUERY_NORMS
from convexhead.program.heads.base import POOLS
from convexhead.program.heads.block_fno import OUTPUTS
from convexhead.program.heads.query_ball import QueryBall
from convexhead.program.losses import LOSSES, Loss
from convexhead.runtime.content import described
from convexhead.solvers.select import NAMES

Check = Callable[[str, Any], Any]
"""Takes a setting's name and value; returns the value in its plain type, or raises `InputError`."""
OF_CLASSIFIERS = ("class_weight", "label_smoothing", "pos_weight", "ignore_index")
"""Settings that only classifiers have."""
SEARCH = "search"
"""What ``queries`` may be besides an array."""
OF_QUERIES = ("n_queries", "queries", "query_scale", "query_position", "key_dim", "query_norm")
"""Settings of the attentive head."""
LATER = ("loss", "solver", *OF_CLASSIFIERS, *OF_QUERIES)
"""Settings that checkpoints do not mention where they have their default: they were added later."""


def _one_of(options: Iterable[str]) -> Check:
    return lambda name, value: choose(name, value, options)


def _positive(*, optional: bool) -> Check:
    def check(name: str, value: Any) -> float | None:
        if optional and value is None:
            return None
        number = math.nan
        if isinstance(value, (int, float, np.number)) and not isinstance(value, (bool, np.complexfloating)):
            with contextlib.suppress(OverflowError):  # an integer beyond all floats
                number = float(value)
        if not 0 < number < math.inf:
            raise InputError(f"{name} must be a positive number{' or None' * optional}, got {value!r}")
        return number

    return check


def _count(*others: str | None) -> Check:
    """A positive integer, or one of ``others``."""

    def check(name: str, value: Any) -> int | str | None:
        if any(value is other or (isinstance(value, str) and value == other) for other in others):
            return value
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < 1:
            allowed = "".join(f" or {other!r}" for other in others)
            raise InputError(f"{name} must be a positive integer{allowed}, got {value!r}")
        return int(value)

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def _level(name: str, value: Any) -> int:
    if not isinstance(value, numbers.Integral) or value < 0:
        raise InputError(f"{name} must be a whole number from 0, got {value!r}")
    return int(value)


def _pool(name: str, value: Any) -> str | None:
    return None if value is None or choose(name, value, POOLS) == "none" else str(value)


def _loss(name: str, value: Any) -> str | Loss:
    return value if isinstance(value, Loss) else choose(name, value, LOSSES)


def _class_weight(name: str, value: Any) -> Any:
    if value is None or (isinstance(value, str) and value == "balanced"):
        return value
    weights = list(value.values()) if isinstance(value, dict) else []
    if not weights or not all(isinstance(w, (int, float, np.number)) and 0 <= w < math.inf for w in weights):
        raise InputError(
            f"{name} must be None, 'balanced' or a dict of labels and weights of at least 0, got {value!r}"
        )
    return dict(value)


def _share(name: str, value: Any) -> float:
    if not isinstance(value, (int, float, np.number)) or isinstance(value, bool) or not 0 <= value < 1:
        raise InputError(f"{name} must be a number from 0 to below 1, got {value!r}")
    return float(value)


def _positive_weight(name: str, value: Any) -> Any:
    if value is None or np.ndim(value) == 0:
        return _positive(optional=True)(name, value)
    with contextlib.suppress(TypeError, ValueError):
        weights = [float(weight) for weight in value]
        if weights and all(0 < weight < math.inf for weight in weights):
            return weights
    raise InputError(f"{name} must be a positive number, or one for each class, got {value!r}")


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise InputError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def _as_given(name: str, value: Any) -> Any:
    """Checked where it is used, against the data or the machine."""
    return value


def _queries(name: str, value: Any) -> Any:
    return choose(name, value, (SEARCH,)) if isinstance(value, str) else value


def _rule(check: Check, *, may_change: bool = False) -> dict[str, Any]:
    """How a field of `Spec` is checked; ``may_change``: a checkpoint may be resumed with another value of it."""
    return {"check": check, "may_change": may_change}


@dataclass(frozen=True, eq=False)
class Spec:
    """The settings of a fit; `convexhead.ConvexHeadClassifier` says what each of them means.

    Raises
    ------
    InputError
        A value that is not possible. What depends on the data (``grid``, ``gates``, ``queries``) or on the machine
        (``device``) is refused where it meets them, and ``random_state`` where it is drawn from.
    """

    head: str = field(default="self-attention", metadata=_rule(_one_of(HEADS)))
    activation: str = field(default="linear", metadata=_rule(_one_of(ACTIVATIONS)))
    loss: str | Loss = field(default="cross-entropy", metadata=_rule(_loss))
    beta: float | None = field(default=None, metadata=_rule(_positive(optional=True)))
    beta_ratio: float = field(default=0.05, metadata=_rule(_positive(optional=False)))
    pool: str | None = field(default="mean", metadata=_rule(_pool))
    grid: Any = field(default=None, metadata=_rule(_as_given))
    n_gates: int | str = field(default=50, metadata=_rule(_count("all")))
    gates: Any = field(default=None, metadata=_rule(_as_given))
    n_blocks: int = field(default=4, metadata=_rule(_count()))
    outputs: str = field(default="shared", metadata=_rule(_one_of(OUTPUTS)))
    n_queries: int = field(default=192, metadata=_rule(_count()))
    queries: Any = field(default=None, metadata=_rule(_queries))
    query_scale: float = field(default=2.0, metadata=_rule(_positive(optional=False)))
    query_position: bool = field(default=True, metadata=_rule(_flag))
    key_dim: int | None = field(default=None, metadata=_rule(_count(None)))
    query_norm: str = field(default="all", metadata=_rule(_one_of(QUERY_NORMS)))
    fit_intercept: bool = field(default=False, metadata=_rule(_flag))
    class_weight: Any = field(default=None, metadata=_rule(_class_weight))
    label_smoothing: float = field(default=0.0, metadata=_rule(_share))
    pos_weight: Any = field(default=None, metadata=_rule(_positive_weight))
    ignore_index: int = field(default=-1, metadata=_rule(_whole))
    solver: str = field(default="auto", metadata=_rule(_one_of(NAMES)))
    tol: float = field(default=1e-3, metadata=_rule(_positive(optional=False)))
    max_heads: int | None = field(default=None, metadata=_rule(_count(None)))
    max_time: float | None = field(default=None, metadata=_rule(_positive(optional=True), may_change=True))
    max_memory: float | None = field(default=None, metadata=_rule(_positive(optional=True), may_change=True))
    random_state: Any = field(default=None, metadata=_rule(_as_given))
    device: str = field(default="auto", metadata=_rule(_as_given, may_change=True))
    distributed: bool = field(default=False, metadata=_rule(_flag, may_change=True))
    verbose: int = field(default=0, metadata=_rule(_level, may_change=True))

    def __post_init__(self) -> None:
        for each in fields(self):
            value = each.metadata["check"](each.name, getattr(self, each.name))
            object.__setattr__(self, each.name, value)

    def facts(self) -> dict[str, Any]:
        """What determines the iterates besides the data, as JSON values: a checkpoint is of one such fit."""
        return {
            each.name: described(getattr(self, each.name))
            for each in fields(self)
            if not each.metadata["may_change"] and not (each.name in LATER and getattr(self, each.name) == each.default)
        }

    @property
    def searches_queries(self) -> bool:
        """Whether the queries of an attentive head are found."""
        return self.head == "attentive" and isinstance(self.queries, str) and self.queries == SEARCH

    def make_head(
        self,
        n_tokens: int,
        n_channels: int,
        *,
        grid: tuple[int, int] | None = None,
        queries: Tensor | None = None,
        ball: QueryBall | None = None,
    ) -> Head:
        """The head for tokens ``(n_tokens, n_channels)``, which lie on ``grid`` unless the settings name one.

        ``queries`` are those of an attentive head, explicit, sampled, or found in a ``ball``.
        """
        return make_head(
            self.head,
            n_tokens,
            n_channels,
            pool="none" if self.pool is None else self.pool,
            grid=grid if self.grid is None else self.grid,
            n_blocks=self.n_blocks,
            outputs=self.outputs,
            queries=queries,
            query_norm=self.query_norm if ball is None else "each",
            ball=ball,
        )
