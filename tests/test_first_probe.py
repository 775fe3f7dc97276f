"""The first page of the guide, followed to the letter by somebody who has the wheel and an empty environment alone.

Every block of commands and Python on the page is run as it stands, then the Python of the page on export.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.table
ROOT = Path(__file__).parents[1]
CERTIFICATE = re.compile(r"objective [\d.]+ is within [\d.e-]+ \(([\d.]+)%\) of the global optimum")


def blocks(page):
    """``(language, text)`` of the blocks of code of a page, in order."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x", "-C", folder / "source"], input=archive, check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, folder / "source"]
    subprocess.run(build, check=True)
    return next(folder.glob("*.whl"))


def test_from_photographs_to_a_prediction_by_onnxruntime(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    user = tmp_path / "user"
    user.mkdir()
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    kept |= {"PATH": f"{tmp_path / 'env' / 'bin'}:{kept['PATH']}", "PIP_CONSTRAINT": str(ROOT / "constraints.txt")}

    def run(language, text):
        text = re.sub(r"'convexhead(\[\w+\])'", rf"'{wheel}\1'", text)
        command = ["bash", "-euc", text] if language == "bash" else ["python", "-c", text]
        done = subprocess.run(command, cwd=user, env=kept, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    said = []
    for language, text in blocks("first-probe.md"):
        if "NEW_PHOTOS" in text:
            shutil.copytree(user / "PHOTOS" / "test" / "3", user / "NEW_PHOTOS")
        said.append(run(language, text))
    assert (user / "probe" / "index.html").stat().st_size > 10_000
    assert (user / "report.html").stat().st_size > 10_000

    found = CERTIFICATE.search(" ".join("\n".join(said).split()))
    assert float(found[1]) <= 0.1

    shutil.copy(next((user / "NEW_PHOTOS").iterdir()), user / "photo.jpg")
    language, reads_it = next(block for block in blocks("export.md") if "onnxruntime" in block[1])
    name = run(language, reads_it + "print(logits.shape, logits.max())\n").split()[0]
    assert name in {str(digit) for digit in range(10)}
    rows = (user / "new.csv").read_text().splitlines()[1:]
    first = {row.split(",")[0].rpartition("/")[2]: row for row in rows}
    assert len(first) == len(list((user / "NEW_PHOTOS").iterdir()))
    assert np.mean([f",{3}," in row for row in rows]) > 0.9
