"""The reduction of a store: fitted on its own train tokens, or taken from elsewhere as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from convexhead.tokens.fit_reduction import fit_reduction
from convexhead.tokens.reduce import Reduction
from convexhead.tokens.store.files import sha256_file, write_atomic
from convexhead.tokens.store.manifest import Manifest
from convexhead.tokens.store.view import SplitView


class Fit(TypedDict):
    """What is asked of the fitted reduction, see `fit_reduction`."""

    standardize: bool
    components: int | None
    constant: bool


def store_reduction(folder: Path, manifest: Manifest, fit: Fit | Reduction) -> None:
    """Write the reduction of the store in ``folder``: fitted on the stored train tokens, or ``fit`` as it is."""
    if not isinstance(fit, Reduction):
        fit = fit_reduction(SplitView(folder, manifest, "train", reduction=None).raw_chunks(), **fit)
    write_atomic(folder / manifest.reduction, fit.to_bytes())
    manifest.reduction_sha256 = sha256_file(folder / manifest.reduction)
