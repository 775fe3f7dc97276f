"""Where each token of a network lies in the image: measured, never guessed from a number of tokens.

Let ``F(x)`` be the features of an image ``x`` of noise, and ``x_a`` the same image with other noise in its
``a``-th band of rows. Two facts are read off the network itself:

* **Which tokens are no patches.** A class, register or detection token enters the network as a parameter. Where a
  sequence of the features' length appears for the first time, exactly those positions do not depend on the
  image. The others must fill a grid, ``s - front - back = h * w``.
* **That the patches lie row by row.** Token ``t`` answers to band ``a`` with ``r_ta = |F(x_a)_t - F(x)_t|^2``. Its
  centroid ``sum_a a r_ta / sum_a r_ta`` must grow with the row in which the layout puts the token, and likewise
  for columns, and no shift may fit better. A transposed grid, tokens in the order of windows, or one token too many in
  front fail this. Only a map ``(b, d, h, w)`` need not
  pass: its order is that of its axes, and in a deep convolutional network without training every cell may answer to
  all pixels alike.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convexhead.errors import InputError
from convexhead.tokens.backbones.base import Backbone, TokenBatch

BANDS = 4
"""Number of bands of rows, and of columns, in which the pixels are changed. Chosen by hand."""
LOCAL = 0.7
"""Least correlation of a token's place with the centroid of the bands it answers to.

Sequences of patches have 0.83 and more, trained or not; windows, interleaved bits, a shift or a transposition at most
0.6 (measured by tests/tokens/backbones/test_layout.py and the table of test_hf_backbone.py)."""
CLEAR = (0.5, 0.85)
"""Correlations between these are measured on more noise before they are judged by `LOCAL`."""
ENOUGH, MOST = 48, 16
"""Least number of tokens, over all draws of noise, that a correlation is taken from, and most draws.

On 28 pixels, one draw gives the 2 x 2 tokens of DINOv2 a correlation of -0.05 to 0.97; twelve give 0.9 or more."""
REPEATED = 1e-2
"""Relative change of the features that a second call may make: rounding is some 1e-6, a random mask some 1."""


class Layout(NamedTuple):
    """How a network's features are laid out.

    Attributes
    ----------
    grid
        ``(h, w)``.
    channels_first
        Whether features are ``(b, d, h, w)``; else ``(b, h, w, d)`` or ``(b, s, d)``.
    front, back
        Number of tokens before and after those of the patches, of features ``(b, s, d)``.
    """

    grid: tuple[int, int]
    channels_first: bool = False
    front: int = 0
    back: int = 0

    def sequence(self, features: Tensor) -> Tensor:
        """Return the features as ``(b, front + h * w + back, d)``."""
        if features.ndim == 3:
            return features
        return features.flatten(2).transpose(1, 2) if self.channels_first else features.flatten(1, 2)

    def batch(self, features: Tensor) -> TokenBatch:
        """Divide features into the tokens of the patches and the others, first those in front."""
        sequence = self.sequence(features).float()
        front, tokens, back = sequence.split([self.front, self.grid[0] * self.grid[1], self.back], dim=1)
        return TokenBatch(tokens, torch.cat([front, back], dim=1) if self.back else front, self.grid)


class NetworkBackbone(Backbone):
    """A backbone whose tokens are features of a network, laid out as measured once for each size of images."""

    model: nn.Module

    layer: int | None

    def __init__(self, spec: str, layer: int | None, model: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.model = model
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._measuring = threading.Lock()

    def features(self, x: Tensor) -> Any:
        """Return what the network gives for normalised images, ``(b, d, h, w)``, ``(b, h, w, d)`` or ``(b, s, d)``."""
        raise NotImplementedError

    def layout(self, x: Tensor) -> Layout:
        """Return the layout of the features of images like ``x``.

        Raises
        ------
        InputError
            See `find_layout`, or the network cannot take such images.
        """
        size = tuple(x.shape[2:])
        with self._measuring:
            if size not in self._layouts:
                try:
                    self._layouts[size] = find_layout(self.features, self.model, x[0])
                except InputError as error:
                    raise InputError(f"{self.spec!r} {error}: choose another backbone or another layer") from error
                except torch.cuda.OutOfMemoryError:
                    raise
                except Exception as error:  # of any network's own code
                    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                    raise InputError(
                        f"{self.spec!r} gives no tokens for images of {size[0]}x{size[1]} pixels ({reason}): "
                        "choose another image_size or another backbone"
                    ) from error
        return self._layouts[size]


@torch.no_grad()
def find_layout(run: Callable[[Tensor], Any], model: nn.Module, image: Tensor) -> Layout:
    """Measure the layout of ``run(x)``, ``x`` of shape ``(b, *image.shape)``, which calls ``model``.

    Raises
    ------
    InputError
        Features that are no map or sequence, whose grid cannot be known, that do not lie row by row,
        or that another call does not repeat. The message is the end of a sentence about the model.
    """
    images = _banded(image)
    with _first_seen(model, len(images)) as constant:
        features = run(images)
    if not isinstance(features, Tensor) or features.ndim not in (3, 4) or len(features) != len(images):
        shape = f"of shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise InputError(f"gives features {shape}, not a map or a sequence of tokens for each image")
    again = run(images[:1])
    if not (again - features[:1]).norm() <= REPEATED * features[:1].norm():
        raise InputError("gives other tokens at each call or beside other images")
    layouts = _possible(features, image, constant.get(features.shape[1]))
    if not layouts:
        raise InputError(
            f"gives features of shape {tuple(features.shape[1:])}, which are on no grid over images of "
            f"{image.shape[1]}x{image.shape[2]} pixels"
        )
    answers = {layout: _answers(layout, features) for layout in layouts}
    for draw in range(1, MOST + 1):
        scores = {layout: _locality(layout, answer) for layout, answer in answers.items()}
        best = max(layouts, key=scores.__getitem__)
        clear = not CLEAR[0] < scores[best] < CLEAR[1] and draw * best.grid[0] * best.grid[1] >= ENOUGH
        if best.channels_first or clear or draw == MOST:
            break
        features = run(_banded(image, draw))
        answers = {layout: answer + _answers(layout, features) for layout, answer in answers.items()}
    if not best.channels_first and scores[best] < LOCAL:
        raise InputError("gives tokens that do not lie row by row over the image")
    return best


def _banded(image: Tensor, draw: int = 0) -> Tensor:
    """Return ``(1 + 2 * BANDS, 3, H, W)``: noise, then other noise in each band of rows and of columns."""
    generator = torch.Generator().manual_seed(draw)
    noise, other = torch.randn(2, *image.shape, generator=generator).to(image)
    images = noise.repeat(1 + 2 * BANDS, 1, 1, 1)
    for band in range(BANDS):
        for axis, first in ((1, 1), (2, 1 + BANDS)):
            side = image.shape[axis]
            rows = slice(band * side // BANDS, (band + 1) * side // BANDS)
            which = (slice(None), rows) if axis == 1 else (slice(None), slice(None), rows)
            images[first + band][which] = other[which]
    return images


@contextlib.contextmanager
def _first_seen(model: nn.Module, b: int) -> Iterator[dict[int, Tensor]]:
    """Collect, for each length of a sequence, which positions are the same in all images where it first appears."""
    constant: dict[int, Tensor] = {}
    thread = threading.get_ident()

    def see(values: Any) -> None:
        for value in values if isinstance(values, (tuple, list)) else [values]:
            if isinstance(value, Tensor) and value.ndim == 3 and len(value) == b and value.shape[1] not in constant:
                same = (value == value[:1]).all(2).all(0)
                if not same.all():
                    constant[value.shape[1]] = same

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() == thread:
            see(args)
            see(list(kwargs.values()))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            see(output)

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in model.modules()]
    hooks += [module.register_forward_hook(after) for module in model.modules()]
    try:
        yield constant
    finally:
        for hook in hooks:
            hook.remove()


def _possible(features: Tensor, image: Tensor, constant: Tensor | None) -> list[Layout]:
    """Return the layouts that shapes allow."""
    height, width = image.shape[1:]

    def covers(h: int, w: int) -> bool:
        # Cells are square but for rounding at the image's edge.
        return abs(h * width - w * height) < max(height, width)

    if features.ndim == 4:
        last = Layout((features.shape[1], features.shape[2]))
        first = Layout((features.shape[2], features.shape[3]), channels_first=True)
        return [layout for layout in (first, last) if covers(*layout.grid)]
    front = back = 0
    if constant is not None:
        fixed = constant.tolist()
        front = fixed.index(False)
        back = fixed[::-1].index(False)
        if any(fixed[front : len(fixed) - back]):
            raise InputError("has tokens of its own among those of the patches")
    n = features.shape[1] - front - back
    grids = [(h, n // h) for h in range(1, n + 1) if n % h == 0]
    return [Layout(grid, front=front, back=back) for grid in grids if covers(*grid)]


def _answers(layout: Layout, features: Tensor) -> Tensor:
    """Return how much each token answers to each band, ``(2 * BANDS, h * w)``; each band's sum over tokens is 1."""
    sequence = layout.sequence(features).double()
    tokens = sequence[:, layout.front : sequence.shape[1] - layout.back]
    answers = (tokens[1:] - tokens[0]).square().sum(2)
    return answers / answers.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def _locality(layout: Layout, answers: Tensor) -> float:
    """Return the correlation of the tokens' rows, and columns, with where they answer: the lesser of both.

    -1 where rows or columns that are rolled around fit better: on a wide grid a shift by one changes little.
    """
    h, w = layout.grid
    place = torch.arange(h * w, device=answers.device)
    bands = torch.arange(BANDS, device=answers.device, dtype=torch.float64)
    scores = [1.0]
    for side, positions, answer in ((h, place // w, answers[:BANDS]), (w, place % w, answers[BANDS:])):
        if side > 1:
            rolled = (positions + torch.arange(side, device=answers.device).unsqueeze(1)) % side
            centroid = (bands @ answer / answer.sum(0)).unsqueeze(0)
            fits = torch.corrcoef(torch.cat([rolled.double(), centroid]))[-1, :-1].nan_to_num(-1.0)
            scores.append(float(fits[0]) if int(fits.argmax()) == 0 else -1.0)
    return min(scores)
