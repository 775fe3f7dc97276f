"""Weights in files: safetensors, or what ``torch.save`` writes, without ever running code that a file brings.

Checkpoints of a training keep the network's tensors under names of its own: in a table ``state_dict``, ``model`` or
``teacher``, behind ``module.`` (of `DistributedDataParallel`) or ``backbone.`` (of DINO). Such a table and prefix are
taken away only if every parameter of the network is then there under its name.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from convexhead.errors import FileFormatError, InputError, warn
from convexhead.tokens.backbones.base import State

OF_TORCH = (".pth", ".pt", ".bin", ".ckpt", ".tar")


class Table(NamedTuple):
    """Tensors of a file; ``place`` are the keys that lead to them, joined by dots."""

    place: str
    state: State


def read_weights(file: str, wanted: set[str]) -> State:
    """Return the tensors of a file by the names that a network has for them.

    Parameters
    ----------
    wanted
        Names of the network's parameters.

    Raises
    ------
    InputError
        No such file, or several sets of these parameters in it.
    FileFormatError
        No weights in it, or something that only running its code would load.

    Warns
    -----
    UserWarning
        Says which table and prefix were taken away, and what was left out.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"there is no weights file {file!r}")
    tables = list(_tables(load_tensors(path), ""))
    if not tables:
        raise FileFormatError(f"{file!r} holds no tensors by name: save them with torch.save(model.state_dict(), FILE)")
    found = [(table, prefix) for table in tables for prefix in _prefixes(table.state, wanted)]
    table, prefix = _choose(file, found) if found else (tables[0], "")
    if not found and len(tables) > 1:
        places = ", ".join(repr(each.place) for each in tables[:5])
        raise FileFormatError(f"none of the tables {places} of {file!r} holds all parameters of this network")
    state = {name.removeprefix(prefix): value for name, value in table.state.items() if name.startswith(prefix)}
    if table.place or prefix:
        others = sum(len(each.state) for each in tables) - len(state)
        at = ".".join(part for part in (table.place, prefix.rstrip(".")) if part)
        warn(f"{file!r}: the weights under {at!r} are taken, which are all that this network needs; {others} other "
             "tensors are left out")  # fmt: skip
    return state


def load_tensors(path: Path) -> Any:
    """Return what a file holds, as data.

    Raises
    ------
    FileFormatError
        It is damaged, of another kind, or only running its code would load it.
    """
    return _load_torch(path) if path.suffix.lower() in OF_TORCH else _load_safetensors(path)


def _load_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except SafetensorError as error:
        kinds = ", ".join(OF_TORCH)
        raise FileFormatError(
            f"{str(path)!r} is not a safetensors file (or is cut short; files of torch.save end in {kinds}): {error}"
        ) from error


def _load_torch(path: Path) -> Any:
    again = "save its tensors alone: torch.save(model.state_dict(), FILE), or as safetensors"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise FileFormatError(f"{str(path)!r} is not a file of torch.save, or is cut short") from error
        raise FileFormatError(
            f"{str(path)!r} holds {named[1]}, an object whose loading may run code, which is never done here: {again}"
        ) from error
    except Exception as error:  # whatever damaged bytes lead the unpickler to
        if "TorchScript" in str(error):
            raise FileFormatError(f"{str(path)!r} is a TorchScript archive, which holds code: {again}") from error
        raise FileFormatError(f"{str(path)!r} is not a file of torch.save, or is cut short") from error


def _tables(value: Any, place: str) -> Iterator[Table]:
    """Yield the tables of tensors, those outside first."""
    if not isinstance(value, Mapping):
        return
    state = {key: v.detach() for key, v in value.items() if isinstance(key, str) and isinstance(v, Tensor)}
    if state:
        yield Table(place, state)
    for key, inner in value.items():
        yield from _tables(inner, f"{place}.{key}" if place else str(key))


def _prefixes(state: State, wanted: set[str]) -> list[str]:
    """Return what may stand before the wanted names so that all are there."""
    probe = max(wanted, key=len)
    ends = {name[: -len(probe)] for name in state if name.endswith(probe)}
    return sorted(
        prefix for prefix in ends if prefix[-1:] in ("", ".") and all(prefix + name in state for name in wanted)
    )


def _choose(file: str, found: list[tuple[Table, str]]) -> tuple[Table, str]:
    """Return the only set of weights; of several the one that stands free, or DINO's teacher."""
    free = [each for each in found if not each[0].place and not each[1]]
    teachers = [each for each in found if "teacher" in f"{each[0].place}.{each[1]}".split(".")]
    for some in (found, free, teachers):
        if len(some) == 1:
            return some[0]
    at = [".".join(part for part in (table.place, prefix.rstrip(".")) if part) for table, prefix in found]
    raise InputError(
        f"{file!r} holds weights of this network under {' and '.join(map(repr, at[:4]))}: save one of them alone"
    )
