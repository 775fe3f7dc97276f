"""The reduction of a store: fitted on its own train tokens, or taken from elsewhere as it is; and a run's metric."""

from __future__ import annotations

from pathlib import Path
from typing import NotRequired, TypedDict

from convexhead.tokens.fit_reduction import add_metric, fit_reduction
from convexhead.tokens.reduce import Reduction
from convexhead.tokens.store.files import sha256_file, write_atomic
from convexhead.tokens.store.manifest import Manifest
from convexhead.tokens.store.view import SplitView


class Fit(TypedDict):
    """What is asked of the fitted reduction, see `fit_reduction`."""

    standardize: bool
    components: int | None
    constant: bool
    groups: NotRequired[list[int]]


def store_reduction(folder: Path, manifest: Manifest, fit: Fit | Reduction) -> None:
    """Write the reduction of the store in ``folder``: fitted on the stored train tokens, or ``fit`` as it is."""
    if not isinstance(fit, Reduction):
        fit = fit_reduction(SplitView(folder, manifest, "train", reduction=None).tokens_there(raw=True), **fit)
    write_atomic(folder / manifest.reduction, fit.to_bytes())
    manifest.reduction_sha256 = sha256_file(folder / manifest.reduction)


def whitened(train: SplitView, whiten: float) -> SplitView:
    """Return ``train`` in the metric of its own tokens, which a head that is fitted on it keeps and reads others in.

    Class tokens that ``pool="cls"`` reads are mapped as the other tokens are.

    Parameters
    ----------
    train
        The images to fit the metric on. Take those to train on of the result, with `SplitView.subset`.
    whiten
        ``a`` in [0, 1]: 0 leaves the tokens as they are, 1 makes their second moment the identity, see
        `convexhead.tokens.fit_reduction`.

    Raises
    ------
    InputError
        ``whiten`` is not in [0, 1], or the tokens are whitened already.
    """
    if train.reduction is None:
        return train.reduced(
            fit_reduction(train.tokens_there(), standardize=False, components=None, constant=False, whiten=whiten)
        )
    return train.reduced(add_metric(train.reduction, train.tokens_there(), whiten))
