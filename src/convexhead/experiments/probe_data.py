"""The images of a probe: a store that is made or taken, its train and test parts, and smaller parts of train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import KFold, StratifiedKFold, train_test_split

from convexhead.errors import InputError
from convexhead.experiments.probe_tasks import CLASSES, LABELS, MASKS, NUMBERS, TASKS, Task
from convexhead.experiments.splits import CHUNK, hold_out
from convexhead.folds import check_groups, grouped_folds, hold_out_groups
from convexhead.group_table import check_tested_apart, names_some, read_groups
from convexhead.reading import KNOWN
from convexhead.runtime.content import content_hash
from convexhead.runtime.progress import Notify
from convexhead.tokens.extract import extract
from convexhead.tokens.fit_reduction import fit_reduction
from convexhead.tokens.progress import told_to
from convexhead.tokens.sources.base import ImageSource, MaskSource
from convexhead.tokens.sources.label_table import read_table
from convexhead.tokens.sources.open import open_source
from convexhead.tokens.store.manifest import MANIFEST
from convexhead.tokens.store.store import TokenStore
from convexhead.tokens.store.view import SplitView

Rows = NDArray[np.int64]
HELD_OUT = 0.2
"""Share of every class that is held out to test on where there is no test split."""
FEWEST = 10
"""Images of which some can be held out. Chosen by hand: two to test on, where there are no classes to count."""
BACKBONE = "packaged:efficientnet-lite0"


@dataclass(frozen=True)
class Budget:
    """How many train images a fit gets.

    Attributes
    ----------
    shots : int or None
        Images of each class, or all that a class has.
    fraction : float or None
        Share of each class, or of all images that have not one class each; at least one image. Neither: all images.
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

    def rows(self, labels: Rows | None, images: int, seed: int, groups: Rows | None = None) -> Rows:
        """Rows of the chosen images. A smaller choice of the same draw is part of a larger one.

        Where there are groups, images are taken group by group, in a random order that is the same for all classes.

        Parameters
        ----------
        labels : int array (n,) or None
            Of images with one class each; None: a share is of all images.
        images : int
            ``n``.
        groups : int array (n,) or None
            See `convexhead.folds.check_groups`.
        """
        if self.is_all:
            return np.arange(images)
        rng, chosen = np.random.default_rng([seed, self.draw]), []
        place = np.zeros(images) if groups is None else rng.permutation(groups.max() + 1)[groups]
        classes = [np.arange(images)] if labels is None else [np.flatnonzero(labels == c) for c in np.unique(labels)]
        for each in classes:
            rows = rng.permutation(each)
            rows = rows[np.argsort(place[rows], kind="stable")]
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
    images : MaskSource or None
        Where the images are, if they have masks.
    groups, test_groups : int array (n,) or None
        Of the train and the test images, if some belong together; None where the table has no row of a test image.
    task : Task
    labels : int array (n,) or None
        Of the train images, if they have one class each.
    """

    store: TokenStore
    train: SplitView
    test: SplitView
    test_is: str
    images: ImageSource | None = None
    groups: Rows | None = None
    test_groups: Rows | None = None
    task: Task = field(init=False)
    labels: Rows | None = field(init=False)

    def __post_init__(self) -> None:
        self.task = TASKS[self.train.task]
        self.labels = _labels(self.train)
        _labels(self.test)
        for view in (self.train, self.test):
            self._check_variety(view)

    def _check_variety(self, view: SplitView) -> None:
        """Refuse images that are all alike: nothing can be told apart, or scored."""
        what, y = f"{self.store.path} has {view.split} images", view.known
        if self.task.name == CLASSES and view is self.train and len(np.unique(y)) < 2:
            raise InputError(f"{what} of one class: a probe needs two classes or more")
        if self.task.name == LABELS and not ((y >= 0.5).any(0) & (y < 0.5).any(0)).any():
            raise InputError(f"{what}, of which all or none have each label: give images that differ")
        if self.task.name == NUMBERS and not (np.ptp(y, axis=0) > 0).all():
            raise InputError(f"{what} with the same number in a column: R² is not defined, leave the column out")
        if self.task.name == MASKS and view is self.train and (y.max((0, 1)) > 0).sum() < 2:
            raise InputError(f"{what} whose pixels have one class: a probe needs two classes or more")

    @property
    def grouping(self) -> str | None:
        """A hash of the groups; None where there are none."""
        return None if self.groups is None else content_hash(self.groups)[:16]

    def vectors(self, view: SplitView) -> NDArray[Any]:
        """The mean of the tokens that each image has, ``(n, d)``, without the constant channel."""
        lengths = np.full(len(view), view.shape[1]) if view.lengths is None else view.lengths
        sums = np.concatenate([view[i : i + CHUNK].sum(1) for i in range(0, len(view), CHUNK)])
        means = sums / lengths[:, None].astype(sums.dtype)
        return means[:, :-1] if view.reduction is not None and view.reduction.constant else means

    def folds(self, cv: int, seed: int) -> list[tuple[Rows, Rows]]:
        """Folds of the train images: stratified and shuffled, fewer where the smallest class has fewer images.

        Of images without one class each they are shuffled alone. Of masks they are blocks in the order of the images,
        which often are frames of one drive after another. Groups are kept together, see `grouped_folds`.

        Raises
        ------
        InputError
            A class has a single train image, or there are fewer images than folds.
        """
        if cv < 2:
            raise InputError(f"cv must be at least 2 folds, got {cv}")
        n = len(self.train)
        if self.groups is not None:
            return grouped_folds(cv, self.labels, self.groups)
        if self.labels is None:
            if n < cv:
                raise InputError(f"cv={cv} folds need {cv} train images, and there are {n}: give more images")
            shuffled = self.task.name != MASKS
            return list(KFold(cv, shuffle=shuffled, random_state=seed if shuffled else None).split(np.arange(n)))
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
    images: str | Path,
    out: Path,
    budgets: Sequence[Budget],
    *,
    seed: int,
    device: str,
    notify: Notify,
    groups: str | Path | None,
    options: dict[str, Any],
) -> ProbeData:
    """The store ``images``, or one of these images in ``out / "tokens"``; that is made, gone on with, or used again.

    Raises
    ------
    InputError
        ``options`` of an extraction for tokens that are there already, or images that cannot be used.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if groups is not None:
        read_table(Path(groups).expanduser())  # a file that is none is told before any work
    if is_store(images):
        if given:
            raise InputError(
                f"{str(images)!r} is a token store, its tokens are made: leave {', '.join(given)} out, "
                "or give the images"
            )
        store = TokenStore.open(images)
        source = _masks_of(store)
    else:
        masked = {name: given.pop(name) for name in ("void", "class_names") if name in given}
        given = {"backbone": BACKBONE, "constant": True, **given}
        source = open_source(images, **masked)
        check_budgets(budgets, "masks" if isinstance(source, MaskSource) else getattr(source, "task", "classes"))
        store = extract(source, out=out / "tokens", device=device, progress=told_to(notify), **given)
    data = _split(store, seed, source if isinstance(source, MaskSource) else None, groups)
    check_budgets(budgets, data.task.name)
    return data


def _masks_of(store: TokenStore) -> ImageSource | None:
    """The images of a store of images with masks, which pixels are scored on."""
    if not store[store.splits[0]].has_masks:
        return None
    source = open_source(store.manifest.source)
    if not isinstance(source, MaskSource):
        raise InputError(f"{source.spec!r}, of which {store.path} was made, has no masks any more: give the images")
    return source


def check_budgets(budgets: Sequence[Budget], known: str) -> None:
    """Refuse images of each class where images have none.

    Raises
    ------
    InputError
        Says to take shares.
    """
    if known != CLASSES and any(budget.shots is not None for budget in budgets):
        raise InputError(
            f"shots are images of each class, and these images have {KNOWN[known]}: leave shots out, and take shares "
            "of all images with fractions"
        )


def _split(store: TokenStore, seed: int, images: ImageSource | None, table: str | Path | None) -> ProbeData:
    if "train" not in store.splits:
        raise InputError(f"{store.path} has no train split, only {', '.join(store.splits)}")
    train = store["train"]
    groups = None if table is None else check_groups(read_groups(table, train), len(train))
    for split, told in (("test", "the test split"), ("val", "the val split, since there is no test split")):
        if split in store.splits:
            tested = None
            if table is not None:
                check_tested_apart(table, train, store[split])
                known = names_some(table, store[split])
                tested = check_groups(read_groups(table, store[split]), len(store[split])) if known else None
            return ProbeData(store, train, store[split], told, images, groups, tested)
    tested = None
    if groups is None:
        kept, held, told = _hold_out(store, train, seed)
    else:
        rows, others = hold_out_groups(_labels(train), groups, HELD_OUT, seed)
        kept, held = train.subset(rows), train.subset(others)
        tested, groups = np.unique(groups[others], return_inverse=True)[1], groups[rows]
        told = f"{100 * HELD_OUT:g}% of the groups, held out with seed {seed}"
    # The store's reduction has seen the images that are held out here.
    reduction = fit_reduction(kept.unreduced().tokens_there(), **store.reduction.options)
    told = f"{told}, since there is no test split"
    return ProbeData(store, kept.reduced(reduction), held.reduced(reduction), told, images, groups, tested)


def _hold_out(store: TokenStore, view: SplitView, seed: int) -> tuple[SplitView, SplitView, str]:
    """Train and test images out of the train split, and what the latter are, in words."""
    labels, n = _labels(view), len(view)
    if labels is not None:
        classes, counts = np.unique(labels, return_counts=True)
        if counts.min() < 3:
            raise InputError(
                f"the class {store.class_names[classes[counts.argmin()]]!r} has {counts.min()} images and there is no "
                "test split: to hold some out to test on, every class needs three"
            )
        if HELD_OUT * counts.sum() < len(classes):
            raise InputError(
                f"there is no test split, and {100 * HELD_OUT:g}% of {counts.sum()} images are less than one image of "
                f"each of the {len(classes)} classes: give a folder with train/ and test/ beside each other"
            )
        return *hold_out(view, HELD_OUT, seed), f"{100 * HELD_OUT:g}% of each class, held out with seed {seed}"
    if n < FEWEST:
        raise InputError(f"there are {n} images and no test split: to hold some out to test on, give {FEWEST} or more")
    if view.has_masks:
        first = n - round(HELD_OUT * n)
        told = f"the last {100 * HELD_OUT:g}% of the images in the order of their names"
        return view.subset(np.arange(first)), view.subset(np.arange(first, n)), told
    kept, held = train_test_split(np.arange(n), test_size=HELD_OUT, random_state=seed)
    told = f"{100 * HELD_OUT:g}% of the images, held out with seed {seed}"
    return view.subset(np.sort(kept)), view.subset(np.sort(held)), told


def _labels(view: SplitView) -> Rows | None:
    return np.asarray(view.labels) if view.task == CLASSES else None
