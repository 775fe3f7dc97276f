"""What is known of the images of a split: a class, several, numbers, or a class for every pixel."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens.reduce import pool_grid
from convexhead.tokens.store.manifest import Manifest
from convexhead.tokens.store.origin import refuse_strangers

FloatArray = NDArray[np.float32]


class KnownOfImages:
    """A part of `SplitView`: labels, targets and weights as the shards have them.

    Attributes
    ----------
    class_names
        What labels, or the columns of targets, mean.
    """

    class_names: list[str]
    token_pool: tuple[int, int] | None
    _folder: Path
    _manifest: Manifest
    _numbers: NDArray[np.int64] | None
    _with_class_token: bool

    def _take(self, name: str, rows: Any) -> NDArray[Any]:
        """Return the rows of a stored array."""
        raise NotImplementedError

    @property
    def task(self) -> str:
        """What is known of an image: ``"classes"``, one each; ``"multi-label"``, which of several classes it has;
        ``"regression"``, numbers; ``"masks"``, a class for every pixel."""
        config = self._manifest.config
        return "masks" if "masks" in config else str(config.get("task", "classes"))

    @property
    def has_masks(self) -> bool:
        """Whether the images have masks: tokens then have targets, and images no label."""
        return self.task == "masks"

    @cached_property
    def known(self) -> NDArray[Any]:
        """``labels`` of images with one class each, else ``targets``."""
        return self.labels if self.task == "classes" else self.targets

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """int64 ``(n,)``, indices into ``class_names``.

        Raises
        ------
        InputError
            A view made by `read_as` holds images of a class that the head does not know.
        FileFormatError
            A label that is no class.
        """
        if self.task != "classes":
            raise InputError(f"{str(self._folder)!r} {NO_LABELS[self.task]}")
        labels: NDArray[np.int64] = self._take("labels", slice(None))
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self._manifest.class_names):
            raise FileFormatError(
                f"{str(self._folder)!r} has a label that is none of its {len(self._manifest.class_names)} classes: "
                "find the damaged shard with `convexhead store verify`"
            )
        if self._numbers is None:
            return labels
        refuse_strangers(self._manifest.class_names, self._numbers, np.unique(labels), repr(str(self._folder)))
        numbered: NDArray[np.int64] = self._numbers[labels]
        return numbered

    @cached_property
    def targets(self) -> NDArray[Any]:
        """Of images with masks float32 ``(n, s, c)``: the distribution of the labels of each token's pixels, zeros
        where none has one. Of images with several classes, or with numbers, float64 ``(n, c)``.

        Raises
        ------
        InputError
            Images with one class each; or pixels of a class, or columns, that the head of `read_as` does not know.
        """
        if self.task == "classes":
            raise InputError(f"{str(self._folder)!r} has no masks, but one class for each image: read `labels`")
        return self._of_pixels() if self.has_masks else self._of_images()

    def _of_images(self) -> NDArray[np.float64]:
        targets: NDArray[np.float64] = self._take("targets", slice(None))
        there, ours = self._manifest.class_names, self.class_names
        if targets.shape[1:] != (len(there),) or not np.isfinite(targets).all():
            raise FileFormatError(
                f"{str(self._folder)!r} has targets that do not fit its {len(there)} columns: find the damaged shard "
                "with `convexhead store verify`"
            )
        if self._numbers is None:
            return targets
        if sorted(there) != sorted(ours):
            odd = sorted(set(there) ^ set(ours))
            raise InputError(
                f"{str(self._folder)!r} has the columns {', '.join(map(repr, there[:5]))}, this head was trained on "
                f"{', '.join(map(repr, ours[:5]))}: {odd[0]!r} is in one of them only; give both the same columns"
            )
        return targets[:, [there.index(name) for name in ours]]

    def _of_pixels(self) -> FloatArray:
        targets, weights = self._shares()
        total = targets.sum(2, keepdims=True)
        targets = np.divide(targets, total, out=np.zeros_like(targets), where=total > 0)
        if self._numbers is None:
            return targets.astype(np.float32)
        present = np.flatnonzero(targets.any((0, 1)))
        refuse_strangers(self._manifest.class_names, self._numbers, present, repr(str(self._folder)))
        known, out = np.flatnonzero(self._numbers >= 0), np.zeros((*weights.shape, len(self.class_names)), np.float32)
        out[..., self._numbers[known]] = targets[..., known]
        return out

    @cached_property
    def weights(self) -> FloatArray:
        """Float32 ``(n, s)``: the share of each token's pixels that has a label."""
        return self._shares()[1].astype(np.float32)

    def _shares(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Shares of classes ``(n, s, c)`` and their sums ``(n, s)``, pooled as the tokens are."""
        if not self.has_masks:
            raise InputError(f"{str(self._folder)!r} has no masks: extract images that have some")
        if self._with_class_token:
            raise InputError("the class token covers no pixels: read the patches of images with masks, pool=None")
        weights = self._take("weights", slice(None)).astype(np.float64)
        shares = self._take("targets", slice(None)).astype(np.float64) * weights[..., None]
        if self.token_pool is not None:
            shares = pool_grid(torch.from_numpy(shares), self._manifest.grid, self.token_pool).numpy()
            weights = shares.sum(2)
        return shares, weights


NO_LABELS = {
    "masks": "has a mask for each image and no label: its tokens have, pool=None",
    "multi-label": "has several classes an image, or none: these are its targets, loss='binary-cross-entropy'",
    "regression": "has numbers and no classes: these are its targets, loss='squared'",
}
"""Why images have no label, by what is known of them."""
