"""What the C library does with freed memory: it keeps some of it, and gives the rest back to the system."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
KEPT = 1 << 30
"""Bytes of freed memory that stay with the process. Chosen by hand."""

LARGE = 1e7
"""Bytes of arrays below which what is free stays. Chosen by hand: to give it back and to ask for it again takes
milliseconds."""


def reuse_freed_memory() -> None:
    """Let glibc serve the next batch from the memory of the last one.

    By default it maps the large activations of every layer anew and unmaps them after use, and the kernel has to clear
    each page again: more than half of the time of a convolutional network on a CPU. Other C libraries are left alone.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT)
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_ARENA_MAX, 1)  # the arenas of other threads are too small for activations, which they map after all


def return_freed_memory(arrays: float) -> None:
    """Give the system what is free, where the ``arrays`` at work take so many bytes that it matters.

    Arrays that come next and are of another size do not fit into the holes.
    """
    if arrays >= LARGE and (trim := _glibc("malloc_trim")) is not None:
        trim(0)


def _glibc(function: str) -> Any:
    """A function of glibc; None where that is not the C library."""
    return getattr(ctypes.CDLL(None), function, None) if sys.platform.startswith("linux") else None
