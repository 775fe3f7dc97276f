"""A folder in which a run keeps every finished piece of work, so that it goes on where it was stopped.

    OUT/settings.json              what is run: the same command must agree with it
    OUT/pieces/NAME.json           one finished piece: a fit along β, a training run, the scores on the test images
    OUT/pieces/NAME.safetensors    its weights, where it has some
    OUT/models/NAME/               a fitted estimator, as `convexhead.load` reads it

A piece exists once its JSON file does, which is written last and whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from convexhead._version import __version__
from convexhead.errors import FileFormatError
from convexhead.tokens.store.files import LOCK, make_folder, write_atomic

FORMAT = "convexhead-experiment"
OTHERS = ("tokens", LOCK)
"""Names that may lie in the folder before a run begins."""


@dataclass
class Piece:
    """JSON-able values, weights by name, and the name under which `RunFolder.once` keeps them."""

    record: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    name: str = ""


class RunFolder:
    """See the module's text.

    Parameters
    ----------
    path : Path
        Made where it does not exist.
    on_piece : callable (str) or None
        Called with the name of every piece when it is begun, and again when it is finished.
    """

    def __init__(self, path: Path, on_piece: Callable[[str], None] | None = None) -> None:
        self.path = path
        self._on_piece = on_piece or (lambda name: None)

    def begin(self, settings: dict[str, Any]) -> None:
        """Note what is run, or check that it is what the folder was begun with.

        Raises
        ------
        FileFormatError
            The folder holds something else, or a run with other settings; the message names them.
        """
        settings = json.loads(json.dumps({"format": FORMAT, "convexhead": __version__, **settings}))
        file = self.path / "settings.json"
        make_folder(self.path)
        if file.is_file():
            before = self._read(file)
            if before.get("format") != FORMAT:
                raise FileFormatError(f"{file} belongs to something else: choose another folder")
            old, new = _flat(before), _flat(settings)
            changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            if changed:
                told = "; ".join(f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in changed)
                raise FileFormatError(
                    f"{str(self.path)!r} holds a run with other settings ({told}): choose another folder, or delete it"
                )
            return
        self.check()
        write_atomic(file, json.dumps(settings, indent=1).encode())

    def check(self) -> None:
        """Refuse a folder that holds anything but a run, before anything is written into it.

        Raises
        ------
        FileFormatError
            It is a file, or holds other things.
        """
        if self.path.is_file():
            raise FileFormatError(f"{str(self.path)!r} is a file: choose a folder for the run")
        if not self.path.is_dir() or (self.path / "settings.json").is_file():
            return
        for item in sorted(self.path.iterdir()):
            if item.name not in OTHERS and item.suffix != ".tmp":
                raise FileFormatError(
                    f"{str(self.path)!r} holds {item.name!r} but no run: choose a new or an empty folder"
                )

    def once(self, name: str, make: Callable[[], Piece]) -> Piece:
        """The piece ``name``: read if it is finished, else made and kept."""
        record, weights = self._file(name, ".json"), self._file(name, ".safetensors")
        if record.is_file():
            return Piece(self._read(record), self._weights(weights) if weights.is_file() else {}, name)
        self._on_piece(name)
        piece = make()
        piece.name = name
        make_folder(record.parent)
        if piece.tensors:
            write_atomic(weights, to_bytes({key: value.contiguous() for key, value in piece.tensors.items()}))
        write_atomic(record, json.dumps(piece.record).encode())
        self._on_piece(name)
        return piece

    def drop_weights(self, name: str) -> None:
        """Delete the weights of the piece ``name``, which stays finished; nothing where it has none."""
        self._file(name, ".safetensors").unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder, if it holds a run; nothing where there is none."""
        if (self.path / "settings.json").is_file():
            shutil.rmtree(self.path)

    def has(self, name: str) -> bool:
        """Whether the piece ``name`` is finished."""
        return self._file(name, ".json").is_file()

    def names(self) -> list[str]:
        """Of the finished pieces, in the order in which they were finished."""
        pieces = self.path / "pieces"
        files = sorted(pieces.rglob("*.json"), key=lambda file: (file.stat().st_mtime_ns, file))
        return [str(file.relative_to(pieces).with_suffix("")) for file in files]

    def record(self, name: str) -> dict[str, Any]:
        """The values of the finished piece ``name``."""
        return self._read(self._file(name, ".json"))

    def count(self) -> int:
        """Finished pieces."""
        return sum(1 for _ in self._records())

    def seconds(self) -> float:
        """What the finished pieces took, by their records."""
        return float(sum(self._read(record)["seconds"] for record in self._records()))

    def _records(self) -> Iterator[Path]:
        return (self.path / "pieces").rglob("*.json")

    def model(self, name: str) -> Path:
        """Where the estimator ``name`` lies."""
        return self.path / "models" / name

    def _file(self, name: str, ending: str) -> Path:
        return self.path / "pieces" / f"{name}{ending}"

    @staticmethod
    def _read(file: Path) -> dict[str, Any]:
        try:
            values: dict[str, Any] = json.loads(file.read_bytes())
            return values
        except ValueError as error:
            raise FileFormatError(f"{file} is damaged ({error}): delete it and run the same again") from error

    @staticmethod
    def _weights(file: Path) -> dict[str, Tensor]:
        try:
            return load_file(file)
        except SafetensorError as error:
            raise FileFormatError(
                f"{file} is damaged ({error}): delete it and its .json, run the same again"
            ) from error


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of settings beside the others."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flat(value) if isinstance(value, dict) else {key: value})
    return flat
