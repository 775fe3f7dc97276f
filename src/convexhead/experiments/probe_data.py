"""The images of a probe: a store that is made or taken, its train and test parts, and smaller parts of train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold

from convexhead.errors import InputError
from convexhead.experiments.splits import CHUNK, hold_out
from convexhead.runtime.progress import Notify
from convexhead.tokens.extract import extract
from convexhead.tokens.fit_reduction import fit_reduction
from convexhead.tokens.progress import told_to
from convexhead.tokens.sources.base import MaskSource
from convexhead.tokens.sources.open import open_source
from convexhead.tokens.store.manifest import MANIFEST
from convexhead.tokens.store.store import TokenStore
from convexhead.tokens.store.view import SplitView

Rows = NDArray[np.int64]
HELD_OUT = 0.2
"""Share of every class that is held out to test on where there is no test split."""
BACKBONE = "packaged:efficientnet-lite0"
DENSE = (
    "masks, and probe takes images with one class each: extract them, and train a head on their tokens with "
    "ConvexHeadClassifier(pool=None)"
)


@dataclass(frozen=True)
class Budget:
    """How many train images a fit gets.

    Attributes
    ----------
    shots : int or None
        Images of each class, or all that a class has.
    fraction : float or None
        Share of each class, at least one image. Neither: all images.
    draw : int
        Which of several random choices.
    """

    shots: int | None = None
    fraction: float | None = None
    draw: int = 0

    @property
    def title(self) -> str:
        if self.shots is not None:
            return f"{self.shots} a class"
        return "all" if self.fraction is None else f"{100 * self.fraction:g}%"

    @property
    def is_all(self) -> bool:
        return self.shots is None and self.fraction is None

    def rows(self, labels: Rows, seed: int) -> Rows:
        """Rows of the chosen images. A smaller choice of the same draw is part of a larger one."""
        if self.is_all:
            return np.arange(len(labels))
        rng, chosen = np.random.default_rng([seed, self.draw]), []
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            count = self.shots if self.fraction is None else max(1, round(self.fraction * len(rows)))
            chosen.append(rows[:count])
        return np.sort(np.concatenate(chosen))


def budgets_of(shots: Sequence[int], fractions: Sequence[float], draws: int) -> list[Budget]:
    """All images first, then every smaller budget, ``draws`` times each.

    Raises
    ------
    InputError
        Numbers that are no counts or shares.
    """
    if any(k < 1 for k in shots):
        raise InputError(f"shots must be images of each class, 1 or more, got {min(shots)}")
    if any(not 0 < share < 1 for share in fractions):
        raise InputError(f"fractions must be shares between 0 and 1, got {', '.join(f'{x:g}' for x in fractions)}")
    if draws < 1:
        raise InputError(f"draws must be at least 1, got {draws}")
    smaller = [Budget(shots=k) for k in sorted(set(shots))] + [Budget(fraction=x) for x in sorted(set(fractions))]
    return [Budget(), *(Budget(b.shots, b.fraction, draw) for b in smaller for draw in range(draws))]


@dataclass
class ProbeData:
    """What a probe trains and tests on.

    Attributes
    ----------
    store : TokenStore
    train, test : SplitView
    test_is : str
        What the test images are, in words.
    """

    store: TokenStore
    train: SplitView
    test: SplitView
    test_is: str
    labels: Rows = field(init=False)

    def __post_init__(self) -> None:
        self.labels = _labels(self.train)
        _labels(self.test)
        if len(np.unique(self.labels)) < 2:
            raise InputError(f"{self.store.path} has train images of one class: a probe needs two classes or more")

    def vectors(self, view: SplitView) -> NDArray[Any]:
        """The mean token of each image, ``(n, d)``, without the constant channel."""
        means = np.concatenate([view[i : i + CHUNK].mean(1) for i in range(0, len(view), CHUNK)])
        return means[:, :-1] if view.reduction is not None and view.reduction.constant else means

    def folds(self, cv: int, seed: int) -> list[tuple[Rows, Rows]]:
        """Stratified folds of the train images, shuffled; fewer where the smallest class has fewer images.

        Raises
        ------
        InputError
            A class has a single train image.
        """
        if cv < 2:
            raise InputError(f"cv must be at least 2 folds, got {cv}")
        classes, counts = np.unique(self.labels, return_counts=True)
        if counts.min() < 2:
            name = self.store.class_names[classes[counts.argmin()]]
            raise InputError(
                f"the class {name!r} has one train image: cross-validation needs two of every class, "
                "add images or leave the class out"
            )
        folds = StratifiedKFold(min(cv, int(counts.min())), shuffle=True, random_state=seed)
        return list(folds.split(self.labels, self.labels))


def is_store(images: str | Path) -> bool:
    """Whether this is the folder of a token store."""
    return (Path(images).expanduser() / MANIFEST).is_file()


def open_data(
    images: str | Path, out: Path, *, seed: int, device: str, notify: Notify, options: dict[str, Any]
) -> ProbeData:
    """The store ``images``, or one of these images in ``out / "tokens"``; that is made, gone on with, or used again.

    Raises
    ------
    InputError
        ``options`` of an extraction for tokens that are there already, or images that cannot be used.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if is_store(images):
        if given:
            raise InputError(
                f"{str(images)!r} is a token store, its tokens are made: leave {', '.join(given)} out, "
                "or give the images"
            )
        store = TokenStore.open(images)
    else:
        given = {"backbone": BACKBONE, "constant": True, **given}
        source = open_source(images)
        if isinstance(source, MaskSource):
            raise InputError(f"{str(images)!r} has {DENSE}")
        store = extract(source, out=out / "tokens", device=device, progress=told_to(notify), **given)
    return _split(store, seed)


def _split(store: TokenStore, seed: int) -> ProbeData:
    if "train" not in store.splits:
        raise InputError(f"{store.path} has no train split, only {', '.join(store.splits)}")
    for split, told in (("test", "the test split"), ("val", "the val split, since there is no test split")):
        if split in store.splits:
            return ProbeData(store, store["train"], store[split], told)
    view = store["train"]
    classes, counts = np.unique(_labels(view), return_counts=True)
    if counts.min() < 3:
        raise InputError(
            f"the class {store.class_names[classes[counts.argmin()]]!r} has {counts.min()} images and there is no test "
            "split: to hold some out to test on, every class needs three"
        )
    if HELD_OUT * counts.sum() < len(classes):
        raise InputError(
            f"there is no test split, and {100 * HELD_OUT:g}% of {counts.sum()} images are less than one image of each "
            f"of the {len(classes)} classes: give a folder with train/ and test/ beside each other"
        )
    # The store's reduction has seen the images that are held out here.
    kept, held = hold_out(view, HELD_OUT, seed)
    reduction = fit_reduction(kept.unreduced().tokens_there(), **store.reduction.options)
    told = f"{100 * HELD_OUT:g}% of each class, held out with seed {seed}, since there is no test split"
    return ProbeData(store, kept.reduced(reduction), held.reduced(reduction), told)


def _labels(view: SplitView) -> Rows:
    if view.has_masks:
        raise InputError(f"the split {view.split!r} has {DENSE}")
    if view.lengths is not None:
        raise InputError(
            "the samples have different numbers of tokens, which not all methods of a probe take: use fit, path and "
            "evaluate on this store"
        )
    return np.asarray(view.labels)
