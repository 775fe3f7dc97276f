"""One network from images to outputs is what the run says of the images."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import convexhead as ch
from convexhead.errors import InputError
from convexhead.predict import predict

pytest.importorskip("PIL")
from PIL import Image

from hf_models import library


def prepared(net, photos):
    return torch.stack([net.prepare(Image.fromarray(photo.transpose(1, 2, 0))) for photo in photos])


@pytest.mark.parametrize("run", ["run", "linear"])
def test_outputs_are_the_runs(work, photos, run):
    clf = ch.load(work / run)
    net = ch.attach(None, work / run)
    assert net.class_names == ["blue", "green, light", "red"]
    found = net(prepared(net, photos)).detach().numpy()
    expected = clf.decision_function(ch.TokenStore.open(work / "tokens")["test"])
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    rows = [row[2:] for row in predict(work / run, work / "photos" / "test")]
    np.testing.assert_allclose(torch.from_numpy(found).softmax(1), rows, atol=1e-4)
    for other in (ch.attach("patches:2", clf), ch.attach(net.backbone, clf.model_)):
        assert torch.equal(other(prepared(net, photos)), net(prepared(net, photos)))


def test_tokens_that_are_averaged_as_they_are_read(work, photos):
    store = ch.TokenStore.open(work / "tokens")
    clf = ch.ConvexHeadClassifier("mlp-mixer", beta_ratio=0.2).fit(store["train"].pooled((2, 2)))
    net = ch.attach(None, clf)
    assert net.tokens.pooled == ((3, 3), (2, 2))
    expected = clf.decision_function(store["test"])
    found = net(prepared(net, photos)).detach()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_gradients_reach_everything(work, photos):
    net = ch.attach(None, work / "run")
    images = prepared(net, photos).float().requires_grad_()
    net(images).square().sum().backward()
    assert images.grad.abs().sum() > 0
    assert net.tokens.head.mixing.grad.abs().sum() > 0


def test_half_precision_and_modes(work, photos):
    net = ch.attach(None, work / "run", dtype=torch.bfloat16)
    assert not net.training
    exact = ch.attach(None, work / "run")
    found, expected = net(prepared(net, photos)).float(), exact(prepared(net, photos))
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_what_cannot_be_attached(work):
    with pytest.raises(InputError, match="fitted on arrays"):
        ch.attach(
            None,
            ch.ConvexHeadClassifier("mlp").fit(np.random.default_rng(0).normal(size=(20, 4, 3)), np.arange(20) % 2),
        )
    with pytest.raises(InputError, match="backbone is 'patches:2'"):
        ch.attach("patches:4", work / "run")
    with pytest.raises(InputError, match="Linear cannot be taken"):
        ch.attach(torch.nn.Linear(3, 3), work / "run")
    net = ch.attach(None, work / "run")
    with pytest.raises(InputError, match="grid"):
        net(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


@pytest.mark.slow
def test_networks_of_timm_and_transformers(work, photos, tmp_path):
    """Given themselves, copied, and with other weights."""
    from convexhead.tokens import extract, open_backbone
    from convexhead.tokens.backbones.timm_import import import_timm

    transformers = library()
    vit = import_timm().create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.Dinov2Config(image_size=28, patch_size=14, **small)
    dino = transformers.Dinov2Model(config).eval()
    dino.save_pretrained(tmp_path / "dino")
    processor = transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path / "dino")
    specs = {f"timm:vit_tiny_patch16_224@{tmp_path / 'vit.pth'}": (vit, 32), f"hf:{tmp_path / 'dino'}": (dino, None)}
    for i, (spec, (network, size)) in enumerate(specs.items()):
        backbone = open_backbone(spec, image_size=size)
        store = extract(work / "photos", backbone, tmp_path / f"tokens{i}", standardize=True)
        clf = ch.ConvexHeadClassifier("mlp", pool="cls", beta_ratio=0.3).fit(store["train"])
        net = ch.attach(network, clf)
        expected = clf.decision_function(store["test"])
        np.testing.assert_allclose(net(prepared(net, photos)).detach(), expected, atol=2e-3 * np.abs(expected).max())
        other = copy.deepcopy(network)
        next(other.parameters()).data += 1
        with pytest.raises(InputError, match="weights are"):
            ch.attach(other, clf)
