"""Weights of ``torch.save``: the same tokens as from safetensors, prefixes only where all parameters match, no code."""

from __future__ import annotations

import argparse
import os
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from convexhead.errors import FileFormatError, InputError
from convexhead.tokens import open_backbone

pytest.importorskip("PIL")
from convexhead.tokens.backbones.timm_import import import_timm

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def models() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [import_timm().create_model(NAME, num_classes=0, depth=12).eval() for _ in range(2)]


@pytest.fixture(scope="module")
def state(models: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    return models[0].state_dict()


def before(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in state.items()}


HEAD = {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight": torch.ones(2, 2)}
WAYS = {
    "plain": (lambda s: s, None),
    "parameters": (lambda s: {k: torch.nn.Parameter(v) for k, v in s.items()}, None),
    "state_dict": (lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(())}}}},
                   "under 'state_dict' are taken"),
    "model": (lambda s: {"model": OrderedDict(s), "args": {"lr": 0.1}}, "under 'model'"),
    "DDP": (lambda s: before("module.", s), "under 'module'"),
    "DINO": (lambda s: {"teacher": {**before("backbone.", s), **HEAD}}, "under 'teacher.backbone'.* 2 other tensors"),
    "teacher and student": (
        lambda s: {"student": before("module.backbone.", before("", {k: v + 1 for k, v in s.items()})),
                   "teacher": {**before("backbone.", s), **HEAD}},
        "under 'teacher.backbone'",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_same_weights(tmp_path: Path, models: list[torch.nn.Module], state: dict[str, Any], way: str) -> None:
    wrap, told = WAYS[way]
    torch.save(wrap(state), tmp_path / "w.pth")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backbone = open_backbone(f"timm:{NAME}@{tmp_path / 'w.pth'}", image_size=32)
    notes = [str(each.message) for each in caught if "are taken" in str(each.message)]
    assert len(notes) == (told is not None)
    if told is not None:
        assert re.search(told, notes[0]), notes
    save_file(state, tmp_path / "w.safetensors")
    other = open_backbone(f"timm:{NAME}@{tmp_path / 'w.safetensors'}", image_size=32)
    assert backbone.weights_hash == other.weights_hash
    image = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(backbone(image).tokens, other(image).tokens, rtol=0, atol=0)
    model = import_timm().create_model(NAME, num_classes=0, img_size=32).eval()
    timm_models = import_timm().models.vision_transformer
    model.load_state_dict(timm_models.checkpoint_filter_fn(dict(state), model))
    x = (image.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        torch.testing.assert_close(backbone(image).tokens, model.forward_features(x)[:, 1:], rtol=1e-4, atol=1e-4)


class Code:
    def __reduce__(self) -> Any:
        return os.system, ("touch was-run",)


REFUSED = {
    "code": (lambda s: {"state_dict": s, "x": Code()}, r"holds (posix|nt)\.system.*may run code"),
    "settings": (lambda s: {"teacher": s, "args": argparse.Namespace(lr=1)}, r"argparse\.Namespace.*save its tensors"),
    "a whole model": (lambda s: torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear.*may run code"),
    "a missing key": (lambda s: {k: v for k, v in s.items() if k != "blocks.7.mlp.fc1.bias"}, "blocks.7.mlp.fc1.bias"),
    "a missing key behind a prefix": (
        lambda s: {f"module.{k}": v for k, v in s.items() if k != "norm.weight"}, "do not fit"),
    "two sets": (lambda s: {"a": s, "b": {k: v + 1 for k, v in s.items()}}, "under 'a' and 'b': save one"),
    "none of two": (lambda s: {"a": {"x": torch.ones(1)}, "b": {"y": torch.ones(1)}}, "none of the tables 'a', 'b'"),
    "another shape": (lambda s: {**s, "norm.weight": torch.ones(3)}, "do not fit"),
    "a tensor": (lambda s: torch.ones(3), "no tensors by name"),
    "nothing": (lambda s: {}, "no tensors by name"),
    "a strange key": (lambda s: {**s, "extra.weight": torch.ones(1)}, "do not fit.*extra.weight"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", REFUSED)
def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Any], way: str) -> None:
    monkeypatch.chdir(tmp_path)
    wrap, told = REFUSED[way]
    torch.save(wrap(state), "w.pth")
    with pytest.raises((InputError, FileFormatError), match=told) as caught:
        open_backbone(f"timm:{NAME}@w.pth")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


@pytest.mark.slow
def test_files_that_are_none(tmp_path: Path, state: dict[str, Any]) -> None:
    torch.save(state, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(FileFormatError, match="TorchScript archive, which holds code"):
        open_backbone(f"timm:{NAME}@{tmp_path / 'script.pt'}")
    for content in (b"", b"PK", b"text", os.urandom(1000), whole[:1000], whole[:-100]):
        (tmp_path / "w.pth").write_bytes(content)
        with pytest.raises(FileFormatError, match=r"w\.pth' is not a file of torch\.save, or is cut short"):
            open_backbone(f"timm:{NAME}@{tmp_path / 'w.pth'}")
    with pytest.raises(InputError, match="no weights file"):
        open_backbone(f"timm:{NAME}@{tmp_path / 'none.pth'}")
    (tmp_path / "w.safetensors").write_bytes(whole)
    with pytest.raises(FileFormatError, match=r"not a safetensors file.*files of torch\.save end in \.pth"):
        open_backbone(f"timm:{NAME}@{tmp_path / 'w.safetensors'}")
