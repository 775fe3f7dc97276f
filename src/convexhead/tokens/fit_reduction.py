"""Fitting a `Reduction` on the train tokens: one pass, chunk by chunk, in float64.

The metric of the tokens is part of it. With the second moment ``S = (1/N) Σ x xᵀ = E diag(λ) Eᵀ`` of the ``N`` train
tokens ``x (k,)``, as they come out of standardisation and principal components,

    M = E diag(max(λ, f)^{−a/2}) Eᵀ,    f = FLOOR · max λ

follows as a last linear map (`whiten`, ``a`` in [0, 1]): 0 leaves the tokens as they are, and 1 makes their second
moment the identity. ``M`` is symmetric, so that channels keep their places. The constant channel stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import InputError
from convexhead.tokens.reduce import Reduction

FLOOR = 1e-6
"""Smallest eigenvalue of the second moment, as a share of the largest: directions below are stretched as if they had
it. Numbers of 11 bits (float16) have rounding errors with about a tenth of this share, which must not become tokens."""


def fit_reduction(
    chunks: Iterable[NDArray[Any]],
    *,
    standardize: bool,
    components: int | None,
    constant: bool,
    groups: Sequence[int] | None = None,
    whiten: float = 0.0,
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
    groups
        Numbers of channels of several layers side by side: after standardisation each group is multiplied by a factor
        of its own, so that all have the same sum of squares over the train tokens, and together that of ``d`` channels
        of variance 1. Else a layer would weigh as much as it has channels. None: one group, without a factor.
    whiten
        ``a``, how far to whiten what the steps before leave.

    Raises
    ------
    InputError
        No tokens, ``components`` not in ``1 .. d``, groups of another number of channels, or ``whiten`` not in [0, 1].
    """
    check_whiten(whiten)
    moments = _Moments.of(chunks, full=components is not None or whiten > 0)
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
    if groups is not None:
        scale = scale * _factors(groups, scale**2 * (moments.variance + (moments.mean - mean) ** 2))
    basis = None
    if components is not None:
        basis = _principal_axes(scale[:, None] * moments.covariance * scale, components)
    fitted = Reduction(
        mean.astype(np.float32),
        scale.astype(np.float32),
        None if basis is None else basis.astype(np.float32),
        constant,
        {"standardize": standardize, "components": components, "constant": constant}
        | ({} if groups is None else {"groups": list(groups)}),
    )
    if not whiten:
        return fitted
    away = scale * (moments.mean - mean)
    second = scale[:, None] * moments.covariance * scale + np.outer(away, away)
    return _followed(fitted, second if basis is None else basis.T @ second @ basis, whiten)


def _factors(groups: Sequence[int], squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """The factor of each channel, given the mean squares of all channels; 1 for a group of zeros."""
    d = len(squares)
    if sum(groups) != d:
        raise InputError(f"groups of {' + '.join(map(str, groups))} channels are not the {d} channels of the tokens")
    sums = [part.sum() for part in np.split(squares, np.cumsum(groups)[:-1])]
    return np.repeat([np.sqrt(d / (len(groups) * total)) if total > 0 else 1.0 for total in sums], groups)


def check_whiten(whiten: Any) -> None:
    """Refuse what is no exponent of a metric.

    Raises
    ------
    InputError
        Not a number in [0, 1].
    """
    if isinstance(whiten, bool) or not isinstance(whiten, Real) or not 0 <= float(whiten) <= 1:
        raise InputError(f"whiten must be a number from 0 (tokens as they are) to 1 (fully white), got {whiten!r}")


def add_metric(reduction: Reduction, chunks: Iterable[NDArray[Any]], whiten: float) -> Reduction:
    """Return ``reduction`` with the metric of the tokens that come out of it; with ``whiten=0`` as it is.

    Parameters
    ----------
    reduction
        Which has no metric yet.
    chunks
        Arrays ``(k, s, channels)`` of reduced train tokens, with the constant channel if there is one.
    whiten
        ``a``.

    Raises
    ------
    InputError
        ``whiten`` is not in [0, 1], no tokens, or a reduction that has a metric.
    """
    check_whiten(whiten)
    if not whiten:
        return reduction
    if "whiten" in reduction.options:
        raise InputError(
            f"these tokens are whitened already (whiten={reduction.options['whiten']:g}), as those of the run that "
            "they were extracted like: leave whiten out"
        )
    k = reduction.channels - reduction.constant
    moments = _Moments.of((chunk[..., :k] for chunk in chunks), full=True)
    return _followed(reduction, moments.covariance + np.outer(moments.mean, moments.mean), whiten)


def _followed(reduction: Reduction, second: NDArray[np.float64], whiten: float) -> Reduction:
    """``reduction`` followed by ``M`` of the second moment ``(k, k)`` of what comes out of it."""
    values, E = np.linalg.eigh(second)
    floor = FLOOR * values[-1] or 1.0  # tokens of zeros stay so
    M = (E * np.maximum(values, floor) ** (-float(whiten) / 2)) @ E.T
    basis = M if reduction.basis is None else reduction.basis @ M
    options = {**reduction.options, "whiten": float(whiten)}
    return replace(reduction, basis=basis.astype(np.float32), options=options)


class _Moments:
    """Running first and second moments about a fixed shift, which keeps the cancellation harmless.

    ``second`` is ``(d, d)`` where the full covariance is wanted, else its diagonal ``(d,)``.
    """

    def __init__(self, shift: NDArray[np.float64], full: bool) -> None:
        self.shift = shift
        self.count = 0
        self.first = np.zeros_like(shift)
        self.second = np.zeros((len(shift), len(shift)) if full else len(shift))

    @classmethod
    def of(cls, chunks: Iterable[NDArray[Any]], full: bool) -> _Moments:
        """The moments of all tokens of ``chunks``, arrays ``(k, s, d)``."""
        moments: _Moments | None = None
        for chunk in chunks:
            tokens = chunk.reshape(-1, chunk.shape[-1]).astype(np.float64)
            moments = moments or cls(shift=tokens.mean(axis=0), full=full)
            moments.add(tokens)
        if moments is None:
            raise InputError("a reduction needs at least one token to be fitted on")
        return moments

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
