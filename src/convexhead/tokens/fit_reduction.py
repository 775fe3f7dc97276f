"""Fitting a `Reduction` on the train tokens: one pass, chunk by chunk, in float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import InputError
from convexhead.tokens.reduce import Reduction


def fit_reduction(
    chunks: Iterable[NDArray[Any]], *, standardize: bool, components: int | None, constant: bool
) -> Reduction:
    """Fit a `Reduction` on the train tokens in one pass, in float64.

    Parameters
    ----------
    chunks
        Arrays ``(k, s, d)`` of any float type; none is kept.
    standardize
        Divide every channel by its standard deviation over all tokens of all images; a channel
        that does not vary is only centred.
    components
        Number of principal components (after standardisation) to keep, or None for all channels.
    constant
        Append a channel of ones.

    Raises
    ------
    InputError
        No tokens, or ``components`` not in ``1 .. d``.
    """
    moments: _Moments | None = None
    for chunk in chunks:
        tokens = chunk.reshape(-1, chunk.shape[-1]).astype(np.float64)
        moments = moments or _Moments(shift=tokens.mean(axis=0), full=components is not None)
        moments.add(tokens)
    if moments is None:
        raise InputError("a reduction needs at least one token to be fitted on")

    d = len(moments.shift)
    if components is not None and not 1 <= components <= d:
        raise InputError(f"channels={components} must be between 1 and the {d} channels of the tokens")
    mean, scale = np.zeros(d), np.ones(d)
    if standardize or components is not None:
        mean = moments.mean
    if standardize:
        deviation = np.sqrt(moments.variance)
        # Rounding leaves a constant channel with a tiny deviation relative to its values.
        varies = deviation > 1e-7 * np.maximum(np.abs(mean), np.finfo(np.float32).tiny)
        scale = np.divide(1.0, deviation, out=np.ones(d), where=varies)
    basis = None
    if components is not None:
        basis = _principal_axes(scale[:, None] * moments.covariance * scale, components)
    return Reduction(
        mean.astype(np.float32),
        scale.astype(np.float32),
        None if basis is None else basis.astype(np.float32),
        constant,
        {"standardize": standardize, "components": components, "constant": constant},
    )


class _Moments:
    """Running first and second moments about a fixed shift, which keeps the cancellation harmless.

    ``second`` is ``(d, d)`` where the full covariance is wanted, else its diagonal ``(d,)``.
    """

    def __init__(self, shift: NDArray[np.float64], full: bool) -> None:
        self.shift = shift
        self.count = 0
        self.first = np.zeros_like(shift)
        self.second = np.zeros((len(shift), len(shift)) if full else len(shift))

    def add(self, tokens: NDArray[np.float64]) -> None:
        tokens -= self.shift
        self.count += len(tokens)
        self.first += tokens.sum(axis=0)
        self.second += tokens.T @ tokens if self.second.ndim == 2 else np.square(tokens).sum(axis=0)

    @property
    def mean(self) -> NDArray[np.float64]:
        mean: NDArray[np.float64] = self.shift + self.first / self.count
        return mean

    @property
    def covariance(self) -> NDArray[np.float64]:
        drift = self.first / self.count
        return self.second / self.count - np.outer(drift, drift)

    @property
    def variance(self) -> NDArray[np.float64]:
        second = self.second.diagonal() if self.second.ndim == 2 else self.second
        return np.maximum(second / self.count - (self.first / self.count) ** 2, 0.0)


def _principal_axes(covariance: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Return the leading ``k`` eigenvectors ``(d, k)``, each with its largest entry positive."""
    axes = np.linalg.eigh(covariance)[1][:, ::-1][:, :k]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)
    return axes * np.where(largest < 0, -1.0, 1.0)
