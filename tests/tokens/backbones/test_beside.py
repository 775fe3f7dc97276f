"""Several layers side by side, and the class token beside them: the parts' own numbers, from images to predictions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import convexhead as ch
from command import call
from convexhead.errors import InputError
from convexhead.tokens import TokenStore, extract, open_backbone
from convexhead.tokens.backbones.timm_import import import_timm
from convexhead.tokens.fit_reduction import fit_reduction

pytestmark = pytest.mark.slow  # timm and torchvision take seconds to import


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("vit") / "weights.safetensors"
    save_file(import_timm().create_model("test_vit").state_dict(), file)
    return f"timm:test_vit@{file}"


@pytest.fixture(scope="module")
def photos(tmp_path_factory, write_images) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder / "train", {"a": 6, "b": 6}, (40, 40))
    return write_images(folder / "test", {"a": 3, "b": 3}, (40, 40), seed=1).parent


def images(size: int) -> torch.Tensor:
    return torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_layers_of_a_transformer_with_its_class_token(vit: str) -> None:
    each = [open_backbone(vit, layer=layer, image_size=64)(images(64)) for layer in (1, None)]
    several = open_backbone(vit, layer=[1, None], image_size=64)
    batch = several(images(64))
    assert several.layer == [1, None]
    assert several.channels == {"groups": [64, 64], "class": False}
    torch.testing.assert_close(batch.tokens, torch.cat([part.tokens for part in each], 2))
    torch.testing.assert_close(batch.prefix, torch.cat([part.prefix for part in each], 2))
    with_class = open_backbone(vit, layer=(1, None), class_channels=True, image_size=64)(images(64))
    assert with_class.tokens.shape == (2, 16, 192)
    torch.testing.assert_close(with_class.tokens[..., :128], batch.tokens)
    torch.testing.assert_close(with_class.tokens[:, 5, 128:], each[1].prefix[:, 0])
    assert with_class.prefix.shape == (2, 0, 192)


def test_maps_of_a_convolutional_network_meet_on_the_coarsest_grid() -> None:
    fine, coarse = (open_backbone("packaged:efficientnet-lite0", layer=layer, image_size=64) for layer in (2, 6))
    both = open_backbone("packaged:efficientnet-lite0", layer=[2, 6], image_size=64)(images(64))
    a, b = fine(images(64)), coarse(images(64))
    assert (a.grid, b.grid) == ((8, 8), (2, 2))
    means = a.tokens.reshape(2, 2, 4, 2, 4, -1).mean((2, 4)).reshape(2, 4, -1)
    torch.testing.assert_close(both.tokens, torch.cat([means, b.tokens], 2))
    assert both.grid == (2, 2)


def test_what_cannot_stand_side_by_side(vit: str) -> None:
    with pytest.raises(InputError, match="names 1 twice"):
        open_backbone(vit, layer=[1, 1], image_size=64)
    with pytest.raises(InputError, match="no class token"):
        open_backbone("patches:8", class_channels=True)
    with pytest.raises(InputError, match=r"layer=9"):
        open_backbone(vit, layer=[1, 9], image_size=64)


def test_groups_weigh_alike() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 4, 7)) * [1, 1, 1, 1, 1, 1, 9] + 2
    for standardize in (True, False):
        settings = {"standardize": standardize, "components": None, "constant": False}
        fitted = fit_reduction(iter([x]), **settings, groups=[5, 2])
        plain, y = fit_reduction(iter([x]), **settings).apply(x), fitted.apply(x)
        squares = np.square(y.astype(np.float64)).mean((0, 1))
        np.testing.assert_allclose([squares[:5].sum(), squares[5:].sum()], [3.5, 3.5], rtol=1e-5)
        factors = y / plain
        np.testing.assert_allclose(factors, factors[0, 0] * np.ones_like(y), rtol=1e-4)
        assert len(np.unique(factors[0, 0].round(5))) == 2
    with pytest.raises(InputError, match=r"groups of 5 \+ 3 channels"):
        fit_reduction(iter([x]), **settings, groups=[5, 3])


def test_from_images_to_predictions(vit: str, photos: Path, tmp_path: Path, capsys) -> None:
    options = ("--backbone", vit, "--layer", 1, "last", "--class-channels", "--image-size", 64)
    assert call("extract", photos, *options, "--dtype", "float32", "--out", tmp_path / "tokens") == 0
    store = TokenStore.open(tmp_path / "tokens")
    assert (store.info()["layer"], store.info()["class_channels"]) == ([1, None], True)
    assert store.reduction.options["groups"] == [64, 64, 64]
    train = store["train"].read()
    np.testing.assert_allclose(np.square(train).mean((0, 1)).reshape(3, 64).sum(1), [64, 64, 64], rtol=1e-3)
    assert call("fit", tmp_path / "tokens", "--head", "mlp", "--beta-ratio", 0.2, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert call("predict", tmp_path / "run", photos / "test", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    expected = ch.load(tmp_path / "run").predict_proba(store["test"])
    np.testing.assert_allclose([row[2:] for row in rows], expected, atol=1e-5)
    like = extract(photos, None, tmp_path / "like", like=tmp_path / "run")
    np.testing.assert_array_equal(like["train"].read(), train)
    other = ("--layer", 2, "last", "--like", tmp_path / "run", "--out", tmp_path / "other")
    assert call("extract", photos, *other) == 1
    assert "layer is [1, None]" in capsys.readouterr().err
    average = ("--backbone", vit, "--layer", 1, "last", "--image-size", 64, "--channels", 9)
    assert call("extract", photos, *average, "--out", tmp_path / "other") == 1
    assert "use reduce='pca'" in " ".join(capsys.readouterr().err.split())
