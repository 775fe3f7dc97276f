"""The three parts of a data set: to train on, to choose by, and to test on, the last behind a function called once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from convexhead.errors import InputError
from convexhead.tokens.fit_reduction import fit_reduction
from convexhead.tokens.reduce import pool_grid
from convexhead.tokens.sources.base import ImageSource
from convexhead.tokens.store.origin import TokenOrigin
from convexhead.tokens.store.store import TokenStore
from convexhead.tokens.store.view import SplitView

Array = NDArray[Any]
CHUNK = 500
"""Images read from a store at a time."""


@dataclass(frozen=True)
class Part:
    """Tokens ``(n, s, d)``, labels ``(n,)`` and, where the backbone has one, class tokens ``(n, d')``, not reduced."""

    tokens: Array
    labels: Array
    class_tokens: Array | None = None

    def take(self, rows: Array) -> Part:
        """The images ``rows``."""
        return Part(
            self.tokens[rows], self.labels[rows], None if self.class_tokens is None else self.class_tokens[rows]
        )


@dataclass
class Splits:
    """What an experiment sees of a data set.

    Attributes
    ----------
    train, validation : Part
        To train on and to choose by.
    load_test : callable () -> Part
        Reads the test part. Called once, when everything is chosen.
    class_names : list of str
    grid : (int, int)
        Of the tokens.
    name, backbone : str
        Where they came from, in words.
    identity : dict
        JSON-able values, the same only for the same images and tokens.
    test_files : list of str
        Names of the test images.
    origin : TokenOrigin or None
        Where the train part comes from, for heads that are saved; None where it is pooled after reading.
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
    origin: TokenOrigin | None = None


def hold_out(whole: Part, share: float, seed: int) -> tuple[Part, Part]:
    """Train and validation part: ``share`` of every class is held out."""
    kept, held = _held_out(whole.labels, share, seed)
    return whole.take(kept), whole.take(held)


def _held_out(labels: Array, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows kept and held out, in order."""
    kept, held = train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=seed)
    return np.sort(kept), np.sort(held)


def splits_of_store(store: TokenStore, *, validation: float = 0.2, seed: int = 0) -> Splits:
    """A whole store as it is read; a validation part is held out of the train split where there is no split of it."""
    check_test_split(store)
    view = store["train"]
    train = whole_part(view)
    if "val" in store.splits:
        kept, held = train, whole_part(store["val"])
    else:
        kept, held = hold_out(train, validation, seed)
        view = view.subset(_held_out(train.labels, validation, seed)[0])
    return Splits(
        train=kept,
        validation=held,
        load_test=lambda: whole_part(store["test"]),
        class_names=store.class_names,
        grid=store.grid,
        name=store.manifest.source,
        backbone=backbone_of(store),
        identity=_identity(store) | {"validation": validation, "split_seed": seed},
        test_files=store["test"].files,
        origin=view.origin(),
    )


def _identity(store: TokenStore) -> dict[str, Any]:
    return {f"{split} tokens": store[split].identity for split in store.splits}


def whole_part(view: SplitView) -> Part:
    """All of a split."""
    return Part(view.read(), np.asarray(view.labels))


def check_test_split(store: TokenStore) -> None:
    """Refuse a store that nothing can be tested on."""
    if "test" not in store.splits:
        raise InputError(f"{store.path} has no test split: extract images with train/ and test/ beside each other")


def backbone_of(store: TokenStore) -> str:
    """The backbone and its layer in words, without the place of its weights."""
    layer = store.manifest.config["layer"]
    return store.manifest.backbone.partition("@")[0] + ("" if layer is None else f", block {layer}")


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
    train, test = (store[split].unreduced() for split in ("train", "test"))
    rows = {
        "train": choose_images(
            train.files, train.labels, classes=choice.classes, per_class=choice.train, seed=choice.seed
        ),
        "test": choose_images(test.files, test.labels, classes=choice.classes, per_class=choice.test, seed=choice.seed),
    }
    labels = train.labels[rows["train"]]
    if np.unique(labels, return_counts=True)[1].min() < 2:
        raise InputError("every class needs at least two train images: one to train on, one to choose by")
    kept, held = train_test_split(rows["train"], test_size=choice.validation, stratify=labels, random_state=choice.seed)
    grid = store.grid
    if choice.token_pool is not None:
        grid = (min(choice.token_pool, grid[0]), min(choice.token_pool, grid[1]))
    raw = store.manifest.shape[1]
    components = raw if choice.channels is None else min(choice.channels - choice.constant, raw)
    if components < 1:
        raise InputError(f"channels={choice.channels} leaves no channel of the tokens: ask for more")
    reduction = fit_reduction(
        _pooled(train, np.sort(kept), grid),
        standardize=True,
        components=None if components == raw else components,
        constant=choice.constant,
    )

    def part(view: SplitView, rows: Array) -> Part:
        rows = np.sort(rows)
        tokens = np.concatenate([reduction.apply(chunk) for chunk in _pooled(view, rows, grid)])
        return Part(tokens, view.labels[rows], _class_tokens(view, rows))

    return Splits(
        train=part(train, kept),
        validation=part(train, held),
        load_test=lambda: part(test, rows["test"]),
        class_names=store.class_names[: choice.classes],
        grid=grid,
        name=store.manifest.source,
        backbone=backbone_of(store),
        identity=_identity(store) | asdict(choice),
        test_files=[test.files[row] for row in rows["test"]],
        origin=None
        if grid != store.grid
        else replace(
            train.subset(np.sort(kept)).origin(), reduction=reduction, class_names=store.class_names[: choice.classes]
        ),
    )


def _pooled(view: SplitView, rows: Array, grid: tuple[int, int]) -> Iterator[Array]:
    for start in range(0, len(rows), CHUNK):
        tokens = view[rows[start : start + CHUNK]]
        yield tokens if grid == view.grid else pool_grid(torch.from_numpy(tokens), view.grid, grid).numpy()


def _class_tokens(view: SplitView, rows: Array) -> Array | None:
    return view.class_tokens(rows) if view.n_prefix else None
