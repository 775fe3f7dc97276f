"""Files of a run: who may read them, and that none is replaced unasked."""

from __future__ import annotations

import os
import stat

import pytest

import convexhead as ch
from command import call
from convexhead import runs
from convexhead.errors import InputError
from convexhead.tokens import extract

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return extract("sklearn:digits", "patches:4", tmp_path_factory.mktemp("files") / "tokens")


def modes(folder):
    return {item.name: stat.S_IMODE(item.stat().st_mode) for item in [folder, *folder.iterdir()]}


@pytest.mark.parametrize(("umask", "file", "directory"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_the_umask_says_who_may_read(store, tmp_path, umask, file, directory):
    before = os.umask(umask)
    try:
        for overwrite in (False, True):  # written anew, and in place of another
            runs.fit(store.path, tmp_path / "run", head="linear", beta_ratio=0.5, overwrite=overwrite)
            found = modes(tmp_path / "run")
            assert found.pop("run") == directory
            assert set(found.values()) == {file}
            assert {"config.json", "weights.safetensors", "evidence.safetensors"} <= found.keys()
    finally:
        os.umask(before)
    assert [item.name for item in tmp_path.iterdir()] == ["run"]


def test_a_run_is_replaced_when_asked_to(store, tmp_path, capsys):
    out = tmp_path / "run"
    runs.fit(store.path, out, head="linear", beta_ratio=0.5)
    saved = (out / "config.json").read_bytes()
    for command, own in (("fit", ()), ("path", ("--beta-ratios", "0.5")), ("adam", ("--epochs", "1"))):
        capsys.readouterr()
        assert call(command, store.path, "--head", "linear", *own, "--out", out) == 1
        assert "--overwrite" in capsys.readouterr().err
        assert (out / "config.json").read_bytes() == saved
    assert call("fit", store.path, "--head", "linear", "--beta-ratio", 0.4, "--out", out, "--overwrite") == 0
    assert ch.load(out).beta_ratio == 0.4


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_from_its_checkpoint(store, tmp_path):
    out, fit = tmp_path / "run", {"head": "self-attention", "beta_ratio": 0.01, "tol": 1e-7}
    runs.fit(store.path, out, checkpoint_minutes=0.0, max_time=0.1, **fit)
    assert (tmp_path / "run.checkpoint").is_dir()
    with pytest.raises(InputError, match="overwrite"):
        runs.fit(store.path, out, **fit)
    runs.fit(store.path, out, checkpoint_minutes=0.0, max_time=1.0, **fit)
