"""Tokens that were made elsewhere, in the place of a backbone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from convexhead.errors import InputError
from convexhead.tokens.backbones.base import Backbone, TokenBatch


class Arrangement(NamedTuple):
    """Of each sample's tokens ``n_prefix`` lie in front, the others on the ``grid``, row by row."""

    grid: tuple[int, int]
    n_prefix: int


class ImportedTokens(Backbone):
    """No network: hands tokens on, the class and register tokens apart.

    Parameters
    ----------
    spec
        ``imported:`` and what made the tokens, in the user's words, or ``imported@`` and where they were found.
    kind
        Two imports hold tokens of the same kind if these texts are equal.
    arrangement
        How they lie.
    """

    def __init__(self, spec: str, kind: str, arrangement: Arrangement) -> None:
        super().__init__()
        self.spec = spec
        self.layer = None
        self.weights_hash = ""
        self.preprocessing = {"imported": kind, "tokens in front": arrangement.n_prefix}
        self.arrangement = arrangement

    def prepare(self, image: Any) -> Tensor:
        tokens: Tensor = image
        return tokens

    def forward(self, images: Tensor) -> TokenBatch:
        grid, p = self.arrangement
        tokens = images.float()
        return TokenBatch(tokens[:, p:], tokens[:, :p], grid)


def arrange(n: int, apart: int, grid: tuple[int, int] | None, class_token: bool | None, registers: int) -> Arrangement:
    """Say how ``n`` tokens lie, of which ``apart`` came as an array of their own; nothing is guessed from numbers.

    Raises
    ------
    InputError
        What is said does not fit the tokens, or does not say enough.
    """
    if registers < 0 or (registers and not (class_token or apart)):
        raise InputError(f"registers={registers} are tokens behind a class token: they need class_token")
    if apart and (class_token is False or registers):
        raise InputError(f"the {apart} tokens in front are an array of their own: leave class_token and registers out")
    p = apart or (1 + registers if class_token else 0)
    s = n - p
    if s < 1:
        raise InputError(f"{n} tokens a sample leave none for the grid behind class token and {registers} registers")
    if grid is not None and math.prod(grid) != s:
        if math.prod(grid) == n - 1 and class_token is None:
            raise InputError(_tell(n, grid))
        raise InputError(f"grid={grid[0]}x{grid[1]} holds {math.prod(grid)} tokens, but there are {s}")
    if grid is not None:
        return Arrangement(grid, p)
    if class_token is None and not apart and n > 1 and math.isqrt(n - 1) ** 2 == n - 1:
        side = math.isqrt(n - 1)
        raise InputError(_tell(n, (side, side)))
    side = math.isqrt(s)
    if side * side != s:
        raise InputError(f"{s} tokens lie on no square: say their grid=(h, w), or (1, {s}) for a sequence")
    return Arrangement((side, side), p)


def _tell(n: int, grid: tuple[int, int]) -> str:
    return (
        f"{n} tokens a sample may be a class token and a grid of {grid[0]}x{grid[1]}: say class_token=True, or "
        "class_token=False with the grid=(h, w)"
    )
