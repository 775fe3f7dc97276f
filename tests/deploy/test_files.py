"""Files of heads, read and run by a process that cannot import this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import convexhead as ch
from command import call
from convexhead.deploy import export_run
from convexhead.errors import InputError

ALONE = """
import io, json, sys
sys.modules["convexhead"] = None  # nobody can import it
import numpy as np
folder, inputs = sys.argv[1], np.load(sys.argv[2])
found = {}

import onnxruntime
for name in ("images", "tokens"):
    session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx")
    assert [put.name for put in session.get_inputs()] == [name]
    found[f"onnx {name}"] = session.run(None, {name: inputs[name]})[0]
    names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])

import torch
extra = {"about.json": ""}
network = torch.export.load(f"{folder}/images.pt2", extra_files=extra).module()
found["export images"] = network(torch.from_numpy(inputs["images"])).detach().numpy()
assert json.loads(extra["about.json"])["class_names"] == json.dumps(names)

from safetensors import safe_open
with safe_open(f"{folder}/weights.safetensors", "np") as file:
    told, w = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
T = inputs["tokens"]
X = (T - w["reduction.mean"]) * w["reduction.scale"] @ w["reduction.basis"]
if json.loads(told["constant"]):
    X = np.concatenate([X, np.ones_like(X[..., :1])], -1)
scores = np.einsum("npd,kde,nqe->nkpq", X, w["U"], X)
mixed = np.einsum("nkpq,nqe->nkpe", scores, X).mean(2) / X.shape[1]
found["safetensors"] = np.einsum("nke,kec->nc", mixed, w["V"])

import skops.io
regression = skops.io.load(f"{folder}/linear.skops")
found["sklearn"] = regression.predict_proba(T.mean(1))
found["labels"] = regression.predict(T.mean(1))
np.savez(sys.argv[3], **found)
"""


@pytest.mark.slow
def test_files_run_without_this_package(work, photos, tmp_path):
    for package in ("onnxscript", "onnxruntime", "skops"):
        pytest.importorskip(package)
    assert call("export", work / "run", "--with-backbone", "--out", tmp_path / "images.onnx") == 0
    assert call("export", work / "run", "--out", tmp_path / "tokens.onnx") == 0
    export_run(work / "run", tmp_path / "images.pt2", format="export", with_backbone=True)
    export_run(work / "run", tmp_path / "weights.safetensors", format="safetensors")
    export_run(work / "linear", tmp_path / "linear.skops", format="sklearn")
    test = ch.TokenStore.open(work / "tokens")["test"]
    raw = np.concatenate(list(test.raw_chunks())).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", images=photos, tokens=raw)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, tmp_path, tmp_path / "inputs.npz", tmp_path / "found.npz"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(np.load(tmp_path / "found.npz"))
    clf, linear = ch.load(work / "run"), ch.load(work / "linear")
    expected = clf.decision_function(test)
    for name in ("onnx images", "onnx tokens", "export images", "safetensors"):
        np.testing.assert_allclose(found.pop(name), expected, atol=1e-3 * np.abs(expected).max(), err_msg=name)
    np.testing.assert_allclose(found.pop("sklearn"), linear.predict_proba(test), atol=1e-4)
    assert found.pop("labels").tolist() == [linear.class_names_[label] for label in linear.predict(test)]
    assert not found


@pytest.mark.slow
def test_two_classes_are_one_column_of_scikit_learn(tmp_path):
    skops = pytest.importorskip("skops.io")
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(40, 5, 3)), np.where(np.arange(40) % 2, "yes", "no")
    for pool, intercept in (("mean", True), ("cls", False)):
        clf = ch.ConvexHeadClassifier("linear", pool=pool, fit_intercept=intercept, beta_ratio=0.1).fit(X, y)
        export_run(clf, tmp_path / "file", format="sklearn")
        regression = skops.load(tmp_path / "file")
        pooled = X.mean(1) if pool == "mean" else X[:, 0]
        np.testing.assert_allclose(regression.predict_proba(pooled), clf.predict_proba(X), atol=1e-9)
        assert (regression.predict(pooled) == clf.predict(X)).all()


def test_a_machine_is_told(work, tmp_path, capsys):
    capsys.readouterr()
    assert call("export", work / "run", "--format", "safetensors", "--out", tmp_path / "w", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(tmp_path / "w")
    assert told["difference"] is None
    assert "U, V" in told["content"]


@pytest.mark.parametrize(
    ("run", "out", "options", "message"),
    [
        ("run", "file", {"format": "onxx"}, "did you mean 'onnx'"),
        ("run", ".", {}, "it is a folder"),
        ("run", "none/file", {}, "no such folder"),
        ("run", "file", {"backbone": "patches:2"}, "--with-backbone"),
        ("run", "file", {"format": "safetensors", "with_backbone": True}, "holds no network"),
        ("run", "file", {"format": "sklearn"}, "--head linear"),
        ("linear", "file", {"with_backbone": True, "backbone": "patches:4"}, "backbone is"),
    ],
)
def test_what_cannot_be_written(work, tmp_path, run, out, options, message):
    with pytest.raises(InputError, match=message):
        export_run(work / run, tmp_path / out, **options)
    assert not list(tmp_path.iterdir())
