"""A solve writes its state to a folder now and then, and the same solve resumes from it.

    checkpoint.json                  settings of the run, where it stands, checksum; replaced last and at once
    state-000003.safetensors         what all processes know: iterate, quasi-Newton memory, random generator
    rows-000003-00001.safetensors    what one process knows of its samples: outputs at the iterate and their average

A kill at any moment leaves the last complete checkpoint in place. Processes write their own rows and read the rows they
need, so any number of them can go on; with several hosts the folder lies where all of them see it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from convexhead._version import __version__
from convexhead.errors import FileFormatError, InputError
from convexhead.runtime.ranks import Ranks
from convexhead.tokens.store.files import make_folder, sha256_file, write_atomic
from convexhead.tokens.store.manifest import digest_json

FORMAT, VERSION = "convexhead-checkpoint", 2
MANIFEST = "checkpoint.json"
COPY_SECONDS = 1.0
"""Seconds between copies of the state in memory. The last copy is written if the run is interrupted. Chosen by hand: a
second of work is little to lose."""

State = dict[str, Tensor]


@dataclass
class Snapshot:
    """The state of a solve over ``n`` samples.

    ``about`` holds JSON values, ``shared`` the tensors that all processes have in common, and ``rows`` the tensors with
    a row for each sample of this process.
    """

    n: int
    about: dict[str, Any]
    shared: State
    rows: State


class Checkpoint:
    """A checkpoint is one folder, written by all processes of a run.

    Parameters
    ----------
    folder : path
    settings : dict
        What determines the iterates, as JSON values: a checkpoint of other settings is refused.
    minutes : float
        Between two checkpoints.
    ranks : Ranks
        The processes that write.

    Attributes
    ----------
    notes : dict
        JSON values that are written with every checkpoint; as they were read where there was one.

    Raises
    ------
    FileFormatError
        The checkpoint in ``folder`` is damaged or of another version.
    InputError
        It is of other settings, or ``folder`` holds other things.
    """

    def __init__(
        self, folder: str | Path, settings: dict[str, Any], *, minutes: float, ranks: Ranks | None = None
    ) -> None:
        if not minutes >= 0:
            raise InputError(f"minutes between checkpoints must be a number from 0, got {minutes!r}")
        self.folder, self._ranks = Path(folder), ranks or Ranks()
        self._settings = {**settings, "version of convexhead": __version__}
        self._seconds = 60 * minutes
        self._next_copy, self._next_write = 0.0, time.monotonic() + self._seconds
        self._latest: Snapshot | None = None
        self._manifest = self._ranks.first_does(self._read_manifest)
        self.notes: dict[str, Any] = self._manifest.get("notes", {})

    # -- writing ------------------------------------------------------------------------------------------------------
    def offer(self, snapshot: Callable[[], Snapshot]) -> None:
        """Keep the present state in memory, and write it if it is time.

        ``snapshot`` makes a copy that later work does not change.
        """
        now = time.monotonic()
        copy, write = self._ranks.largest(now >= self._next_copy, now >= self._next_write)
        if copy or write:
            self._latest = snapshot()
            self._next_copy = time.monotonic() + COPY_SECONDS
        if write:
            self.flush()

    def flush(self) -> None:
        """Write the last state that was offered, unless that is done.

        Raises
        ------
        StoreWriteError
            It cannot be written; the checkpoint before is kept.
        """
        if self._latest is None:
            return
        latest, self._latest = self._latest, None
        generation = self._manifest.get("generation", 0) + 1
        self._ranks.first_does(lambda: make_folder(self.folder))
        mine = {_rows_file(generation, self._ranks.rank): latest.rows}
        if self._ranks.rank == 0:
            mine[_state_file(generation)] = latest.shared
        digests = {name: self._encode(name, tensors) for name, tensors in mine.items()}
        files = {name: digest for part in self._ranks.gather(digests) for name, digest in part.items()}
        document = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self._settings,
            "notes": self.notes,
            "generation": generation,
            "files": files,
            "parts": [Ranks(k, self._ranks.size).share(latest.n).start for k in range(self._ranks.size)],
            "samples": latest.n,
            "about": latest.about,
        }
        document["checksum"] = digest_json(document)
        self._ranks.first_does(lambda: self._replace(document))
        self._manifest = document
        self._next_write = time.monotonic() + self._seconds

    def _encode(self, name: str, tensors: State) -> str:
        """Write a file of tensors and return the hash of its bytes."""
        copies = {
            key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()
        }  # views share memory
        content = safetensors.torch.save(copies)
        write_atomic(self.folder / name, content)
        return hashlib.sha256(content).hexdigest()

    def _replace(self, document: dict[str, Any]) -> None:
        write_atomic(self.folder / MANIFEST, json.dumps(document).encode())
        current = f"{document['generation']:06d}"
        for path in _files(self.folder):
            if current not in path.name:
                path.unlink()

    # -- reading ------------------------------------------------------------------------------------------------------
    def load(self) -> Snapshot | None:
        """Read the last checkpoint with this process's share of the rows; None if there is none.

        Raises
        ------
        FileFormatError
            A file is missing or damaged.
        """
        if not self._manifest:
            return None
        generation, starts, n = (self._manifest[name] for name in ("generation", "parts", "samples"))
        shared = self._decode(_state_file(generation))
        wanted = self._ranks.share(n)
        pieces = []
        for part, (start, stop) in enumerate(zip(starts, [*starts[1:], n], strict=True)):
            if start < wanted.stop and wanted.start < stop:
                rows = self._decode(_rows_file(generation, part))
                inside = slice(max(wanted.start - start, 0), wanted.stop - start)
                pieces.append({name: value[inside] for name, value in rows.items()})
        rows = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        return Snapshot(n, self._manifest["about"], shared, rows)

    def _read_manifest(self) -> dict[str, Any]:
        """Read the manifest in the folder and refuse another run's; empty if there is none."""
        path = self.folder / MANIFEST
        if not path.is_file():
            if self.folder.exists() and (
                not self.folder.is_dir() or set(self.folder.iterdir()) - set(_files(self.folder))
            ):
                raise InputError(f"{self.folder} exists and holds no checkpoint: choose another folder")
            return {}
        try:
            document: dict[str, Any] = json.loads(path.read_bytes())
            known = (document.get("format"), document.get("version"))
        except (OSError, ValueError, AttributeError) as error:
            raise self._damaged(MANIFEST, error) from error
        if known != (FORMAT, VERSION):
            raise FileFormatError(
                f"the checkpoint {self.folder} is of format {known}, this convexhead reads {(FORMAT, VERSION)}: "
                "finish the run with the version that began it, or delete the folder to begin anew"
            )
        checksum = document.pop("checksum", None)
        if checksum != digest_json(document):
            raise self._damaged(MANIFEST, "its checksum differs")
        before, now = document["settings"], json.loads(json.dumps(self._settings))
        for name in {**now, **before}:
            if before.get(name) != now.get(name):
                told = f"{before.get(name)!r} and not {now.get(name)!r}"
                if "sha256:" in told:
                    told = "another"
                raise InputError(
                    f"the checkpoint {self.folder} is of another run, its {name} is {told}: "
                    "choose another folder, or delete that one to begin anew"
                )
        return document

    def _decode(self, name: str) -> State:
        try:
            if sha256_file(self.folder / name) != self._manifest["files"][name]:
                raise self._damaged(name, "its checksum differs")
            with safe_open(self.folder / name, framework="pt") as file:
                # Copies: products may round otherwise where numbers lie as they do in a file, not aligned.
                return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError) as error:
            raise self._damaged(name, error) from error

    def _damaged(self, name: str, error: object) -> FileFormatError:
        return FileFormatError(
            f"the checkpoint {self.folder / name} is missing or damaged ({error}): delete the folder to begin anew"
        )


def remove(folder: Path) -> None:
    """Delete a checkpoint, or a folder of checkpoints, where there is one."""
    parts = [path.parent for path in [*folder.glob(MANIFEST), *folder.glob(f"*/{MANIFEST}")]]
    for part in parts:
        for path in [part / MANIFEST, *_files(part)]:
            path.unlink()
    for part in dict.fromkeys([*parts, folder]) if parts else ():
        if not any(part.iterdir()):
            part.rmdir()


def _files(folder: Path) -> list[Path]:
    return [path for kind in ("state", "rows") for path in folder.glob(f"{kind}-*.safetensors*")]


def _state_file(generation: int) -> str:
    return f"state-{generation:06d}.safetensors"


def _rows_file(generation: int, part: int) -> str:
    return f"rows-{generation:06d}-{part:05d}.safetensors"
