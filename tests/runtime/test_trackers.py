"""Rows of a training, as files and through stand-ins of services."""

from __future__ import annotations

import csv
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import convexhead as ch
from command import call
from convexhead.errors import InputError, MissingExtraError
from convexhead.runtime.trackers import track
from convexhead.tokens import import_arrays

X, Y = np.random.default_rng(0).normal(size=(40, 4, 3)), np.arange(40) % 2


def test_files_hold_the_history(tmp_path):
    with track(tmp_path / "rows.jsonl") as log:
        clf = ch.ConvexHeadClassifier("mlp", beta_ratio=0.1).fit(X, Y, callback=log)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows
    assert [row["objective"] for row in rows] == [row["objective"] for row in clf.history_]
    with track(tmp_path / "path.csv") as log:
        solved = ch.regularization_path(X, Y, head="mlp", beta_ratios=[0.5, 0.2], X_val=X, y_val=Y, callback=log)
    with open(tmp_path / "path.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["beta_ratio"]) for row in table] == [row["beta_ratio"] for row in solved]
    assert "model" not in table[0]


def test_command(tmp_path, capsys):
    import_arrays({"train": (X.astype(np.float32), Y)}, tmp_path / "store", class_token=False)
    fit = ("fit", tmp_path / "store", "--head", "mlp", "--beta-ratio", 0.2)
    assert call(*fit, "--out", tmp_path / "run", "--log", tmp_path / "rows.csv") == 0
    assert (tmp_path / "rows.csv").read_text().startswith("seconds,objective,gap,heads\n")
    capsys.readouterr()
    assert call(*fit, "--out", tmp_path / "other", "--log", "rows.txt") == 1
    assert "FILE.csv" in capsys.readouterr().err


def test_paths_write_a_row_for_each_beta(tmp_path):
    """And a value that is None is an empty cell, or a null."""
    import_arrays({"train": (X.astype(np.float32), Y)}, tmp_path / "store", class_token=False)
    path = ("path", tmp_path / "store", "--head", "mlp", "--beta-ratios", "0.2,0.5", "--json")
    assert call(*path, "--log", tmp_path / "rows.csv") == 0
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["beta_ratio"]) for row in rows] == [0.5, 0.2]
    assert all(0 <= float(row["val_score"]) <= 1 and float(row["relative_gap"]) <= 1e-3 for row in rows)
    for name, found in (("rows.csv", "a,b\n1,\n"), ("rows.jsonl", '{"a": 1, "b": null}\n')):
        with track(tmp_path / name) as log:
            log({"a": 1, "b": None})
        assert (tmp_path / name).read_text() == found


def test_services(monkeypatch):
    seen = []
    writer = SimpleNamespace(add_scalar=lambda *row: seen.append(row), close=lambda: seen.append("closed"))
    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = lambda folder: seen.append(folder) or writer
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    with track("tensorboard:runs/a") as log:
        log({"gap": 0.5, "head": "mlp", "val_score": None, "model": object()})
    assert seen == ["runs/a", ("gap", 0.5, 0), "closed"]
    seen.clear()
    run = SimpleNamespace(log=lambda values, step: seen.append((values, step)), finish=lambda: seen.append("done"))
    wandb = ModuleType("wandb")
    wandb.init = lambda project: seen.append(project) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with track("wandb:heads") as log:
        log({"gap": 0.5, "val_score": None})
        log({"gap": 0.25})
    assert seen == ["heads", ({"gap": 0.5}, 0), ({"gap": 0.25}, 1), "done"]


def test_what_cannot_be_opened(tmp_path, monkeypatch):
    for where, message in (("rows.txt", "FILE.csv"), (tmp_path / "no" / "a.csv", "no such folder")):
        with pytest.raises(InputError, match=message), track(where):
            pass
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match="trackers"), track("wandb:heads"):
        pass
