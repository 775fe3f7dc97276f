"""What lies in folders: listing them, and telling whether files are still what they were."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from convexhead.errors import InputError

SMALL = 20_000
"""Mean bytes of a file under which threads only wait for each other's turn in Python: hashing takes no time."""


class Stamp(NamedTuple):
    """What tells a file that was rewritten: bytes and time of the last change; -1 where there is no file."""

    bytes: int
    time: int


class FolderContent:
    """The bytes of the files ``names`` below ``root``.

    Parameters
    ----------
    mark : callable (content) -> bytes
        What the fingerprint has of a file's content beside that itself.
    """

    def __init__(self, root: Path, names: list[str], mark: Callable[[bytes], bytes] = lambda _: b"") -> None:
        self.root, self.names, self.mark = root, names, mark
        self._stamps: dict[str, Stamp] = {}

    def fingerprint(self) -> str:
        """Hash every name and every file's bytes; a file that cannot be read counts as one without bytes."""
        self._stamps = self._stamp(self.names)
        digest = hashlib.sha256()
        with ThreadPoolExecutor() as pool:
            some = self.names[:: len(self.names) // 100 + 1]
            small = sum(self._stamps[name].bytes for name in some) < SMALL * len(some)
            hashes = (map if small else pool.map)(self._hash_file, self.names)
            for name, content in zip(self.names, hashes, strict=True):
                # Names may hold bytes that are no text.
                digest.update(f"{name}\0{content}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def changed(self, now: list[str]) -> str | None:
        """Name a file that appeared, disappeared or was rewritten since the fingerprint was taken.

        Parameters
        ----------
        now : list of str
            The names that there are now.
        """
        if strangers := set(now) ^ set(self.names):
            name = min(strangers)
            return f"{name!r} {'appeared' if name in now else 'disappeared'}"
        stamps = self._stamp(now) if self._stamps else {}
        return next((f"{name!r} was rewritten" for name in stamps if stamps[name] != self._stamps[name]), None)

    def _stamp(self, names: list[str]) -> dict[str, Stamp]:
        stamps = {}
        for name in names:
            stamps[name] = Stamp(-1, -1)
            with contextlib.suppress(OSError):
                status = os.stat(f"{self.root}/{name}")
                if stat.S_ISREG(status.st_mode):
                    stamps[name] = Stamp(status.st_size, status.st_mtime_ns)
        return stamps

    def _hash_file(self, name: str) -> str:
        content = b""
        # Reading a pipe would wait for ever.
        if self._stamps[name].bytes >= 0:
            with contextlib.suppress(OSError), open(f"{self.root}/{name}", "rb") as file:
                content = file.read()
        return hashlib.sha256(content + self.mark(content)).hexdigest()


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name.

    Raises
    ------
    InputError
        It cannot be listed.
    """
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot list the folder {str(folder)!r}: {error.strerror}") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one."""
    # Links that go round in circles would raise from `DirEntry.is_dir`.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
