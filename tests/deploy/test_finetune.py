"""Training a head and its backbone on, from the certified head and from a random one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from sklearn.model_selection import train_test_split
from torch import nn

import convexhead as ch
from command import call
from convexhead.deploy import training
from convexhead.deploy.training import Recipe, finetune, last_blocks
from convexhead.errors import InputError
from convexhead.tokens import extract, open_backbone

pytest.importorskip("PIL")


class Small(nn.Module):
    """Patches, three blocks, and a last scale; the third block comes too late for a head on ``x``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 1) for _ in range(3)])
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks[:2]:
            x = x + torch.relu(block(x))
        return x * self.scale


@pytest.fixture(scope="module")
def trained(work):
    """An open backbone and a head on it."""
    import numpy as np

    def transform(image):
        return torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1) / 255

    backbone = open_backbone(Small(), transform=transform, name="small")
    store = extract(work / "photos", backbone, work / "small", standardize=True)
    return backbone, ch.ConvexHeadClassifier("mlp", beta_ratio=0.1, random_state=0).fit(store["train"])


def test_last_blocks_are_those_that_have_an_effect(trained):
    backbone, clf = trained
    net = ch.attach(backbone, clf)
    images = torch.rand(2, 3, 16, 16)
    names = {id(parameter): name for name, parameter in backbone.model.named_parameters()}

    def found(count):
        return [[names[id(parameter)] for parameter in block] for block in last_blocks(net, images, count)]

    assert [block[0] for block in found(1)] == ["blocks.1.weight"]
    assert [block[0] for block in found(2)] == ["blocks.1.weight", "blocks.0.weight"]
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad and "backbone" in name}
    assert trained == {f"backbone.model.blocks.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")}


def test_training_goes_on_from_the_certified_head(trained, work, tmp_path):
    backbone, clf = trained
    recipe = Recipe(epochs=1, batch_size=8, rates=(1e-3,), head_rates=(1.0,))
    found = finetune(clf, work / "photos", tmp_path / "w", recipe=recipe, seeds=2, backbone=backbone)
    assert [(trial.start, trial.seed) for trial in found.trials] == [
        ("certified", 0), ("certified", 1), ("random", 0), ("random", 1),
    ]  # fmt: skip
    score = clf.score(ch.TokenStore.open(work / "small")["test"])
    assert {trial.before for trial in found.trials if trial.start == "certified"} == {score}
    assert len({trial.before for trial in found.trials}) > 1
    assert found.images == {"train": 60, "test": 21}
    again, fresh = ch.attach(backbone, clf), load_file(tmp_path / "w")  # the backbone is as it was
    before = {name: value.clone() for name, value in again.state_dict().items()}
    changed = {name for name, value in fresh.items() if not torch.equal(value, before[name])}
    assert {"tokens.head.mixing", "tokens.head.values", "backbone.model.blocks.1.weight"} <= changed
    assert not any("stem" in name or "reduction" in name for name in changed)
    assert fresh.keys() == found.weights.keys() == before.keys()
    repeated = finetune(clf, work / "photos", recipe=recipe, seeds=1, backbone=backbone)
    assert repeated.trials[0].after == found.trials[0].after


def test_the_learning_rate_is_chosen_on_training_images(trained, work, monkeypatch):
    backbone, clf = trained
    recipe = Recipe(epochs=6, batch_size=8, rates=(1e-9, 3e-2), head_rates=(1.0,))
    found = finetune(clf, work / "photos", recipe=recipe, seeds=1, backbone=backbone)
    assert {trial.rate for trial in found.trials if trial.start == "random"} == {3e-2}


def test_rates_are_chosen_with_a_head_that_has_not_seen_what_they_are_scored_on(trained, work, monkeypatch):
    import numpy as np

    backbone, clf = trained
    view = ch.TokenStore.open(work / "small")["train"]
    rows, _ = train_test_split(np.arange(60), test_size=0.2, stratify=view.labels, random_state=0)
    by_hand = ch.ConvexHeadClassifier("mlp", beta=clf.beta_, tol=1e-2, random_state=0)
    by_hand.fit(view.read()[rows], np.asarray(view.labels)[rows])
    found, fitted_on = [], training._fitted_on

    def kept(*arguments):
        found.append(fitted_on(*arguments))
        return found[-1]

    monkeypatch.setattr(training, "_fitted_on", kept)
    recipe = Recipe(epochs=1, batch_size=8, rates=(1e-3, 1e-4), head_rates=(1.0,))
    finetune(clf, work / "photos", recipe=recipe, seeds=1, backbone=backbone)
    (model,) = found
    assert model.certificate.primal == pytest.approx(by_hand.certificate_.primal, rel=1e-2)
    assert model.certificate.primal != pytest.approx(clf.certificate_.primal, rel=1e-2)


def test_command_refuses_in_words(work, capsys):
    capsys.readouterr()
    assert call("finetune", work / "run", work / "photos") == 1
    assert "no blocks to train on" in capsys.readouterr().err
    assert call("finetune", work / "run", work / "photos" / "train") == 1
    assert "no split test or val" in capsys.readouterr().err
    assert call("finetune", work / "run", work / "photos", "--epochs", 0) == 1
    assert "--epochs" in capsys.readouterr().err


def test_command_tells_a_machine(trained, work, capsys, monkeypatch):
    backbone, clf = trained
    clf.save(work / "small-run")
    monkeypatch.setattr("convexhead.tokens.like.open_backbone", lambda *a, **k: backbone)
    capsys.readouterr()
    options = ("--epochs", 1, "--seeds", 1, "--rates", "1e-3", "--head-rates", "1", "--json")
    assert call("finetune", work / "small-run", work / "photos", *options) == 0
    told = json.loads(capsys.readouterr().out)
    assert [trial["start"] for trial in told["trials"]] == ["certified", "random"]


def test_other_heads_are_refused(work):
    import numpy as np

    X = np.random.default_rng(0).normal(size=(20, 4, 3))
    with pytest.raises(InputError, match="one label an image"):
        finetune(ch.ConvexHeadRegressor("mlp").fit(X, X[:, 0]), work / "photos")
    with pytest.raises(InputError, match="learning rates"):
        Recipe(rates=())
