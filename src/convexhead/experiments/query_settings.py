"""Which queries an attentive head samples, where several heads are trained in one run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

from convexhead.errors import InputError
from convexhead.spec import Spec


@dataclass(frozen=True)
class QuerySettings:
    """Settings of the attentive head, as `ConvexHeadClassifier` takes them; other heads have none of them.

    Attributes
    ----------
    n_queries : int
    query_scale : float
    query_position : bool
    key_dim : int or None
    query_norm : {"all", "each"}

    Raises
    ------
    InputError
        A value that is not possible.
    """

    n_queries: int = Spec.n_queries
    query_scale: float = Spec.query_scale
    query_position: bool = Spec.query_position
    key_dim: int | None = Spec.key_dim
    query_norm: str = Spec.query_norm

    def __post_init__(self) -> None:
        Spec(head="attentive", **asdict(self))

    def check_used(self, heads: Iterable[str]) -> None:
        """Refuse settings that none of ``heads`` would read."""
        given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        if given and "attentive" not in heads:
            raise InputError(f"{given[0]} is a setting of the attentive head: add 'attentive' to the heads")
