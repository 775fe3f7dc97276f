"""What the C library keeps of freed memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

from convexhead.runtime.freed_memory import LARGE

HOLES = """
import re, sys
from pathlib import Path
from convexhead.runtime.freed_memory import return_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000

blocks = [bytearray(100_000) for _ in range(2000)]
last = blocks[-1]  # what is freed below it stays with the process
del blocks
before = resident()
return_freed_memory(float(sys.argv[1]))
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc alone")
@pytest.mark.parametrize(("arrays", "returned"), [(0.9 * LARGE, False), (LARGE, True)])
def test_memory_is_returned_where_arrays_are_large(arrays: float, returned: bool) -> None:
    done = subprocess.run([sys.executable, "-c", HOLES, str(arrays)], capture_output=True, text=True, check=True)
    megabytes = float(done.stdout)
    assert megabytes > 150 if returned else abs(megabytes) < 10
