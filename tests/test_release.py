"""What is uploaded to PyPI: links of its page, and the wheel in an environment of its own."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import convexhead as ch

ROOT = Path(__file__).parents[1]
DIST = ROOT / "tools" / "dist.py"
EXTRAS = (
    "PIL", "datasets", "h5py", "jinja2", "matplotlib", "onnx", "onnxruntime", "onnxscript", "pyarrow", "skops", "timm",
    "torchvision", "transformers", "zarr",
)  # fmt: skip
FIT = """
import numpy as np, convexhead as ch
rng = np.random.default_rng(0)
X, y = rng.normal(size=(60, 9, 4)), np.arange(60) % 3
clf = ch.ConvexHeadClassifier(beta_ratio=0.3, random_state=0).fit(X, y)
assert clf.certificate_.converged
clf.save("run")
assert (ch.load("run").predict(X) == clf.predict(X)).all()
print("site-packages" in ch.__file__, ch.__version__)
"""
DEMO = """
from pathlib import Path
from convexhead.experiments.demo import run_demo
try:
    run_demo(Path("demo"))
except ch.MissingExtraError as error:
    assert "pip install 'convexhead[demo]'" in str(error)
else:
    raise AssertionError("the demo ran without its packages")
"""


def test_page_on_pypi_has_absolute_links_to_files_of_its_version():
    page = (ROOT / "README.md").read_text()
    there = runpy.run_path(str(DIST))["absolute"](page, "https://example.org/o/r/", "9.8")
    targets = re.findall(r"\]\(([^)]+)\)", there)
    assert targets
    for target in targets:
        assert target.startswith("https://")
    files = [match.groups() for match in re.finditer(r"https://example.org/o/r/(blob|raw)/v9.8/([^)#]+)", there)]
    assert {"blob", "raw"} == {kind for kind, _ in files}
    assert all((ROOT / file).exists() for _, file in files)


def test_no_upload_without_an_address(tmp_path):
    run = subprocess.run([sys.executable, DIST, "--url", "", "--out", tmp_path], capture_output=True, text=True)
    assert run.returncode == 2
    assert "say where the repository can be read" in run.stderr


@pytest.mark.slow
def test_core_needs_no_extra(tmp_path):
    """Without packages of extras a fit and a saved run work, and the demo asks for all that it needs at once."""
    code = f"import sys; sys.modules |= dict.fromkeys({EXTRAS})\n" + FIT + DEMO
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert run.returncode == 0, run.stderr


def test_lowest_versions_are_those_of_the_package():
    """(The patch release of scipy is the first that has wheels.)"""
    tomllib = pytest.importorskip("tomllib")
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lowest = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints-lowest.txt").read_text(), re.M))
    stated = dict(dependency.split(">=") for dependency in dependencies)
    assert stated.keys() == lowest.keys()
    for name, version in stated.items():
        assert f"{lowest[name]}.".startswith(f"{version}."), name


@pytest.mark.table
@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-lowest.txt"])
def test_wheel_works_with_the_core_dependencies_alone(tmp_path, constraints):
    subprocess.run([sys.executable, DIST, "--url", "https://example.org/o/r", "--out", tmp_path / "dist"], check=True)
    assert len(list((tmp_path / "dist").glob(f"convexhead-{ch.__version__}.tar.gz"))) == 1
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / constraints, wheel]
    subprocess.run(install, check=True)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = subprocess.run(
        [python, "-m", "convexhead", "--version"], check=True, capture_output=True, text=True, env=env
    )
    assert told.stdout.strip() == ch.__version__
    installed = subprocess.run(
        [python, "-m", "pip", "list"], check=True, capture_output=True, text=True, env=env
    ).stdout
    assert not {"pillow", "matplotlib", "torchvision"} & set(installed.lower().split())
    fitted = subprocess.run([python, "-c", FIT], check=True, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert fitted.stdout.split() == ["True", ch.__version__]
