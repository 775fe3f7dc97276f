"""What a trained head says of images: their names, classes and probabilities, or the outputs of a regression.

    from convexhead.predict import predict, write

    write(predict("run", "photos"), "photos.csv")

Images pass through the backbone, the preprocessing and the reduction of the run, a batch at a time.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from convexhead import inputs
from convexhead.errors import InputError, require
from convexhead.estimators import ConvexHeadClassifier
from convexhead.padding import Padded
from convexhead.persistence import load
from convexhead.regressor import ConvexHeadRegressor
from convexhead.runtime.progress import Notify, silent
from convexhead.targets import is_multilabel
from convexhead.tokens import TokenStore
from convexhead.tokens.backbones.base import Backbone
from convexhead.tokens.sources.base import ImageSource
from convexhead.tokens.store.manifest import MANIFEST
from convexhead.tokens.stream import Batch, ImageTokens

Row = list[Any]
FORMATS = (".csv", ".parquet")
SPLIT, IMAGE, PREDICTED = "split", "image", "predicted"
ROWS = 4096
"""Rows of a parquet file that are written together. Chosen by hand: a group of rows of 1,000 classes is 32 MB."""


@dataclass(eq=False)
class Predictions:
    """Rows of a table, made as they are asked for, once.

    Attributes
    ----------
    columns : list of str
        ``split`` if there are several, and ``image``. Then ``predicted``, and ``p:CLASS`` for every class; of a head
        for several labels ``predicted`` are all classes with ``p ≥ 1/2``, with ``|`` between. With ``top`` the
        likeliest classes alone: ``predicted``, ``p``, ``predicted_2``, ``p_2``, … Of a regression the names of the
        columns that a store has, else ``output``, or ``output_1``, …
    total : int
        Images that there are.
    broken : list of str
        Images that were left out so far, because they cannot be read.
    left_out : dict
        Names of files that are no images, by reason.
    """

    columns: list[str]
    total: int
    broken: list[str]
    left_out: dict[str, list[str]]
    batches: Iterator[list[Row]] = field(repr=False)

    def __iter__(self) -> Iterator[Row]:
        return itertools.chain.from_iterable(self.batches)


def predict(
    run: str | Path | ConvexHeadClassifier | ConvexHeadRegressor,
    images: str | Path | ImageSource,
    *,
    top: int | None = None,
    split: str | None = None,
    backbone: str | Backbone | None = None,
    batch_size: int | None = None,
    skip_broken: bool = False,
    device: str = "auto",
    notify: Notify = silent,
) -> Predictions:
    """Predict every image.

    Parameters
    ----------
    run : path or fitted estimator
        Trained on a store of tokens, which tells how tokens are made of images.
    images : path, str or ImageSource
        A folder with images, however deep; an image file; a store; or a source as of `convexhead.tokens.open_source`.
    top : int or None
        Classes to tell of each image, the most probable first; None: the probabilities of all.
    split : str or None
        Of a store or a source with splits; None: all of them.
    backbone, batch_size, skip_broken
        As of `convexhead.tokens.extract`; the backbone must be the run's, at another place.
    device : str
        Where to compute.
    notify : callable
        Told of progress, see `convexhead.runtime.progress`.

    Raises
    ------
    InputError
        A head with an output for every token, a run that does not know its tokens, images that it cannot read.
    """
    head = load(run) if isinstance(run, (str, Path)) else run
    model = head.model_
    if model.head.r != 1:
        raise InputError(
            "this head has an output for every token, and rows are of pooled heads: use "
            "convexhead.mask_files.write_masks, or convexhead predict, which write the labels of pixels"
        )
    names, row = _classifier(head, top) if isinstance(head, ConvexHeadClassifier) else _regressor(head, top)
    stored = not isinstance(images, ImageSource) and (Path(images).expanduser() / MANIFEST).is_file()
    broken: list[str] = []
    left_out: dict[str, list[str]] = {}
    if stored:
        store = TokenStore.open(str(images))
        if split is not None and split not in store.splits:
            raise InputError(f"{images} has no split {split!r}, only {', '.join(store.splits)}")
        views = {name: model.as_fitted_on(store[name]) for name in store.splits if split in (None, name)}
        total, splits = sum(map(len, views.values())), tuple(views)
        broken += [name for view in views.values() for name in view.broken]
        batches = _stored(views)
    else:
        if model.origin is None:
            raise InputError(
                f"{run} was fitted on arrays and does not say how tokens are made of images: extract the images as "
                "those were, and give the store"
            )
        tokens = ImageTokens(
            images, model.origin, split=split, backbone=backbone, batch_size=batch_size, skip_broken=skip_broken,
            device=inputs.pick_device(device),
        )  # fmt: skip
        total, splits, batches, broken = len(tokens), tokens.splits, iter(tokens), tokens.broken
        left_out = dict(getattr(tokens.source, "left_out", {}))
    several = len(splits) > 1

    def rows() -> Iterator[list[Row]]:
        done = 0
        notify("predicting", 0, total)
        for batch in batches:
            fronts = [[batch.split, name] if several else [name] for name in batch.names]
            yield [[*front, *rest] for front, rest in zip(fronts, row(batch.tokens), strict=True)]
            done += len(fronts)
            notify("predicting", done, total)

    return Predictions([SPLIT] * several + [IMAGE, *names], total, broken, left_out, rows())


def _stored(views: dict[str, Any]) -> Iterator[Batch]:
    for split, view in views.items():
        files, start = view.files, 0
        for chunk in view.chunks():
            stop = start + len(chunk)
            yield Batch(
                split, files[start:stop], chunk if view.lengths is None else Padded(chunk, view.mask[start:stop])
            )
            start = stop


Told = tuple[list[str], Callable[[NDArray[np.float32]], list[Row]]]
"""Names of columns, and what makes their values of tokens."""


def _classifier(head: ConvexHeadClassifier, top: int | None) -> Told:
    classes = [str(name) for name in (head.class_names_ or head.classes_)]
    if top is not None and not 1 <= top <= len(classes):
        raise InputError(f"top must be between 1 and the {len(classes)} classes of this head, got {top!r}")

    def rows(tokens: NDArray[np.float32]) -> list[Row]:
        p = head.predict_proba(tokens)
        if top is None and is_multilabel(head.model_.spec):
            return [["|".join(itertools.compress(classes, q >= 0.5)), *q.tolist()] for q in p]
        if top is None:
            return [[classes[best], *values] for best, values in zip(p.argmax(1), p.tolist(), strict=True)]
        order = np.argsort(-p, axis=1, kind="stable")[:, :top]
        return [[part for k in best for part in (classes[k], float(q[k]))] for best, q in zip(order, p, strict=True)]

    if top is None:
        twice = len(set(classes)) < len(classes)
        return [PREDICTED, *(f"p:{name}{f' ({i})' if twice else ''}" for i, name in enumerate(classes))], rows
    ranks = ["", *(f"_{k}" for k in range(2, top + 1))]
    return [name + rank for rank in ranks for name in (PREDICTED, "p")], rows


def _regressor(head: ConvexHeadRegressor, top: int | None) -> Told:
    if top is not None:
        raise InputError("top is for classifiers: this run holds a regressor, whose outputs are all told")
    c = head.n_outputs_
    origin = head.model_.origin
    told = None if origin is None else origin.class_names
    names = told or (["output"] if c == 1 else [f"output_{k}" for k in range(1, c + 1)])
    return names, lambda tokens: head.predict(tokens).reshape(len(tokens), c).tolist()


# -- files -------------------------------------------------------------------------------------------------------------
def check_file(out: str | Path) -> Path:
    """The path of a table to be written, once it is known that it can be.

    Raises
    ------
    InputError
        Another kind of file, or a folder that is not there.
    MissingExtraError
        Parquet without pyarrow.
    """
    path = Path(out).expanduser()
    if path.suffix not in FORMATS:
        raise InputError(f"predictions are written as {' or '.join(FORMATS)}, got {str(out)!r}: choose one of these")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{str(out)!r} cannot be written: " + ("it is a folder" * path.is_dir() or "no such folder"))
    if path.suffix == ".parquet":
        require("pyarrow", "sources")
    return path


def write(predictions: Predictions, out: str | Path) -> int:
    """Write the table into the file ``out``, ``.csv`` or ``.parquet``, whole or not at all; the number of rows."""
    path = check_file(out)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        if path.suffix == ".parquet":
            count = _write_parquet(predictions, temporary)
        else:
            # Names of files may hold bytes that are no text.
            with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                count = write_csv(predictions, file)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return count


def write_csv(predictions: Predictions, file: IO[str]) -> int:
    """Write the table as CSV, numbers with 9 digits; the number of rows."""
    lines, count = csv.writer(file, lineterminator="\n"), 0
    lines.writerow(predictions.columns)
    for row in predictions:
        lines.writerow([f"{value:.9g}" if isinstance(value, float) else value for value in row])
        count += 1
    return count


def _write_parquet(predictions: Predictions, path: Path) -> int:
    import pyarrow
    from pyarrow import parquet

    words = (SPLIT, IMAGE, PREDICTED)
    kinds = [
        pyarrow.string() if name in words or name.startswith(f"{PREDICTED}_") else pyarrow.float64()
        for name in predictions.columns
    ]
    schema, rows, count = pyarrow.schema(list(zip(predictions.columns, kinds, strict=True))), iter(predictions), 0
    with parquet.ParquetWriter(path, schema) as file:
        while group := list(itertools.islice(rows, ROWS)):
            columns = [
                [_text(value) if kind == pyarrow.string() else value for value in values]
                for kind, values in zip(kinds, zip(*group, strict=True), strict=True)
            ]
            arrays = [pyarrow.array(values, kind) for values, kind in zip(columns, kinds, strict=True)]
            file.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
            count += len(group)
    return count


def _text(name: str) -> str:
    """A name as valid Unicode."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
