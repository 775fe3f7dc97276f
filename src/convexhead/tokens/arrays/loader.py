"""What a `torch.utils.data.DataLoader` yields, as arrays in temporary files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from convexhead.errors import InputError
from convexhead.tokens.arrays.rows import Rows, mapped, rows_of, unpack


def as_loaders(source: Any) -> dict[str, Any] | None:
    """Return the loaders of each split, where ``source`` is one (of train) or a mapping to some; else None."""
    if isinstance(source, DataLoader):
        return {"train": source}
    if isinstance(source, Mapping) and source and all(isinstance(each, DataLoader) for each in source.values()):
        return dict(source)
    return None


def read_loader(loader: Any, split: str, run: Callable[[Tensor], Tensor] | None = None) -> dict[str, Rows]:
    """Read a loader once, to its end, and return its arrays by role.

    Parameters
    ----------
    loader
        Yields ``(tokens, labels)`` or ``(tokens, labels, names)``.
    run
        Makes tokens of what the loader yields in their place.

    Raises
    ------
    InputError
        Batches of another form, or tokens of another shape than those of the first.
    """
    labels: list[Any] = []
    names: list[str] = []
    shape: tuple[int, ...] = ()
    dtype: Any = None
    where = f"the batches of {split}"

    def blocks() -> Iterator[Any]:
        nonlocal shape, dtype
        for batch in loader:
            if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3) or not isinstance(batch[0], Tensor):
                raise InputError(f"{where} must be (tensor, labels) or (tensor, labels, names), not {_form(batch)}")
            tokens = batch[0] if run is None else run(batch[0])
            tokens = tokens.detach().cpu()
            tokens = tokens.float() if tokens.dtype == torch.bfloat16 else tokens
            if dtype is None:
                shape, dtype = tuple(tokens.shape[1:]), tokens.numpy().dtype
            if (tuple(tokens.shape[1:]), tokens.numpy().dtype) != (shape, dtype):
                raise InputError(
                    f"{where} differ: {dtype} {shape} a sample, then {tokens.dtype} {tuple(tokens.shape[1:])}"
                )
            new = batch[1].tolist() if isinstance(batch[1], Tensor) else list(batch[1])
            if len(new) != len(tokens) or (len(batch) == 3 and len(batch[2]) != len(tokens)):
                raise InputError(f"{where} have {len(tokens)} samples with {len(new)} labels")
            labels.extend(new)
            names.extend(str(name) for name in (batch[2] if len(batch) == 3 else []))
            yield tokens.contiguous().numpy().data

    file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as its rows
    unpack(blocks(), file)
    if not labels:
        raise InputError(f"there are no {where.removeprefix('the ')}")
    found = {
        "tokens": mapped(file, dtype, 0, (len(labels), *shape), f"tokens of {split}"),
        "labels": rows_of(np.array(labels), f"labels of {split}"),
    }
    return found | ({"names": rows_of(np.array(names), f"names of {split}")} if names else {})


def class_names_of(loaders: Mapping[str, Any]) -> list[str] | None:
    """Return ``classes`` of the loaders' data sets, as torchvision has them, where all have the same."""
    found = set()
    for loader in loaders.values():
        dataset = loader.dataset
        while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):  # of a subset
            dataset = dataset.dataset
        found.add(tuple(map(str, getattr(dataset, "classes", ()))))
    names = found.pop() if len(found) == 1 else ()
    return list(names) or None


def _form(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"({', '.join(type(part).__name__ for part in batch)})"
    return type(batch).__name__
