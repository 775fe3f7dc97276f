"""Heads as bare weights: torch's layers and state dicts, and files of them.

| from | weights | |
|---|---|---|
| ``torch.nn.Linear``, a state dict, ``.pth``, ``.pt``, ``.bin``, ``.safetensors`` | ``weight (c, d)``, ``bias (c,)`` | under any prefix |
| ``.npz`` | ``coef_ (c, d)``, ``intercept_ (c,)``, also without ``_`` or as above | ``classes_``, ``C`` if there |

No file is unpickled: what a file might run is not run.
"""  # noqa: E501 - a table

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convexhead.errors import FileFormatError, InputError
from convexhead.foreign.attentive import HEADS, AttentiveProbe, has_queries, read_attentive_state
from convexhead.foreign.linear_head import LinearHead, numbers
from convexhead.tokens.backbones.weights_file import OF_TORCH, load_tensors

ARRAYS = ".npz"
PICKLES = (".pkl", ".pickle", ".joblib")
SAVE = "numpy.savez(file, coef_=clf.coef_, intercept_=clf.intercept_, classes_=clf.classes_, C=clf.C)"
NAMES = {"coef": "weight", "coef_": "weight", "weight": "weight", "intercept": "bias", "intercept_": "bias",
         "bias": "bias", "classes": "classes", "classes_": "classes", "C": "C"}  # fmt: skip
"""What the arrays of an ``.npz`` are."""
TRAINING = ("optimizer", "optim", "scheduler", "lr_scheduler", "optimizer_states", "lr_schedulers", "scaler")
"""Parts of a checkpoint beside the weights."""


def read_layer(layer: torch.nn.Module) -> LinearHead:
    """The head of a `torch.nn.Linear`.

    Raises
    ------
    InputError
        Another module, or a linear layer that computes something else.
    """
    name = f"this {type(layer).__name__}"
    if not isinstance(layer, torch.nn.Linear) or type(layer).forward is not torch.nn.Linear.forward:
        raise InputError(
            f"{name} is no plain torch.nn.Linear, nor an attentive probe with queries: what it does before its linear "
            "layer is not known here; pass that layer, and as X the features that reach it"
        )
    bias = None if layer.bias is None else numbers(layer.bias, f"the bias of {name}")
    return LinearHead(name, numbers(layer.weight, f"the weight of {name}"), bias)


def read_state(state: Mapping[str, Any], name: str = "this state dict") -> LinearHead | AttentiveProbe:
    """The head of a state dict with a single linear layer, or with queries and what reads by them, under any prefix.

    Raises
    ------
    InputError
        There is another number of linear layers, or something besides.
    """
    tensors = dict(_tensors(state))
    if has_queries(tensors):
        return read_attentive_state(tensors, name)
    layers = [key.removesuffix("weight") for key in tensors if _is_last(key, "weight") and tensors[key].ndim == 2]
    if len(layers) != 1:
        some = f" ({', '.join(map(repr, layers[:4]))}{', …' if len(layers) > 4 else ''})" if layers else ""
        raise InputError(
            f"{name} must hold one linear layer, a weight (c, d) and a bias (c,); it holds {len(layers)}{some}"
        )
    prefix = layers[0]
    more = [key for key in tensors if key not in (f"{prefix}weight", f"{prefix}bias")]
    if more:
        raise InputError(
            f"{name} holds more than a linear layer ({', '.join(map(repr, more[:4]))}"
            f"{', …' if len(more) > 4 else ''}), such as a norm before it: keep weight and bias alone, and pass the "
            "features that reach the layer"
        )
    weight, bias = tensors[f"{prefix}weight"], tensors.get(f"{prefix}bias")
    return LinearHead(name, numbers(weight, f"the weight of {name}"), None if bias is None else numbers(bias, "bias"))


def _is_last(key: str, part: str) -> bool:
    return key.rpartition(".")[2] == part


def _tensors(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All weights of a nested state dict by their whole names, without those of the training."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            if str(key) not in TRAINING:
                yield from _tensors(value, f"{prefix}{key}.")
        elif _is_last(key, HEADS) or (isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim):
            yield f"{prefix}{key}", torch.as_tensor(value)


def read_file(path: Path) -> LinearHead | AttentiveProbe:
    """The head in a file of weights.

    Raises
    ------
    FileFormatError
        The file is of no known kind, damaged, or would have to be unpickled.
    InputError
        What it holds is no such head.
    """
    name, kind = repr(str(path)), path.suffix.lower()
    if not path.is_file():
        raise InputError(f"there is no file {name}")
    if kind == ARRAYS:
        return _read_arrays(path, name)
    if kind in PICKLES:
        raise FileFormatError(
            f"{name} is a pickle, which can run code and is not read: load it yourself and pass it to certify, or save "
            f"its weights by {SAVE}"
        )
    if kind not in (".safetensors", *OF_TORCH):
        raise FileFormatError(f"{name} is no file of weights: .npz, .safetensors, .pth and .pt are read")
    state = load_tensors(path)
    if isinstance(state, Mapping):
        return read_state(state, name)
    raise FileFormatError(f"{name} holds a {type(state).__name__} and no state dict: save the layer's state_dict()")


def _read_arrays(path: Path, name: str) -> LinearHead:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise FileFormatError(f"{name} cannot be read as arrays ({error}): save plain ones by {SAVE}") from error
    foreign = [key for key in arrays if key not in NAMES]
    found = {NAMES[key]: array for key, array in arrays.items() if key in NAMES}
    if foreign or "weight" not in found or len(found) < len(arrays):
        raise InputError(
            f"{name} must hold coef_ (c, d) and nothing but intercept_, classes_ and C beside it, each once, but holds "
            f"{', '.join(arrays) or 'nothing'}: save it by {SAVE}"
        )
    bias, C = found.get("bias"), found.get("C")
    coef = np.atleast_2d(numbers(found["weight"], f"coef_ of {name}"))
    intercept = None if bias is None else np.atleast_1d(numbers(bias, f"intercept_ of {name}"))
    if C is not None and (C.size != 1 or C.dtype.kind not in "iuf" or not 0 < float(C.item()) < np.inf):
        raise InputError(f"C of {name} must be one positive number")
    classes = found.get("classes")
    if classes is not None and classes.shape != ((2,) if len(coef) == 1 else (len(coef),)):
        raise InputError(f"{name} has {len(coef)} rows of weights, but classes of shape {classes.shape}")
    return LinearHead(
        name, coef, intercept, classes, beta=None if C is None else lambda n, W: 1 / (float(C.item()) * W)
    )
