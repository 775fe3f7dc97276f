"""Intervals and paired tests of any score of images, such as mean average precision, R² or mean IoU.

An outcome is what one method says of ``n`` images, and gives its score where image ``i`` counts ``w_i`` times.

* An interval has the percentiles of the score over images drawn with replacement (Efron's bootstrap). Where all draws
  have the same score, as of a single image or of a method that is always right, it tells nothing, and there is none.
* A paired test of two methods exchanges what they say of each image with probability one half, and asks how often their
  scores then differ by as much: approximate randomisation (Noreen, *Computer-Intensive Methods for Testing Hypotheses*,
  1989). Its null hypothesis is that the methods are alike on each image.

Images that belong together, as the frames of a drive, are drawn and exchanged together: the groups are independent, the
images in one are not. The same seed and number of images, or the same groups, give the same draws, for every method.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from convexhead.metrics import LEVEL

Array = NDArray[Any]
Groups = Int[Array, " n"]
DRAWS = 1000
"""Draws of a bootstrap and of a paired test, the usual number."""
CHUNK = 4_000_000
"""Weights of images in memory at a time. Chosen by hand: 32 MB."""
ROUNDING = 1e-12
"""Difference of two scores, relative to the larger of their size and 1, that is rounding. Derived: some thousands of
units in the last place of float64, for sums over images."""

O = TypeVar("O", bound="Outcome")  # noqa: E741 - an outcome


class Outcome(Protocol):
    """What a method says of images, and what is right."""

    def __len__(self) -> int:
        """The number of images."""

    def scores(self, weights: Float[Array, "k n"]) -> Float[Array, " k"]:
        """The score under each of ``k`` weightings of the images; NaN where it is not defined."""

    def joined(self: O, other: O) -> O:
        """The images twice: as this method and then as the other one has them."""


class Difference(NamedTuple):
    """How a method compares with another one on the same images.

    Attributes
    ----------
    value, low, high : float
        Its score minus the other's, and the 95% interval.
    p_value : float
        Two-sided; not below ``1 / (DRAWS + 1)``.
    """

    value: float
    low: float
    high: float
    p_value: float


def score(outcome: Outcome) -> float:
    """The score of all images alike."""
    return float(outcome.scores(np.ones((1, len(outcome))))[0])


def interval(outcome: Outcome, *, seed: int = 0, groups: Groups | None = None) -> tuple[float, float]:
    """The 95% percentile interval of the score over images, or groups, drawn with replacement.

    Parameters
    ----------
    outcome : Outcome
        Of ``n`` images.
    seed : int
    groups : int array (n,) or None
        The group of each image, numbered from 0; None: each image is one.

    Returns
    -------
    (float, float)
        NaN where no draw has a score, or all of them have the same.
    """
    return percentiles(_drawn(outcome, seed, groups))


def paired(first: O, second: O, *, seed: int = 0, groups: Groups | None = None) -> Difference:
    """Compare two methods on the same images; parameters are those of `interval`."""
    value = score(first) - score(second)
    both, n = first.joined(second), len(first)
    rng, as_large = np.random.default_rng([seed, 1]), 0
    for k in _chunks(2 * n):
        own = _of_images(rng.random((k, _units(n, groups))) < 0.5, groups)
        exchanged = both.scores(_pair(own)) - both.scores(_pair(~own))
        tie = ROUNDING * max(1.0, abs(value))
        # Where an exchange has no score it tells nothing against the null hypothesis.
        as_large += int((~(np.abs(exchanged) < abs(value) - tie)).sum())
    low, high = percentiles(_drawn(first, seed, groups) - _drawn(second, seed, groups))
    return Difference(value, low, high, (1 + as_large) / (1 + DRAWS))


def _pair(own: Bool[Array, "k n"]) -> Float[Array, "k m"]:
    return np.concatenate([own, ~own], 1).astype(float)


def _drawn(outcome: Outcome, seed: int, groups: Groups | None) -> Float[Array, " draws"]:
    rng, n = np.random.default_rng(seed), len(outcome)
    units = _units(n, groups)
    found = []
    for k in _chunks(n):
        counts = np.stack([np.bincount(rng.integers(0, units, units), minlength=units) for _ in range(k)])
        found.append(outcome.scores(_of_images(counts.astype(float), groups)))
    return np.concatenate(found)


def _units(n: int, groups: Groups | None) -> int:
    """How many are drawn: images, or groups."""
    return n if groups is None else int(groups.max()) + 1


def _of_images(drawn: Array, groups: Groups | None) -> Array:
    """What was drawn for each unit ``(k, units)`` as what it is for each image ``(k, n)``."""
    return drawn if groups is None else drawn[:, groups]


def _chunks(n: int) -> list[int]:
    size = max(1, CHUNK // n)
    return [min(size, DRAWS - start) for start in range(0, DRAWS, size)]


def percentiles(values: Float[Array, " draws"]) -> tuple[float, float]:
    """The 95% interval of drawn scores; NaN where none is known, or all are alike but for rounding."""
    known = values[~np.isnan(values)]
    if not len(known) or np.ptp(known) <= ROUNDING * max(1.0, float(np.abs(known).max())):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


# -- scores under many weightings -------------------------------------------------------------------------------------
def average_precisions(
    p: Float[Array, " n"], truth: Bool[Array, " n"], weights: Float[Array, "k n"]
) -> Float[Array, " k"]:
    """The average precision of one label under each weighting, as of `metrics.average_precision`: ties count together.

    NaN where no image with a weight has the label; 1 where all have it.
    """
    order = np.argsort(-p, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(p[order]) != 0, True))
    weights, right = weights[:, order], truth[order]
    hits, seen = np.cumsum(weights * right, 1)[:, ends], np.cumsum(weights, 1)[:, ends]
    precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
    total = hits[:, -1]
    value = (np.diff(hits, axis=1, prepend=0.0) * precision).sum(1)
    return np.divide(value, total, out=np.full(len(total), np.nan), where=total > 0)


def r_squareds(f: Float[Array, " n"], y: Float[Array, " n"], weights: Float[Array, "k n"]) -> Float[Array, " k"]:
    """R² of one column under each weighting; NaN where all numbers with a weight are equal."""
    total = weights.sum(1, keepdims=True)
    spread = (weights * (y - weights @ y[:, None] / total) ** 2).sum(1)
    error = weights @ (y - f) ** 2
    return 1 - np.divide(error, spread, out=np.full(len(spread), np.nan), where=spread > 0)
