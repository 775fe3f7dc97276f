"""Where the tokens of a head came from: what another store must agree with before the head may read it.

A head is fitted on numbers, but it is meant for images. Two stores give the same image the same numbers only if they
agree in backbone, weights, layer, preprocessing and pooling, and are read through the same fitted reduction. Labels are
numbers too, and mean the same only through the names of the classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens.reduce import Reduction, check_pool
from convexhead.tokens.store.manifest import Manifest

MAY_DIFFER = ("source", "shard_size", "dtype", "classes", "masks", "task")
"""Settings of an extraction in which a store may differ from the one that a head was fitted on: other images, other
files, another rounding, another numbering, masks or none, other kinds of targets."""


@dataclass(frozen=True, eq=False)
class TokenOrigin:
    """How the tokens that a head was fitted on were made, and which they were.

    Attributes
    ----------
    config : dict
        Of the extraction, see `Manifest`.
    backbone : str
        The specification as the user gave it.
    shape, grid : (int, int)
        Tokens and channels of an image as they are stored; the grid that the tokens lie on.
    class_token : bool
        Whether token 0 is the backbone's class token.
    class_names : list of str or None
        What the labels mean; None where the labels were not the store's own.
    split : str
        That the head was fitted on.
    images : int
        Number of images in that split.
    rows : int array or None
        The images of the split that the head was fitted on; None: all.
    reduction : Reduction or None
        What the stored tokens were read through.
    token_pool : (int, int) or None
        The grid that they were averaged down to before that, where it is not theirs.
    """

    config: dict[str, Any]
    backbone: str
    shape: tuple[int, int]
    grid: tuple[int, int]
    class_token: bool
    class_names: list[str] | None
    split: str
    images: int
    rows: NDArray[np.int64] | None
    reduction: Reduction | None
    token_pool: tuple[int, int] | None = None

    def without_class_names(self) -> TokenOrigin:
        """The same for a head whose labels are not the store's."""
        return replace(self, class_names=None)

    # -- another store -------------------------------------------------------------------------------------------------
    def differences(self, manifest: Manifest) -> list[str]:
        """Where a store makes tokens otherwise, in words."""
        told = differences(self.config, manifest.config)
        (s, d), (s_, d_) = manifest.shape, self.shape
        if self.config.get("lengths") and d == d_:  # the longest may be longer
            return told
        if not told and manifest.shape != self.shape:
            told.append(f"images have {s} tokens x {d} channels, the head's had {s_} x {d_}")
        if not told and manifest.grid != self.grid:
            told.append(f"the tokens' grid is {manifest.grid}, the head's was {self.grid}")
        return told

    def check(self, manifest: Manifest, class_token: bool, where: str) -> None:
        """Refuse a store whose tokens are made differently.

        Raises
        ------
        InputError
            Names everything that differs.
        """
        told = self.differences(manifest)
        if class_token != self.class_token:
            told.append(f"the class token is {_read(class_token)}, the head had it {_read(self.class_token)}")
        if told:
            raise InputError(
                f"the tokens of {where} are not made as those that this head was fitted on: {'; '.join(told)}; "
                "extract or import these images with --like and the run or its store"
            )

    def numbers(self, class_names: list[str]) -> NDArray[np.int64] | None:
        """This head's label of every class of a store, −1 for a class that it does not know; None: they are the same.

        Raises
        ------
        InputError
            A name stands for several classes.
        """
        ours = self.class_names
        if ours is None or ours == class_names:
            return None
        for names in (ours, class_names):
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise InputError(f"several classes are called {twice!r}: they cannot be matched by name")
        return np.array([ours.index(name) if name in ours else -1 for name in class_names], np.int64)

    def check_training(self, config: dict[str, Any], split: str, images: int, where: str) -> None:
        """Refuse images that are not those that the head was fitted on; they may have been extracted anew.

        Raises
        ------
        InputError
            Names what differs.
        """
        told = []
        if config["source"] != self.config["source"]:
            told.append("the images are others")
        if config["dtype"] != self.config["dtype"]:
            told.append(f"tokens are stored as {config['dtype']}, they were {self.config['dtype']}")
        if split != self.split:
            told.append(f"the split is {split!r}, it was {self.split!r}")
        elif images != self.images:
            told.append(f"there are {images} images, there were {self.images}")
        if told:
            raise InputError(
                f"{where} does not hold what this head was trained on ({'; '.join(told)}): "
                "an audit is about the training data, give the store that the head was fitted on"
            )

    # -- as JSON values ------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Everything but arrays."""
        return {
            "config": self.config,
            "backbone": self.backbone,
            "shape": list(self.shape),
            "grid": list(self.grid),
            "class_token": self.class_token,
            "class_names": self.class_names,
            "split": self.split,
            "images": self.images,
            **({} if self.token_pool is None else {"token_pool": list(self.token_pool)}),
        }

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], rows: NDArray[np.int64] | None, reduction: Reduction | None
    ) -> TokenOrigin:
        """Inverse of `to_dict`.

        Raises
        ------
        FileFormatError
            An entry is missing or is something else.
        """
        try:
            (s, d), (h, w) = values["shape"], values["grid"]
            names, pool = values["class_names"], values.get("token_pool")
            if pool is not None:
                pool = (int(pool[0]), int(pool[1]))
                check_pool((int(h), int(w)), pool)
            return cls(
                dict(values["config"]), str(values["backbone"]), (int(s), int(d)), (int(h), int(w)),
                bool(values["class_token"]), None if names is None else [str(name) for name in names],
                str(values["split"]), int(values["images"]), rows, reduction, pool,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise FileFormatError(
                f"the model does not say properly where its tokens came from ({error}): fit again"
            ) from error


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Where two extractions differ in how they make tokens, in words: first the other one's, then this one's."""
    told = []
    for key in sorted((ours.keys() | theirs.keys()) - set(MAY_DIFFER)):
        a, b = ours.get(key), theirs.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            for part in sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k)):
                told.append(f"{key} {part} is {b.get(part)!r}, the head's was {a.get(part)!r}")
        elif key == "weights":
            told.append(f"the backbone's weights are {_short(b)}, the head's were {_short(a)}")
        else:
            told.append(f"{NAMES.get(key, key)} is {b!r}, the head's was {a!r}")
    return told


def refuse_strangers(
    class_names: list[str], numbers: NDArray[np.int64], present: NDArray[np.int64], where: str
) -> None:
    """Refuse images of classes that a head does not know.

    Parameters
    ----------
    class_names : list of str
        Of the store.
    numbers : int array
        What `TokenOrigin.numbers` says of them.
    present : int array
        The classes that its images have.

    Raises
    ------
    InputError
        Names such classes.
    """
    if strangers := [class_names[i] for i in present if numbers[i] < 0]:
        more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
        raise InputError(
            f"{where} has images of classes that this head was not trained on: "
            f"{', '.join(map(repr, strangers[:5]))}{more}; leave these classes out when extracting"
        )


NAMES = {"channels": "channel pooling", "token_pool": "token pooling"}
"""Settings, and the words of the command line for them."""


def _short(weights: Any) -> str:
    return f"{str(weights)[:12]}…" if weights else "none"


def _read(class_token: bool) -> str:
    return "read" if class_token else "left out"
