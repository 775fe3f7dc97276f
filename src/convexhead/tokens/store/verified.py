"""Which shards were read in full and found whole, so that this is done once and not at every opening.

A file is known by device, inode, size, time of its last change of content and time of its last change of anything, in
nanoseconds. Programs can set the former time back but not the latter. The notes lie in the user's cache folder and not
beside the shards: those may be read-only or shared, and inodes and times mean nothing on another machine. A store's
notes are lines that are only ever appended, so that processes can write at the same time; what is garbled is not
believed. Where no note can be written, each process verifies for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from pathlib import Path

Stamp = tuple[int, ...]

YOUNG = 0.1, 2.0
"""Seconds within which another write could leave a file with the same times, where a file system counts nanoseconds
(in steps of the kernel's clock, 10 ms at most) and where it counts seconds (FAT: two)."""


def stamp(path: Path) -> Stamp:
    """What a file cannot keep when it is changed or exchanged."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def is_noted(path: Path, seen: Stamp, sha256: str) -> bool:
    """Whether the file of that stamp was found to hold what has this hash."""
    return _notes(path).get(path.name) == (seen, sha256)


def note(path: Path, seen: Stamp, sha256: str) -> None:
    """Keep in mind that the file of that stamp holds what has this hash, unless it is too young to be sure."""
    if os.name == "nt":  # there the last time is that of the file's creation
        return
    changed = max(seen[-2:])
    margin = YOUNG[changed % 10**9 == 0]
    if time.time_ns() - changed < 1e9 * margin:
        return
    line = json.dumps([path.name, seen, sha256]) + "\n"
    with contextlib.suppress(OSError, RuntimeError):
        file = _file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


_read: dict[Path, tuple[int, dict[str, tuple[Stamp, str]]]] = {}
_lock = threading.Lock()


def _notes(path: Path) -> dict[str, tuple[Stamp, str]]:
    """The notes about the files beside ``path``: lines that were added since the last look are read."""
    with _lock:
        try:
            file = _file(path)
            place, notes = _read.get(file, (0, {}))
            if file.stat().st_size < place:
                place, notes = 0, {}
            with open(file, "rb") as lines:
                lines.seek(place)
                added = lines.read()
        except (OSError, RuntimeError):
            return {}
        whole = added[: added.rfind(b"\n") + 1]
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, TypeError):
                name, seen, sha256 = json.loads(line)
                notes[name] = tuple(seen), sha256
        _read[file] = place + len(whole), notes
        return notes


def _file(path: Path) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(os.fsencode(path.parent.resolve())).hexdigest()[:32]
    return Path(home) / "convexhead" / "verified" / f"{name}.jsonl"
