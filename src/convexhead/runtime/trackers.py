"""Rows of a training, written where its owner looks at them.

========================  ============================================================
``FILE.csv``              a table; its columns are those of the first row
``FILE.jsonl``            a JSON object a line
``tensorboard:FOLDER``    scalars for TensorBoard
``wandb:PROJECT``         a run of Weights & Biases
========================  ============================================================

A tracker is a callback: of `fit` of an estimator, of `regularization_path`, of `train_adam`. A value that is None is an
empty cell, a ``null``, or no scalar.

    with track("rows.csv") as log:
        clf.fit(X, y, callback=log)
"""

from __future__ import annotations

import contextlib
import csv
import json
import numbers
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from convexhead.errors import InputError, require

Write = Callable[[dict[str, Any], int], None]
"""Takes the values of a row, and its number."""


class Tracker:
    """A callback that writes the numbers and words of every row it is called with."""

    def __init__(self, write: Write) -> None:
        self._write, self._count = write, 0

    def __call__(self, row: Any) -> None:
        values = row if isinstance(row, dict) else row.to_dict()
        plain = {name: value for name, value in values.items() if isinstance(value, (str, numbers.Real, type(None)))}
        self._write(plain, self._count)
        self._count += 1


@contextlib.contextmanager
def track(where: str | Path) -> Iterator[Tracker]:
    """Open a tracker (see the module's table). A file that is there is replaced; rows are written as they come.

    Raises
    ------
    InputError
        Another kind of place, or a folder that is not there.
    MissingExtraError
        TensorBoard or W&B is not installed.
    """
    scheme, colon, rest = str(where).partition(":")
    if colon and scheme in SERVICES:
        with SERVICES[scheme](rest) as write:
            yield Tracker(write)
        return
    path = Path(where).expanduser()
    if path.suffix not in FILES:
        raise InputError(
            f"rows are written to {', '.join(f'FILE{suffix}' for suffix in FILES)}, tensorboard:FOLDER or "
            f"wandb:PROJECT, got {str(where)!r}: choose one of these"
        )
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{str(where)!r} cannot be written: " + ("it is a folder" * path.is_dir() or "no such folder"))
    with open(path, "w", newline="", encoding="utf-8") as file:
        yield Tracker(FILES[path.suffix](file))


def tracking(where: str | Path | None) -> contextlib.AbstractContextManager[Callable[[Any], None]]:
    """`track`, or where None is given a callback that does nothing."""
    return contextlib.nullcontext(lambda row: None) if where is None else track(where)


def _csv(file: Any) -> Write:
    columns: list[str] = []

    def write(values: dict[str, Any], step: int) -> None:
        lines = csv.writer(file, lineterminator="\n")
        if not columns:
            columns.extend(values)
            lines.writerow(columns)
        lines.writerow([values.get(name, "") for name in columns])
        file.flush()

    return write


def _jsonl(file: Any) -> Write:
    def write(values: dict[str, Any], step: int) -> None:
        file.write(json.dumps(values, default=float) + "\n")
        file.flush()

    return write


@contextlib.contextmanager
def _tensorboard(folder: str) -> Iterator[Write]:
    require("tensorboard", "trackers")
    writer = require("torch.utils.tensorboard", "trackers").SummaryWriter(folder)

    def write(values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, numbers.Real):
                writer.add_scalar(name, float(value), step)

    try:
        yield write
    finally:
        writer.close()


@contextlib.contextmanager
def _wandb(project: str) -> Iterator[Write]:
    run = require("wandb", "trackers").init(project=project or None)
    try:
        yield lambda values, step: run.log({k: v for k, v in values.items() if v is not None}, step=step)
    finally:
        run.finish()


FILES: dict[str, Callable[[Any], Write]] = {".csv": _csv, ".jsonl": _jsonl}
SERVICES: dict[str, Callable[[str], contextlib.AbstractContextManager[Write]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
