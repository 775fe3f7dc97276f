"""Extraction in two processes under torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from convexhead.tokens import extract

RUN = """
import sys
from convexhead.errors import ConvexHeadError
from convexhead.tokens import extract

source, out = sys.argv[1:]
options = {"image_size": 64, "shard_size": 4, "layer": 4}
options["progress"] = lambda p: print("share", p.processes, p.total)
try:
    extract(source, "packaged:efficientnet-lite0", source, **options)
except ConvexHeadError as error:
    print("error", error)
print("finished", extract(source, "packaged:efficientnet-lite0", out, **options)["train"].shape[0])
"""


@pytest.mark.slow
def test_two_processes_write_what_one_writes(photos: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--log-dir", str(tmp_path / "logs"), "--redirects", "3", str(script), str(photos)]
    done = subprocess.run([*command, str(tmp_path / "two")], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    outputs = [path.read_text().splitlines() for path in (tmp_path / "logs").rglob("stdout.log")]
    assert len(outputs) == 2
    # An error of the first process reaches both: the folder of the images is no place for tokens.
    assert all(lines[0].startswith("error") and "no tokens: choose a new" in lines[0] for lines in outputs)
    # 22 + 6 images in 6 + 2 shards of at most 4: each process writes every other one.
    assert {line for lines in outputs for line in lines if line.startswith("share")} == {
        "share 2 16",
        "share 2 12",
    }
    assert all(lines[-1] == "finished 22" for lines in outputs)
    extract(photos, "packaged:efficientnet-lite0", tmp_path / "one", image_size=64, shard_size=4, layer=4)
    two, one = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("two", "one"))
    assert two == one
