"""Worker processes of a comparison: how they end."""

import signal
import subprocess
import sys
import time
from pathlib import Path

LOOKS = "import os, torch; from convexhead.experiments.training import leave_with; leave_with(os.getppid(), 1e-5)\n"


def test_a_worker_ends_without_an_abort():
    """A thread that wakes while Python ends aborts half of the processes."""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", LOOKS], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_worker_ends_with_its_parent(tmp_path):
    worker, noted = tmp_path / "worker.py", tmp_path / "pid"
    worker.write_text(
        f"{LOOKS}import time; print(os.getpid(), file=open({str(noted)!r}, 'w'), flush=True); time.sleep(60)"
    )
    begin = f"import subprocess, sys, time; subprocess.Popen([sys.executable, {str(worker)!r}]); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", begin])
    assert soon(lambda: noted.exists() and noted.read_text().endswith("\n"))
    pid = int(noted.read_text())
    assert alive(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert soon(lambda: not alive(pid))


def soon(holds) -> bool:
    """Whether something holds within half a minute."""
    end = time.monotonic() + 30
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()


def alive(pid: int) -> bool:
    """Whether a process runs, and does not only wait to be counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
