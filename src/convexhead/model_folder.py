"""Models on disk: a folder with ``config.json`` and ``weights.safetensors``; nothing is ever unpickled.

A folder appears whole or not at all: it is written beside its place and moved there. ``config.json`` holds the SHA-256
of the weights' file and one of itself, so a model is read as it was saved or not at all. Models of format 1 had
neither. They are read, but nothing ties their certificate to a problem, and it is no reference for others.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_bytes
from safetensors.numpy import save as to_bytes

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens.store.manifest import digest_json

FORMAT, VERSION = "convexhead-model", 2
Config = dict[str, Any]
Tensors = dict[str, NDArray[Any]]


def check_target(path: Path, *, overwrite: bool = True) -> None:
    """Refuse a place that a model cannot be saved in, before hours of training are spent on it.

    Raises
    ------
    InputError
        ``path`` is something else than a model folder; or it is one, and none may be replaced.
    """
    if not overwrite and (path / "config.json").is_file():
        raise InputError(f"{path} holds a trained head already: choose another path, or replace it with overwrite=True")
    if path.exists() and not (path / "config.json").is_file() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not a model folder: choose another path")


def write(path: Path, config: Config, tensors: Tensors) -> None:
    """Write the folder ``path``, replacing a model that is there.

    Raises
    ------
    InputError
        ``path`` is something else than a model folder.
    OSError
        The place cannot be written; what was there is kept.
    """
    check_target(path)
    config = {"format": FORMAT, "version": VERSION, **config}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    fresh.mkdir()  # this and open() obey the umask; files of tempfile and safetensors are for their owner alone
    try:
        weights = to_bytes({name: np.ascontiguousarray(value) for name, value in tensors.items()})
        config["weights_sha256"] = hashlib.sha256(weights).hexdigest()
        config["checksum"] = digest_json(config)
        (fresh / "weights.safetensors").write_bytes(weights)
        (fresh / "config.json").write_text(json.dumps(config, indent=1))
        old = path.with_name(f".{path.name}-replaced")
        if path.exists():
            _keep_others(path, fresh)
            path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _keep_others(old: Path, fresh: Path) -> None:
    """Copy what a user keeps beside the model in its folder."""
    for item in old.iterdir():
        if not (fresh / item.name).exists():
            (shutil.copytree if item.is_dir() else shutil.copy2)(item, fresh / item.name)


def read(path: Path) -> tuple[Config, Tensors]:
    """What `write` wrote.

    Raises
    ------
    FileFormatError
        Not a model folder, of a newer version, truncated, changed after it was saved, or its two files do not belong
        together.
    """
    config = _read_config(path)
    try:
        content = (path / "weights.safetensors").read_bytes()
        tensors = load_bytes(content)
    except (OSError, SafetensorError) as error:
        raise FileFormatError(
            f"{path / 'weights.safetensors'} is missing or damaged ({error}): save the model again"
        ) from error
    if config["version"] > 1 and config.get("weights_sha256") != hashlib.sha256(content).hexdigest():
        raise FileFormatError(
            f"{path / 'weights.safetensors'} holds other weights than were saved with its config.json, so the "
            "certificate there is not theirs: save the model again"
        )
    return config, tensors


def _read_config(path: Path) -> Config:
    try:
        config = json.loads((path / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileFormatError(f"{path} is not a model folder: it has no config.json") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path / 'config.json'} is damaged ({error}): save the model again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise FileFormatError(f"{path} is not a convexhead model: its config.json says nothing of {FORMAT!r}")
    if config.get("version") not in (1, VERSION):
        raise FileFormatError(
            f"{path} has format version {config.get('version')}, this convexhead reads {VERSION}: upgrade convexhead"
        )
    if config["version"] > 1 and config.pop("checksum", None) != digest_json(config):
        raise FileFormatError(
            f"{path} does not hold a complete model as it was saved (the checksum of config.json differs): "
            "save the model again"
        )
    return config
