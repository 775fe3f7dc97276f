"""Kills, full and read-only disks, and two writers: a clear error, and the good part kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens import Progress, StoreWriteError, TokenStore, extract, merge_stores
from convexhead.tokens.store.files import LOCK, writer_lock

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


@pytest.mark.slow
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


@pytest.mark.parametrize("how", ["appears", "disappears", "is rewritten"])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_source_that_changes_meanwhile_is_noticed(kind: str, how: str, photos: Path, tmp_path: Path) -> None:
    """The last image or shard is changed when the first batch is done; without the change the same run ends well."""
    source, last, other = str(photos), photos / "test" / "dog" / "img3.png", photos / "train" / "cat" / "img1.png"
    if kind == "shards":
        for split in ("train", "test"):
            with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
                for path in sorted((photos / split).rglob("*.png")):
                    name = f"{path.parent.name}-{path.stem}"
                    (tmp_path / "label").write_text(path.parent.name)
                    archive.add(path, f"{name}.png")
                    archive.add(tmp_path / "label", f"{name}.cls")
        source, last, other = f"webdataset:{tmp_path}", tmp_path / "test.tar", tmp_path / "train.tar"
    extract(source, "patches:4", tmp_path / "calm")
    seen = []

    def change(progress: Progress) -> None:
        if seen:
            return
        seen.append(progress)
        if how == "appears":
            shutil.copy(last, last.with_stem("new"))
        elif how == "disappears":
            last.unlink()
        else:
            time.sleep(0.01)
            shutil.copy(other, last)

    expected = {"appears": "appeared", "disappears": "disappeared", "is rewritten": "was rewritten"}[how]
    options = {"shard_size": 4, "batch_size": 4, "skip_broken": True}
    with pytest.raises(InputError, match=f"changed while its images were read: .*{expected}"):
        extract(source, "patches:4", tmp_path / "out", progress=change, **options)
    with pytest.raises(FileFormatError, match="not finished"):
        TokenStore.open(tmp_path / "out")


def test_shards_that_do_not_account_for_every_image(photos: Path, tmp_path: Path) -> None:
    """A shard of the same settings and fewer images, as a killed copy of it could leave, completes no store."""
    out = extract(photos, "patches:4", tmp_path / "out", shard_size=4).path
    shutil.copy(out / "train-00005.safetensors", out / "train-00001.safetensors")
    (out / "manifest.json").unlink()
    with pytest.raises(FileFormatError, match="account for 20 of 22 images"):
        extract(photos, "patches:4", out, shard_size=4)


def test_shards_of_broken_images_alone(photos: Path, tmp_path: Path) -> None:
    """First, inner and last shards without a single image are kept, read over, verified and merged."""
    files = [f"train/{name}/img{i}.png" for name in ("cat", "dog") for i in range(1, 12)]
    broken = [*files[:4], *files[8:16], *files[20:]]
    for name in broken:
        (photos / name).write_bytes(b"no image")
    store = extract(photos, "patches:4", tmp_path / "out", shard_size=4, skip_broken=True)
    store.verify()
    left = [name for name in files if name not in broken]
    assert store["train"].files == left
    assert store["train"].broken == broken
    assert store["train"].read().shape == store["train"][:].shape == (len(left), 9, 48)
    np.testing.assert_array_equal(store["train"][[0, 4, 7]], store["train"].read()[[0, 4, 7]])
    assert sum(len(chunk) for chunk in store["train"].chunks(3)) == len(left)
    (photos / "train" / "cat" / "img12.png").write_bytes((photos / left[0]).read_bytes())
    other = extract(photos, "patches:4", tmp_path / "other", shard_size=4, skip_broken=True)
    assert merge_stores([store.path, other.path], tmp_path / "both")["train"].shape[0] == 2 * len(left) + 1
