"""``pool="cls"`` of a store reads the backbone's class token, in every command; the expected tokens are put by hand."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import convexhead as ch
from convexhead.tokens import extract
from convexhead.tokens.backbones.base import Backbone, TokenBatch

pytest.importorskip("PIL")
from PIL import Image

from command import call


class ColourInFront(Backbone):
    """2 x 2 patches that say nothing of the class, a class token that does, a register of ones."""

    spec, layer, weights_hash, preprocessing = "colour-in-front", None, "", {}

    def prepare(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def forward(self, images):
        x = images.float() / 255
        patches = (37 * x[:, :, :2, :2]).frac().flatten(2).transpose(1, 2)
        prefix = torch.stack([x.mean((2, 3)), torch.ones(len(x), 3)], 1)
        return TokenBatch(patches, prefix, (2, 2))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 12)):
        for c, name in enumerate(("red", "green", "blue")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 200, (4, 4, 3))
                pixels[:, :, c] += 30
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "photos" / split / name / f"{i}.png")
    extract(folder / "photos", ColourInFront(), folder / "tokens", dtype="float32")
    extract(folder / "photos", "patches:2", folder / "plain")
    return folder


def in_front(store, split):
    """The tokens with the class token in front, reduced: what the head must read."""
    view = store[split]
    raw = np.concatenate([view.prefix(0, len(view))[:, :1], view.raw(0, len(view))], axis=1)
    return store.reduction.apply(raw)


@pytest.mark.parametrize("head", ["linear", "self-attention", "mlp-mixer"])
def test_a_store_gives_the_class_token(work, head):
    store = ch.TokenStore.open(work / "tokens")
    train, settings = store["train"], {"head": head, "pool": "cls", "beta_ratio": 0.1, "random_state": 0}
    clf = ch.ConvexHeadClassifier(**settings).fit(store)
    other = ch.ConvexHeadClassifier(**settings).fit(in_front(store, "train"), train.labels)
    assert clf.n_tokens_ == 5
    assert clf.certificate_.primal == pytest.approx(other.certificate_.primal, rel=2e-3)
    test = store["test"]
    expected = other.decision_function(in_front(store, "test"))
    np.testing.assert_allclose(clf.decision_function(test), expected, atol=0.05 * np.abs(expected).max())
    np.testing.assert_array_equal(clf.predict(test.with_class_token()), clf.predict(test))
    assert clf.score(test) > 0.6
    assert ch.beta_max(store, head=head, pool="cls") == pytest.approx(other.beta_max_, rel=1e-5)
    factors = (None, clf.coef_) if head == "linear" else (clf.mixing_, clf.values_)
    for weights in (clf, clf.to_module(torch.float64), factors):
        told = ch.certify(weights, train, train.labels, beta=clf.beta_, head=head, pool="cls")
        assert told.primal == pytest.approx(clf.certificate_.primal, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "path", "refit", "cv", "adam"])
def test_commands_agree(work, tmp_path, capsys, command):
    options = ["--head", "self-attention", "--pool", "cls", "--out", tmp_path / "run"]
    grid = ["--beta-ratios", "0.3,0.1"]
    options += {"path": grid, "refit": ["--refit", *grid], "cv": ["--cv", 2], "adam": ["--epochs", 2]}.get(command, [])
    assert call({"refit": "path", "cv": "fit"}.get(command, command), work / "tokens", *options) == 0
    run = ch.load(tmp_path / "run")
    assert run.origin_.class_token
    assert run.n_tokens_ == 5
    capsys.readouterr()
    assert call("evaluate", tmp_path / "run", work / "tokens", "--json") == 0
    store = ch.TokenStore.open(work / "tokens")
    expected = np.mean(run.predict(in_front(store, "test")) == store["test"].labels)
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(expected)
    assert call("predict", tmp_path / "run", work / "tokens", "--out", tmp_path / "told.csv") == 0
    told = [line.split(",") for line in (tmp_path / "told.csv").read_text().splitlines()[1:]]
    rows = [line[2] for line in told if line[0] == "test"]
    assert rows == [store.class_names[i] for i in run.predict(in_front(store, "test"))]
    capsys.readouterr()
    assert call("audit", tmp_path / "run", work / "tokens", "--json") == 0
    primal = json.loads(capsys.readouterr().out)["certificate"]["primal"]
    assert primal == pytest.approx(run.certificate_.primal, rel=1e-6)


@pytest.mark.slow
def test_a_page_shows_the_patches_where_they_lie(work, tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from convexhead.report.gallery import gallery
    from convexhead.report.runs import read_run

    for head in ("self-attention", "mlp-mixer"):
        out = tmp_path / head
        fit = ("fit", work / "tokens", "--head", head, "--pool", "cls", "--beta-ratio", 0.1, "--out", out)
        assert call(*fit) == 0
        run, model, evidence = read_run(out)
        shown = gallery(model, evidence, size=4, budget=10**6)
        assert run["grid"] == shown["grid"] == [2, 2]
        assert evidence.arrays["tokens"].shape[1] == 5
        maps, sums = (np.frombuffer(base64.b64decode(shown[k]), t) for k, t in (("maps", "i1"), ("sums", "<f4")))
        assert maps.size == 4 * sums.size
    assert call("report", tmp_path / "mlp-mixer", "--out", tmp_path / "page.html") == 0


def test_stores_without_one_and_heads_of_grids_are_refused(work, tmp_path, capsys):
    for store, head, told in (
        ("plain", "linear", "pool='cls' reads the class token.*has none: use pool='mean'.*--pool"),
        ("tokens", "fno", "lies on no grid, which 'fno' reads"),
        ("tokens", "block-fno", "lies on no grid"),
    ):
        capsys.readouterr()
        assert call("fit", work / store, "--head", head, "--pool", "cls", "--out", tmp_path / "run") == 1
        told_of = capsys.readouterr().err
        assert re.search(told, told_of), told_of
        with pytest.raises(ch.InputError):
            ch.certify((None, np.ones((3, 3))), ch.TokenStore.open(work / "plain"), beta=1.0, head="linear", pool="cls")


def test_heads_of_the_first_patch_are_read_as_they_were_trained(work, tmp_path):
    """Until now ``pool="cls"`` of a store took the first patch: such heads say so by their origin."""
    store = ch.TokenStore.open(work / "tokens")
    clf = ch.ConvexHeadClassifier("linear", pool="cls", beta_ratio=0.1).fit(
        np.asarray(store["train"]), store["train"].labels
    )
    clf.model_ = replace(clf.model_, origin=store["train"].origin(), reduction=store.reduction)
    clf.save(tmp_path / "old")
    old = ch.load(tmp_path / "old")
    np.testing.assert_allclose(old.decision_function(store["test"]), store["test"].read()[:, 0] @ old.coef_, atol=1e-6)
    with pytest.raises(ch.InputError, match="the class token is read, the head had it left out"):
        old.predict(store["test"].with_class_token())


def test_registers_alone_are_no_class_token(work, tmp_path):
    registers = ColourInFront()
    registers.preprocessing = {"class token": False}
    extract(work / "photos", registers, tmp_path / "registers")
    store = ch.TokenStore.open(tmp_path / "registers")
    assert store["train"].n_prefix == 2
    with pytest.raises(ch.InputError, match="none is a class token"):
        ch.ConvexHeadClassifier("mlp", pool="cls").fit(store)
    with pytest.raises(ch.InputError, match="none is a class token"):
        store["train"].class_tokens(slice(0, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "registers"),
    [
        ("vit_medium_patch16_reg4_gap_256", True),
        ("vit_tiny_patch16_224", False),
        ("vit_small_patch14_reg4_dinov2", False),
    ],
)
def test_timm_says_which_models_have_registers_alone(name, registers):
    from convexhead.tokens.backbones.timm_backbone import has_registers_alone
    from convexhead.tokens.backbones.timm_import import import_timm

    assert has_registers_alone(import_timm().create_model(name, pretrained=False)) is registers
