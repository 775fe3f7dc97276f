"""The three parts of a data set: to train on, to choose by, and to test on, the last behind a function called once.

Each is a view of a store, which is read as it is used, as `fit` reads one: nothing is brought into memory before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from convexhead.errors import InputError
from convexhead.tokens.backbones.base import layers_in_words
from convexhead.tokens.fit_reduction import fit_reduction
from convexhead.tokens.sources.base import ImageSource
from convexhead.tokens.store.store import TokenStore
from convexhead.tokens.store.view import SplitView

Array = NDArray[Any]
CHUNK = 500
"""Images that are read at a time."""


@dataclass(frozen=True)
class Part:
    """Some images of a data set.

    Attributes
    ----------
    tokens : SplitView or array, (n, s, d)
        Sliced into arrays.
    labels : int array (n,)
    """

    tokens: SplitView | Array
    labels: Array

    @classmethod
    def of(cls, view: SplitView) -> Part:
        """The images of a view."""
        return cls(view, np.asarray(view.labels))

    def mean_tokens(self) -> Array:
        """The mean token of each image, ``(n, d)``."""
        starts = range(0, len(self.labels), CHUNK)
        return np.concatenate([self.tokens[i : i + CHUNK].mean(1) for i in starts])

    @property
    def has_class_tokens(self) -> bool:
        """Whether the backbone makes one of each image."""
        return isinstance(self.tokens, SplitView) and self.tokens.n_prefix > 0

    def class_tokens(self) -> Array:
        """The class token of each image, ``(n, d)`` as it was stored.

        Raises
        ------
        InputError
            There are none.
        """
        if not isinstance(self.tokens, SplitView):
            raise InputError("these tokens are an array, beside which there are no class tokens")
        return self.tokens.class_tokens(slice(None))


@dataclass
class Splits:
    """What an experiment sees of a data set.

    Attributes
    ----------
    train, validation : Part
        To train on and to choose by.
    load_test : callable () -> Part
        Opens the test part. Called once, when everything is chosen.
    class_names : list of str
    grid : (int, int)
        Of the tokens.
    name, backbone : str
        Where they came from, in words.
    identity : dict
        JSON-able values, the same only for the same images and tokens.
    test_files : list of str
        Names of the test images.
    """

    train: Part
    validation: Part
    load_test: Callable[[], Part]
    class_names: list[str]
    grid: tuple[int, int]
    name: str
    backbone: str
    identity: dict[str, Any]
    test_files: list[str] = field(default_factory=list)


def hold_out(view: SplitView, share: float, seed: int) -> tuple[SplitView, SplitView]:
    """The images to train on, and the ``share`` of every class that is held out; both in the order of ``view``."""
    kept, held = train_test_split(np.arange(len(view)), test_size=share, stratify=view.labels, random_state=seed)
    return view.subset(np.sort(kept)), view.subset(np.sort(held))


def splits_of_store(store: TokenStore, *, validation: float = 0.2, seed: int = 0) -> Splits:
    """A whole store as it is read; a validation part is held out of the train split where there is no split of it."""
    check_test_split(store)
    if "val" in store.splits:
        kept, held = store["train"], store["val"]
    else:
        kept, held = hold_out(store["train"], validation, seed)
    return Splits(
        train=Part.of(kept),
        validation=Part.of(held),
        load_test=lambda: Part.of(store["test"]),
        class_names=store.class_names,
        grid=store.grid,
        name=store.manifest.source,
        backbone=backbone_of(store),
        identity=_identity(store) | {"validation": validation, "split_seed": seed},
        test_files=store["test"].files,
    )


def _identity(store: TokenStore) -> dict[str, Any]:
    return {f"{split} tokens": store[split].identity for split in store.splits}


def check_test_split(store: TokenStore) -> None:
    """Refuse a store that nothing can be tested on."""
    if "test" not in store.splits:
        raise InputError(f"{store.path} has no test split: extract images with train/ and test/ beside each other")


def backbone_of(store: TokenStore) -> str:
    """The backbone and its layers in words, without the place of its weights."""
    config = store.manifest.config
    words = layers_in_words(config["layer"], config.get("beside", {}).get("class", False))
    return store.manifest.backbone.partition("@")[0] + (f", {words}" if words else "")


# -- a choice of images -----------------------------------------------------------------------------------------------
def choose_images(
    files: list[str], labels: Array, *, classes: int | None, per_class: int | None, seed: int
) -> NDArray[np.int64]:
    """Rows of ``per_class`` images of each of the first ``classes`` classes; None takes all.

    The images of a class are ranked by a hash of their names: the choice does not depend on their order, and a
    smaller choice is part of a larger one.
    """
    chosen = []
    for label in np.unique(labels)[:classes]:
        rows = np.flatnonzero(labels == label)
        order = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}/{files[row]}".encode()).digest())
        chosen += order[:per_class]
    return np.sort(np.asarray(chosen, dtype=np.int64))


class Subset:
    """An image source of which only the chosen images are read; see `choose_images`."""

    def __init__(
        self, source: ImageSource, *, classes: int | None, per_class: dict[str, int | None], seed: int
    ) -> None:
        self._source = source
        self.spec, self.splits = source.spec, source.splits
        self._rows = {
            split: choose_images(
                source.files(split),
                source.labels(split),
                classes=classes,
                per_class=per_class.get(split),
                seed=seed,
            )
            for split in source.splits
        }
        self.class_names = source.class_names[:classes]

    def labels(self, split: str) -> NDArray[np.int64]:
        return self._source.labels(split)[self._rows[split]]

    def files(self, split: str) -> list[str]:
        names = self._source.files(split)
        return [names[row] for row in self._rows[split]]

    def load(self, split: str, index: int) -> Any:
        return self._source.load(split, int(self._rows[split][index]))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._source.fingerprint().encode())
        for split in self.splits:
            digest.update(self._rows[split].tobytes())
        return digest.hexdigest()


# -- chosen images of a store, reduced at run time --------------------------------------------------------------------
@dataclass(frozen=True)
class TokenChoice:
    """Which images of a store, and what is made of their tokens.

    Attributes
    ----------
    classes : int or None
        The first so many classes; None: all.
    train, test : int or None
        Images of each class.
    validation : float
        Share of the train images held out to choose by.
    token_pool : int or None
        Side of the grid that tokens are averaged down to, where theirs is larger.
    channels : int or None
        At most so many: principal components, and the constant channel.
    constant : bool
        Append a channel of ones, with which self-attention contains the linear head.
    seed : int
        Of the choice of images and of the validation part.
    """

    classes: int | None = None
    train: int | None = None
    test: int | None = None
    validation: float = 0.2
    token_pool: int | None = None
    channels: int | None = None
    constant: bool = True
    seed: int = 0


def chosen_splits(store: TokenStore, choice: TokenChoice) -> Splits:
    """Splits of the chosen images; standardisation and components are fitted on the train part alone.

    Raises
    ------
    InputError
            No test split, or too few images of a class.
    """
    check_test_split(store)
    grid = store.grid
    if choice.token_pool is not None:
        grid = (min(choice.token_pool, grid[0]), min(choice.token_pool, grid[1]))
    train, test = (
        _chosen(store[split], count, choice).unreduced().pooled(grid)
        for split, count in (("train", choice.train), ("test", choice.test))
    )
    if np.unique(train.labels, return_counts=True)[1].min() < 2:
        raise InputError("every class needs at least two train images: one to train on, one to choose by")
    kept, held = hold_out(train, choice.validation, choice.seed)
    raw = store.manifest.shape[1]
    components = raw if choice.channels is None else min(choice.channels - choice.constant, raw)
    if components < 1:
        raise InputError(f"channels={choice.channels} leaves no channel of the tokens: ask for more")
    reduction = fit_reduction(
        kept.chunks(CHUNK),
        standardize=True,
        components=None if components == raw else components,
        constant=choice.constant,
        groups=store.manifest.config.get("beside", {}).get("groups"),
    )
    return Splits(
        train=Part.of(kept.reduced(reduction)),
        validation=Part.of(held.reduced(reduction)),
        load_test=lambda: Part.of(test.reduced(reduction)),
        class_names=train.class_names,
        grid=grid,
        name=store.manifest.source,
        backbone=backbone_of(store),
        identity=_identity(store) | asdict(choice),
        test_files=test.files,
    )


def _chosen(view: SplitView, per_class: int | None, choice: TokenChoice) -> SplitView:
    some = view.first_classes(choice.classes)
    return some.subset(choose_images(some.files, some.labels, classes=None, per_class=per_class, seed=choice.seed))
