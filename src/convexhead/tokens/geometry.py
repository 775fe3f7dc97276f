"""Where the pixels of a prepared image lie in the image that it was made of, and what of a mask each token covers.

A preprocessing that resizes and crops is an affine map of each axis. It is not read out of settings but measured: a
ramp from black to white tells it roughly, and then edges of bars tell it to a few hundredths of a prepared pixel. So
it is right for any backbone, and one that does something else is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convexhead.errors import InputError, require
from convexhead.tokens.reduce import pool_grid

if TYPE_CHECKING:
    from PIL import Image

Array = NDArray[np.float64]
STEPS = 16
"""Parts of a pixel that edges are rounded to. Chosen by hand: about what can be measured."""
DARK, LIGHT = 64.0, 191.0
"""Levels of bars. Chosen by hand: what interpolation adds beyond them at an edge is not cut off."""
NEAR = 0.15
"""Distance, in prepared pixels, of a measured edge from a whole pixel that counts as none. Chosen by hand: measurements
are a few hundredths off."""
OFF = 0.5
"""Largest distance, in prepared pixels, of an edge from where an affine map puts it. Chosen by hand."""


class Window(NamedTuple):
    """The edges of a prepared image, in pixels of the image that it was made of; they may lie outside of that."""

    left: float
    top: float
    right: float
    bottom: float


def measure_window(prepare: Callable[[Image.Image], Tensor], size: tuple[int, int]) -> Window:
    """The part of images of ``size = (width, height)`` that ``prepare`` shows.

    Raises
    ------
    InputError
        The images are too small to tell, or ``prepare`` does not only resize and crop.
    """
    width, height = size
    if min(size) < 8:
        raise InputError(f"images of {width}x{height} pixels are too small for masks: 8 pixels a side are needed")

    image = require("PIL.Image", "images")

    def prepared(levels: Array) -> Array:
        grey = image.fromarray(levels.astype(np.uint8)).convert("RGB")
        return prepare(grey)[0].double().numpy()

    black, white = (prepared(np.full((height, width), level)) for level in (0.0, 255.0))

    def profile(levels: Array, axis: int) -> Array:
        """Of levels that change along one axis, what they become along it; NaN where there is padding."""
        values = prepared(np.broadcast_to(levels if axis else levels[:, None], (height, width)))
        known = white != black
        share = np.divide(values - black, white - black, out=np.full_like(values, np.nan), where=known)
        known_rows = share[~np.isnan(share).all(1)] if axis else share[:, ~np.isnan(share).all(0)].T
        return 255 * known_rows[len(known_rows) // 2] if len(known_rows) else np.full(share.shape[axis], np.nan)

    left, right = _edges(lambda levels: profile(levels, 1), width)
    top, bottom = _edges(lambda levels: profile(levels, 0), height)
    return Window(left, top, right, bottom)


def _edges(profile: Callable[[Array], Array], length: int) -> tuple[float, float]:
    """The edges of the prepared axis, in pixels of the image's."""
    refused = InputError(
        "the preprocessing of this backbone does not only resize and crop, so masks cannot follow it: choose another "
        "backbone, or larger images"
    )
    ramp = profile(np.linspace(0.0, 255.0, length))
    inside = np.flatnonzero((ramp > DARK) & (ramp < LIGHT))
    if len(inside) < 3:
        raise refused
    slope, start = np.polyfit(inside + 0.5, ramp[inside] * (length - 1) / 255 + 0.5, 1)
    if slope <= 0:
        raise refused
    n_edges = int(np.clip(min(length, length / slope) / 16, 2, 8))
    edges = np.rint(np.linspace(0.25, 0.75, n_edges) * length)
    step = min(np.diff(edges).min() / 2, edges[0], length - edges[-1])
    bars = profile(np.where(np.searchsorted(edges, np.arange(length), "right") % 2, LIGHT, DARK))
    places = []
    for k, edge in enumerate(edges):
        first, last = (round((edge + side - start) / slope) for side in (-step, step))
        light = (bars[max(first, 0) : last] - DARK) / (LIGHT - DARK)
        if first < 0 or last > len(bars) or np.isnan(light).any():
            places.append(np.nan)  # it is cropped
        else:
            places.append(last - light.sum() if k % 2 == 0 else first + light.sum())
    seen = ~np.isnan(places)
    if seen.sum() < 2:
        raise refused
    slope, start = np.polyfit(np.asarray(places)[seen], edges[seen], 1)
    if np.abs(start + slope * np.asarray(places)[seen] - edges[seen]).max() > OFF * slope:
        raise refused
    return _exact(float(start), float(slope), len(bars), length)


def _exact(start: float, unit: float, n_pixels: int, length: int) -> tuple[float, float]:
    """The edges, given that an image is scaled to a whole number of pixels, of which whole ones are cropped.

    Where what was measured is not of that kind it is rounded only.
    """
    whole = length / max(1, round(length / unit))
    cropped = round(start / whole) * whole
    off = abs(start - cropped), abs(start + unit * n_pixels - cropped - whole * n_pixels)
    if max(off) < NEAR * unit:
        return cropped, cropped + whole * n_pixels
    return round(start * STEPS) / STEPS, round((start + unit * n_pixels) * STEPS) / STEPS


def patch_targets(
    mask: NDArray[np.int16],
    window: Window,
    grid: tuple[int, int],
    n_classes: int,
    token_pool: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The distribution of the labels of each token's pixels, and the share of its area that has a label.

    Parameters
    ----------
    mask : int16 array (H, W)
        Classes, −1 for pixels that do not count.
    window : Window
        What the prepared image shows of the image.
    grid : (int, int)
        ``(h, w)`` of the backbone's tokens, which divide the window evenly.
    token_pool : (int, int) or None
        The grid that tokens are then averaged down to.

    Returns
    -------
    targets : Tensor (s, c), float32
        Rows sum to 1, or are 0 where nothing has a label.
    weights : Tensor (s,), float32
    """
    down = _overlaps(window.top, window.bottom, grid[0], mask.shape[0])
    across = _overlaps(window.left, window.right, grid[1], mask.shape[1])
    areas = np.zeros((*grid, n_classes))
    for label in np.unique(mask[mask >= 0]):
        areas[..., label] = down @ (mask == label) @ across.T
    shares = torch.from_numpy(areas.reshape(-1, n_classes))
    if token_pool is not None:
        shares = pool_grid(shares[None], grid, token_pool)[0]
    weights = shares.sum(1)
    targets = torch.where(weights[:, None] > 0, shares / weights[:, None], 0.0)
    return targets.float(), weights.clamp(max=1.0).float()


def _overlaps(first: float, last: float, cells: int, pixels: int) -> Array:
    """Which share of each cell each pixel is, ``(cells, pixels)``; rows sum to less than 1 beyond the image."""
    edges = np.linspace(first, last, cells + 1)
    start, stop = edges[:-1, None], edges[1:, None]
    place = np.arange(pixels)
    return np.clip(np.minimum(stop, place + 1) - np.maximum(start, place), 0, None) / (stop - start)
