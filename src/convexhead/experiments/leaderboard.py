"""A leaderboard: a file with one JSON line a result, to which probes of many backbones and data sets are appended."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convexhead.errors import FileFormatError
from convexhead.tokens.store.files import StoreWriteError, make_folder


def known_ids(path: Path) -> set[str]:
    """The ``id`` of every line.

    Raises
    ------
    FileFormatError
        The file holds anything but JSON objects, a line each.
    """
    if path.is_dir():
        raise FileFormatError(f"{str(path)!r} is a folder: choose a file for the leaderboard")
    if not path.exists():
        return set()
    found = set()
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{str(path)!r} cannot be read as text: choose another leaderboard") from error
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            found.add(str(json.loads(line)["id"]))
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(
                f"line {i + 1} of {str(path)!r} is no JSON object with an id: choose another leaderboard"
            ) from error
    return found


def append(path: Path, entries: Sequence[dict[str, Any]]) -> int:
    """Append the entries whose ``id`` the file does not hold yet, in one write; how many these were.

    Raises
    ------
    FileFormatError
        See `known_ids`.
    StoreWriteError
        The file cannot be written.
    """
    known = known_ids(path)
    new = [entry for entry in entries if entry["id"] not in known]
    if not new:
        return 0
    text = "".join(json.dumps(entry) + "\n" for entry in new)
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        text = "\n" + text
    make_folder(path.parent)
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, text.encode())  # one write: two processes do not mix their lines
        finally:
            os.close(file)
    except OSError as error:
        raise StoreWriteError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    return len(new)
