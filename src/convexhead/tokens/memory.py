"""Keeping freed memory in the process, where the C library would give it back."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
KEPT = 1 << 30
"""Bytes of freed memory that stay with the process. Chosen by hand."""


def reuse_freed_memory() -> None:
    """Let glibc serve the next batch from the memory of the last one.

    By default it maps the large activations of every layer anew and unmaps them after use, and the kernel has to clear
    each page again: more than half of the time of a convolutional network on a CPU. Other C libraries are left alone.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT)
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_ARENA_MAX, 1)  # the arenas of other threads are too small for activations, which they map after all
