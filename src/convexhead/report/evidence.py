"""What a run folder keeps beside its model for a report: predictions, sample tokens, how it was made.

``evidence.json`` is plain text for people and programs, ``evidence.safetensors`` the arrays. With them a report needs
neither the token store nor any arithmetic over the data, and the same run gives the same report. A head with an output
for every token has no arrays: ``pixels`` are its scores, see `convexhead.report.pixels`.

=====================  ==========  =============================================================================
array                  shape
=====================  ==========  =============================================================================
``labels``             ``(n,)``    the true output of every scored image, −1 for a class that training never saw
``predicted``          ``(n,)``    the output with the largest logit
``confidence``         ``(n,)``    its probability
``loss``               ``(n,)``    −log of the probability of the true class
``top5``               ``(n,)``    whether the true class is among the five largest logits
``lift``               ``(k, c)``  which head serves which classes, see `interpret.head_lift`
``sample``             ``(g,)``    rows of the images that a gallery shows: the worst errors, then every class in turn
``tokens``             ``(g, s, d)``  their tokens
=====================  ==========  =============================================================================
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes

from convexhead.errors import ConvexHeadError, FileFormatError, InputError
from convexhead.interpret import head_lift, spectra
from convexhead.report import pixels
from convexhead.runtime.hardware import environment
from convexhead.tokens.store.files import sha256_file, write_atomic
from convexhead.tokens.store.store import TokenStore

FORMAT, VERSION = "convexhead-evidence", 1
SAMPLE, WORST = 64, 16
"""Number of images in a gallery, and how many of them are the worst errors. Chosen by hand."""
BATCH = 1_000
"""Number of images scored at a time. Chosen by hand."""

Array = NDArray[Any]


@dataclass
class Evidence:
    """``about`` is what `evidence.json` holds, ``arrays`` the arrays of the module's table."""

    about: dict[str, Any]
    arrays: dict[str, Array]

    @property
    def right(self) -> Array:
        """Whether each image is predicted right."""
        return self.arrays["labels"] == self.arrays["predicted"]

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def collect(
    model: Any,
    store: TokenStore,
    *,
    command: Sequence[str] = (),
    path: Sequence[Mapping[str, Any]] | None = None,
    at_edge: str | None = None,
    selection: Mapping[str, Any] | None = None,
    images: str | None = None,
) -> Evidence:
    """Score ``model`` on the test split of ``store`` (else val, else train) and keep what a report shows.

    Parameters
    ----------
    model : ConvexHeadClassifier
        Fitted.
    command : sequence of str
        That made the run, as on a command line.
    path : sequence of dict or None
        Rows of `regularization_path`, for the spectra along β.
    at_edge : {"low", "high"} or None
        The edge of its grid that the chosen β lies at, see `path.grid_edge`.
    selection : dict or None
        How β was chosen: ``folds`` of a cross-validation, or ``held_out`` images and whether the head was trained again
        on all images (``refit``). None: by hand.
    images : str or None
        Where images with masks are, if not where they were when the tokens were extracted.

    Raises
    ------
    InputError
        The tokens are not those of this head.
    """
    split = next(name for name in ("test", "val", "train") if name in store.splits)
    view = model.as_fitted_on(store[split])
    if view.shape[1:] != (model.n_tokens_, model.n_features_in_) or len(view.class_names) <= int(max(model.classes_)):
        raise InputError(
            f"{store.path} holds {view.shape[1]} tokens x {view.shape[2]} channels and {len(store.class_names)} classes"
            f"; this head was fitted on others: give the store that it was fitted on"
        )
    info, files = store.info(), view.files
    arrays, sample, seen = dict[str, Array](), np.arange(0), dict[str, Any]()
    if model.pool is None:
        seen = _pixels(model, view, images or info["source"])
    else:
        position = {int(label): i for i, label in enumerate(model.classes_)}
        labels = np.array([position.get(int(label), -1) for label in model.labels_of(store[split])])
        starts = range(0, len(view), BATCH)
        arrays = _score(np.concatenate([model.model_.outputs(view[i : i + BATCH])[:, 0] for i in starts]), labels)
        sample = choose_sample(arrays)
        lift = head_lift(model, view, torch.from_numpy(labels))
        arrays |= {"lift": lift.numpy(), "sample": sample, "tokens": view[sample]}
    about = {
        "format": FORMAT,
        "version": VERSION,
        "command": shlex.join(command),
        "environment": _environment(),
        "split": split,
        "classes": [view.class_names[int(label)] for label in model.classes_],
        "files": [files[i] for i in sample],
        "tokens": info | {"path": str(store.path.resolve()), "source": _absolute(info["source"])},
        "path": None if path is None else [_path_row(row) for row in path],
        "at_edge": at_edge,
        "selection": None if selection is None else dict(selection),
        **seen,
    }
    return Evidence(about, arrays)


def _pixels(model: Any, view: Any, images: str) -> dict[str, Any]:
    """Scores of pixels, or why there are none: the images may be elsewhere than the tokens."""
    try:
        return {"pixels": pixels.collect(model, view, images)}
    except (ConvexHeadError, OSError) as error:
        return {"pixels": None, "missing": str(error).splitlines()[0]}


def _score(logits: Array, labels: Array) -> dict[str, Array]:
    log_p = torch.log_softmax(torch.from_numpy(logits), 1).numpy()
    rows, predicted = np.arange(len(labels)), logits.argmax(1)
    five = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    return {
        "labels": labels,
        "predicted": predicted,
        "confidence": np.exp(log_p[rows, predicted]),
        "loss": -log_p[rows, np.maximum(labels, 0)],
        "top5": (five == labels[:, None]).any(1),
    }


def choose_sample(scores: Mapping[str, Array], size: int = SAMPLE, worst: int = WORST) -> Array:
    """Rows of the ``worst`` errors by loss, then of the classes in turn until there are ``size``."""
    labels, wrong = scores["labels"], scores["labels"] != scores["predicted"]
    by_loss = np.argsort(-scores["loss"], kind="stable")
    first = [int(i) for i in by_loss if wrong[i] and labels[i] >= 0][:worst]
    turn = np.zeros(len(labels), np.int64)  # how many of its class come before each image
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    others = [int(i) for i in np.lexsort((labels, turn)) if int(i) not in set(first)]
    return np.array(first + others[: size - len(first)], np.int64)


def _path_row(row: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in row.items() if key != "model"}
    return plain | {"spectra": {name: values.tolist() for name, values in spectra(row["model"]).items()}}


def _environment() -> dict[str, Any]:
    return {key: value for key, value in environment().items() if key != "date" and value is not None}


def _absolute(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


# -- on disk -----------------------------------------------------------------------------------------------------------
def write(evidence: Evidence, folder: Path) -> None:
    """Put ``evidence`` beside the model in ``folder``, bound to its weights."""
    arrays = to_bytes({name: np.ascontiguousarray(array) for name, array in evidence.arrays.items()})
    write_atomic(folder / "evidence.safetensors", arrays)
    about = evidence.about | {"weights": sha256_file(folder / "weights.safetensors")}
    write_atomic(folder / "evidence.json", json.dumps(about, indent=1).encode())


def read(folder: Path) -> Evidence | None:
    """What `write` wrote; None where there is nothing.

    Raises
    ------
    FileFormatError
        Damaged, of a newer version, or of another model than the folder's.
    """
    path = folder / "evidence.json"
    if not path.is_file():
        return None
    again = "fit again, or give the token store with --tokens"
    try:
        about = json.loads(path.read_text())
        known = about["format"] == FORMAT and about["version"] == VERSION
        arrays = load_file(folder / "evidence.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FileFormatError(f"the evidence in {folder} is damaged ({error}): {again}") from error
    if not known:
        raise FileFormatError(f"the evidence in {folder} is of another version: {again}")
    if about["weights"] != sha256_file(folder / "weights.safetensors"):
        raise FileFormatError(f"the evidence in {folder} is of another model than the one beside it: {again}")
    return Evidence(about, arrays)
