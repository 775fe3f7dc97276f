"""Files that are written whole or not at all, and the lock that gives a folder one writer at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from convexhead.errors import ConvexHeadError

try:
    import fcntl
except ImportError:  # Windows: there the folder is not locked
    fcntl = None  # type: ignore[assignment]

LOCK = "writer.lock"


class StoreWriteError(ConvexHeadError, OSError):
    """A token store cannot be written: full disk, read-only folder, missing permission, another writer."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that at any moment it has its old content or all of its new content.

    Raises
    ------
    StoreWriteError
        It cannot be written; the old file, if any, is untouched.
    """
    # A fixed name: what a killed run leaves behind, the next run overwrites.
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        _refuse(path, error)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents where they do not exist.

    Raises
    ------
    StoreWriteError
        It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreWriteError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from error


@contextlib.contextmanager
def writer_lock(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into ``folder`` as long as the block runs.

    The operating system holds the lock and takes it back when the process ends, however it ends: a file that
    a dead process left behind locks nobody out. Its text says who holds it.

    Raises
    ------
    StoreWriteError
        Another process holds it, or the folder cannot be written.
    """
    path = folder / LOCK
    descriptor = _take(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _take(path: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            _refuse(path, error)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last owner may have removed the file between our opening and locking it.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
            os.close(descriptor)
        except BlockingIOError as error:
            owner = os.read(descriptor, 500).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise StoreWriteError(
                f"{str(path.parent)!r} is being written by {owner}: wait until it is done, "
                "or start all processes of one run with torchrun"
            ) from error
        except OSError as error:
            os.close(descriptor)
            _refuse(path, error)


def sha256_file(path: Path) -> str:
    """Hash a file without holding it in memory; a missing one hashes to nothing."""
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _refuse(path: Path, error: OSError) -> NoReturn:
    reason = error.strerror or str(error)
    raise StoreWriteError(
        f"cannot write {str(path)!r}: {reason}; what was finished is kept, run the same again to resume"
    ) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system can open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
