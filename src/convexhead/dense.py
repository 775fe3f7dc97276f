"""Labels of pixels from heads with an output for every token: up-sampled, and scored against masks.

Probabilities of tokens are interpolated linearly between the centres of what the tokens cover, and the likeliest class
of each pixel is compared with its mask. Pixels whose mask is void do not count, and neither do those that the backbone
does not see, since its preprocessing crops them: `PixelScores.unseen` is their share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from convexhead.errors import InputError
from convexhead.resampling import DRAWS, percentiles
from convexhead.tokens.geometry import Window, measure_window, patch_targets
from convexhead.tokens.like import open_backbone_like, options_like
from convexhead.tokens.sources.base import ImageSource, MaskSource
from convexhead.tokens.sources.open import open_source
from convexhead.tokens.store.view import SplitView

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class PixelScores:
    """How the pixels of images are labelled.

    Attributes
    ----------
    confusions : int array (n, c, c)
        Of each image, pixels by their true class (rows) and the predicted one.
    class_names : list of str
    unseen : float
        The share of pixels with a label that the backbone did not see; they are not scored.
    """

    confusions: Int[Array, "n c c"]
    class_names: list[str]
    unseen: float

    @property
    def iou(self) -> Float[Array, " c"]:
        """Of each class, pixels in both mask and prediction over those in either; NaN of one that is in neither."""
        return class_iou(self.confusions.sum(0))

    @property
    def mean_iou(self) -> float:
        """The mean of `iou` over the classes that occur."""
        return mean_iou(self.confusions.sum(0))

    @property
    def accuracy(self) -> float:
        """The share of pixels that are right."""
        return pixel_accuracy(self.confusions.sum(0))

    def interval(self, statistic: Callable[[Array], float]) -> tuple[float, float] | None:
        """The 95% interval of ``statistic`` of a confusion matrix over images drawn with replacement; None where it is
        the same for all draws, as of a single image."""
        rng, n = np.random.default_rng(0), len(self.confusions)
        draws = [statistic(np.tensordot(_counts(rng, n), self.confusions, 1)) for _ in range(DRAWS)]
        found = percentiles(np.array(draws))
        return None if np.isnan(found[0]) else found


def _counts(rng: np.random.Generator, n: int) -> NDArray[np.int64]:
    return np.bincount(rng.integers(0, n, n), minlength=n)


def class_iou(confusion: Array) -> Float[Array, " c"]:
    """Of a confusion matrix, the intersection over union of each class."""
    both = np.diag(confusion).astype(float)
    either = confusion.sum(0) + confusion.sum(1) - both
    return np.divide(both, either, out=np.full(len(both), np.nan), where=either > 0)


def mean_iou(confusion: Array) -> float:
    """The mean intersection over union of the classes that occur."""
    return float(np.nanmean(class_iou(confusion)))


def pixel_accuracy(confusion: Array) -> float:
    """The share of pixels on the diagonal."""
    return float(np.trace(confusion) / max(1, confusion.sum()))


def token_iou(clf: Any, view: SplitView, targets: Array, weights: Array) -> float:
    """The mean IoU of tokens, each counted by the pixels that it covers: what β is chosen by where pixels are scored.

    Parameters
    ----------
    clf : ConvexHeadClassifier
        With ``pool=None``.
    view : SplitView
    targets, weights : array (n, s, c), (n, s)
        As `SplitView` has them.
    """
    predicted = clf.predict_proba(view).argmax(2)
    told = np.eye(targets.shape[2])[predicted] * weights[..., None]
    return mean_iou(np.einsum("nsi,nsj->ij", targets.astype(float), told, optimize=True))


class Prediction(NamedTuple):
    """Of one image: its name, ``truth`` and ``labels`` ``(H, W)`` with −1 for void and for what was not seen."""

    name: str
    truth: NDArray[np.int16]
    labels: NDArray[np.int16]


def upsample(
    p: Float[Array, "s c"], grid: tuple[int, int], window: Window, size: tuple[int, int]
) -> tuple[Float[Array, "h w c"], slice, slice]:
    """Values of tokens at the pixels of an image of ``size = (width, height)`` whose centres lie in the window.

    Returns
    -------
    values, rows, columns
        Linear between the centres of tokens, constant beyond the outermost; which pixels they are of.
    """
    rows, down = _interpolation(window.top, window.bottom, grid[0], size[1])
    columns, across = _interpolation(window.left, window.right, grid[1], size[0])
    tokens = p.reshape(*grid, -1)
    return np.einsum("yi,ijc,xj->yxc", down, tokens, across, optimize=True), rows, columns


def likeliest(
    p: Float[Array, "s c"], grid: tuple[int, int], window: Window, size: tuple[int, int]
) -> Int[Array, "h w"]:
    """The likeliest class of every pixel of an image of ``size = (width, height)``, −1 outside of the window."""
    values, rows, columns = upsample(p, grid, window, size)
    labels = np.full(size[::-1], -1, np.int16)
    labels[rows, columns] = values.argmax(2)
    return labels


def _interpolation(first: float, last: float, cells: int, pixels: int) -> tuple[slice, Array]:
    centres = np.arange(pixels) + 0.5
    inside = np.flatnonzero((centres > first) & (centres < last))
    place = np.clip((centres[inside] - first) / (last - first) * cells - 0.5, 0, cells - 1)
    below = np.minimum(place.astype(int), max(cells - 2, 0))
    weights = np.zeros((len(inside), cells))
    rows = np.arange(len(inside))
    weights[rows, np.minimum(below + 1, cells - 1)] = place - below
    weights[rows, below] += 1 - (place - below)
    return slice(int(inside[0]), int(inside[-1]) + 1), weights


def predict_masks(clf: Any, view: SplitView, images: str | ImageSource) -> Iterator[Prediction]:
    """Yield the labels that a head gives to the pixels of every image.

    Parameters
    ----------
    clf : ConvexHeadClassifier
        Fitted with ``pool=None`` on a store of images with masks.
    view : SplitView
        A split of such a store.
    images : path or MaskSource
        Where its images and masks are.

    Raises
    ------
    InputError
        Other masks than those that the store was made of, other classes than the head's, or a head that pools tokens.
    """
    origin = view.origin()
    if clf.pool is not None or not view.has_masks:
        raise InputError("labels of pixels need a head with pool=None, and a store of images with masks")
    if clf.class_names_ != view.class_names:
        raise InputError(
            f"the head has the classes {clf.class_names_}, the store {view.class_names}: extract with like"
        )
    view = clf.as_fitted_on(view)
    source = open_source(images)
    if not isinstance(source, MaskSource):
        raise InputError(f"{source.spec!r} has no masks: give the folder that {view!r} was extracted from")
    source = source.like(view.class_names, origin.config["masks"]["void"])
    given = {"backbone": None, "image_size": None, "crop_pct": None}
    backbone = open_backbone_like(origin, options_like(origin, given))
    rows = {name: i for i, name in enumerate(source.files(view.split))}
    windows: dict[tuple[int, int], Window] = {}
    grids, files, targets = view.grids.tolist(), view.files, view.targets
    for i, name in enumerate(files):
        if name not in rows:
            raise InputError(f"{name!r} is no longer in {source.spec!r}: give the images of the store")
        truth = source.mask(view.split, rows[name])
        size = (truth.shape[1], truth.shape[0])
        if size not in windows:
            windows[size] = measure_window(backbone.prepare, size)
        h, w = grids[i]
        made = patch_targets(truth, windows[size], (h, w), targets.shape[2])[0].numpy()
        if not np.allclose(made, targets[i, : h * w], atol=1e-5):
            raise InputError(
                f"the mask of {name!r} is not what its tokens' targets were made of: extract again if it has changed, "
                "or, where tokens were averaged to a coarser grid, to one that divides theirs"
            )
        p = clf.predict_proba(view.subset(np.array([i])))[0, : h * w]
        yield Prediction(name, truth, likeliest(p, (h, w), windows[size], size))


def pixel_scores(clf: Any, view: SplitView, images: str | ImageSource) -> PixelScores:
    """Compare the labels of pixels with masks; parameters as of `predict_masks`."""
    c, confusions, seen, labelled = len(view.class_names), [], 0, 0
    for each in predict_masks(clf, view, images):
        counted = (each.truth >= 0) & (each.labels >= 0)
        pairs = each.truth[counted].astype(np.int64) * c + each.labels[counted]
        confusions.append(np.bincount(pairs, minlength=c * c).reshape(c, c))
        seen, labelled = seen + int(counted.sum()), labelled + int((each.truth >= 0).sum())
    if not seen:
        raise InputError("no pixel has a label: there is nothing to score")
    return PixelScores(np.stack(confusions), view.class_names, 1 - seen / labelled)
