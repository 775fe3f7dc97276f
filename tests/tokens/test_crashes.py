"""Kills, full and read-only disks, and two writers: a clear error, and the good part kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from convexhead.errors import FileFormatError
from convexhead.tokens import StoreWriteError, TokenStore, extract
from convexhead.tokens.files import LOCK, writer_lock

# A process that has imported everything forks one child an attempt: 25 interpreters would take a minute.
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from convexhead.tokens import extract

source, calm, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])

def run(folder):
    extract(source, "patches:2", folder, shard_size=16, batch_size=8, token_pool=2)

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

def written(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("t*.safetensors")}

def attempt(folder, seconds):
    child = os.fork()
    if child == 0:
        run(folder)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

start = time.monotonic()
assert attempt(calm, None) == 0
whole = time.monotonic() - start
chance, kills, number, rewritten = random.Random(0), 0, 0, 0
before = {}
while kills < 25:
    folder = out / str(number)
    status = attempt(folder, chance.uniform(0, whole / 4))
    assert status in (0, signal.SIGKILL), status
    now = written(folder)
    # Every shard that was there is there still, and was not written again.
    assert all(now.get(path) == stamp for path, stamp in before.items())
    before = now
    kills += status == signal.SIGKILL
    if status == 0:
        assert contents(folder) == contents(calm)
        number, before = number + 1, {}
folder = out / str(number)
assert attempt(folder, None) == 0
assert contents(folder) == contents(calm)
print(kills, number + 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_25_kills_change_nothing(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        KILLS,
        "sklearn:digits",
        str(tmp_path / "calm"),
        str(tmp_path / "killed"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    kills, stores = map(int, done.stdout.split())
    assert kills == 25
    assert stores < 20, "most kills should hit an unfinished store"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts a memory file system with the given options, or skips the test."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.strip()}")
        return folder

    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def test_full_disk_keeps_the_good_part(small_disk: Callable[[str], Path], tmp_path: Path) -> None:
    disk = small_disk("size=300k")
    with pytest.raises(StoreWriteError, match=r"No space left on device.*resume"):
        extract("sklearn:digits", "patches:2", disk / "out", shard_size=100)
    written = {path: path.stat().st_mtime_ns for path in (disk / "out").glob("train-*")}
    assert 0 < len(written) < 13
    assert not list((disk / "out").glob("*.tmp"))
    assert not (disk / "out" / LOCK).exists()
    with pytest.raises(FileFormatError, match="not finished"):
        TokenStore.open(disk / "out")
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    done = extract("sklearn:digits", "patches:2", disk / "out", shard_size=100)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in written.items())
    done.verify()
    calm = extract("sklearn:digits", "patches:2", tmp_path / "calm", shard_size=100)
    assert {p.name: p.read_bytes() for p in done.path.iterdir()} == {
        p.name: p.read_bytes() for p in calm.path.iterdir()
    }


def test_read_only_disk(small_disk: Callable[[str], Path], photos: Path) -> None:
    disk = small_disk("size=1m")
    finished = extract(photos, "patches:3", disk / "done")
    (disk / "begun").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for name in ("begun", "new"):
        with pytest.raises(StoreWriteError, match="Read-only file system"):
            extract(photos, "patches:3", disk / name)
    with pytest.raises(StoreWriteError, match="Read-only file system"):
        extract(photos, "patches:3", finished.path, constant=True)
    extract(photos, "patches:3", finished.path).verify()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StoreWriteError, match="Permission denied"):
        extract(photos, "patches:3", tmp_path / "locked" / "out")


def test_two_writers(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (
        writer_lock(out),
        pytest.raises(StoreWriteError, match=rf"is being written by process {os.getpid()} on"),
    ):
        extract(photos, "patches:3", out)
    assert not list(out.iterdir())
    extract(photos, "patches:3", out).verify()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_lock_of_a_dead_process_is_taken_over(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    child = os.fork()
    if child == 0:
        held = writer_lock(out)
        held.__enter__()
        os._exit(1)
    os.waitpid(child, 0)
    assert (out / LOCK).exists()
    extract(photos, "patches:3", out).verify()
    assert not (out / LOCK).exists()
