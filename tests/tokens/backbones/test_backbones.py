"""Backbones against timm's own models, and their errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from convexhead.errors import FileFormatError, HubError, InputError
from convexhead.tokens import extract, open_backbone
from convexhead.tokens.backbones.timm_import import import_timm

pytestmark = pytest.mark.slow  # timm and torchvision take seconds to import
LITE0 = "packaged:efficientnet-lite0"


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((260, 180))


def reference_input(model: torch.nn.Module, image: Image.Image, size: int) -> torch.Tensor:
    """Preprocess as a user of timm would."""
    timm = import_timm()
    config = timm.data.resolve_data_config({"img_size": size}, model=model)
    return timm.data.create_transform(**config)(image)[None]


def random_weights(folder: Path, architecture: str) -> str:
    """Save a randomly initialised timm model and return its specification."""
    torch.manual_seed(0)
    model = import_timm().create_model(architecture)
    save_file(model.state_dict(), folder / "weights.safetensors")
    return f"timm:{architecture}@{folder / 'weights.safetensors'}"


@pytest.mark.parametrize(
    ("layer", "shape", "grid"),
    [(None, (1, 49, 1280), (7, 7)), (4, (1, 196, 112), (14, 14)), (6, (1, 49, 320), (7, 7))],
)
def test_lite0_shapes(layer: int | None, shape: tuple[int, ...], grid: tuple[int, int]) -> None:
    backbone = open_backbone(LITE0, layer=layer)
    batch = backbone(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    assert batch.tokens.shape == shape
    assert batch.grid == grid
    assert batch.prefix.shape == (1, 0, shape[2])


def test_lite0_is_timms_model(weights: Path, photo: Image.Image) -> None:
    """The packaged weights are timm's under other names, and preprocessing is timm's."""
    file = weights / "tf_efficientnet_lite0_in1k.safetensors"
    model = import_timm().create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(load_file(file))
    x = reference_input(model, photo, 96)
    with torch.no_grad():
        final = model.forward_features(x).flatten(2).transpose(1, 2)
        inner = model.blocks[:5](model.bn1(model.conv_stem(x))).flatten(2).transpose(1, 2)
    from_file = open_backbone(f"timm:tf_efficientnet_lite0@{file}", image_size=96)
    packaged = open_backbone(LITE0, image_size=96)
    assert packaged.weights_hash == from_file.weights_hash
    assert packaged.preprocessing["mean"] == packaged.preprocessing["std"] == [0.5, 0.5, 0.5]
    for backbone in (from_file, packaged):
        got = backbone(backbone.prepare(photo)[None])
        torch.testing.assert_close(got.tokens, final, rtol=1e-4, atol=1e-4)
    block = open_backbone(LITE0, image_size=96, layer=4)
    torch.testing.assert_close(block(block.prepare(photo)[None]).tokens, inner, rtol=1e-4, atol=1e-4)


def test_vit_file_runs_with_its_class_token(weights: Path, photo: Image.Image) -> None:
    file = weights / "dinov2_vits14_imgfocus_fp16.safetensors"
    spec = f"timm:vit_small_patch14_dinov2@{file}"
    timm = import_timm()
    model = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=True, pretrained_cfg_overlay={"file": str(file)}, img_size=112
    ).eval()
    x = reference_input(model, photo, 112)
    with torch.no_grad():
        final = model.forward_features(x)
        ((inner, prefix),) = model.forward_intermediates(
            x, indices=[7], intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
        )
    last = open_backbone(spec, image_size=112)
    got = last(last.prepare(photo)[None])
    assert got.grid == (8, 8)
    assert got.prefix.shape == (1, 1, 384)
    torch.testing.assert_close(torch.cat([got.prefix, got.tokens], 1), final, rtol=1e-4, atol=1e-4)
    block = open_backbone(spec, image_size=112, layer=7)
    got = block(block.prepare(photo)[None])
    torch.testing.assert_close(got.tokens, inner, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.prefix, prefix, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"layer=12.* are 0 \.\. 11"):
        open_backbone(spec, image_size=112, layer=12)


# Every family with random weights, at small image sizes where the architecture allows: the final tokens, and
# those of an inner layer with the name under which hooks find the block that gives them.
FAMILIES = [
    # architecture, image size, final (s, d, prefix), inner layer, its (s, d), the block
    ("resnet18", 64, (4, 512, 0), 2, (64, 128), "layer2"),
    ("convnext_atto", 64, (4, 320, 0), 1, (64, 80), "stages.1"),
    ("swin_tiny_patch4_window7_224", 224, (49, 768, 0), 2, (196, 384), "layers.2"),
    ("gmlp_s16_224", 64, (16, 256, 0), 20, (16, 256), "blocks.20"),
    ("mixer_s16_224", 64, (16, 512, 0), 5, (16, 512), "blocks.5"),
    ("deit_tiny_distilled_patch16_224", 64, (16, 192, 2), 7, (16, 192), "blocks.7"),
    ("vit_small_patch14_reg4_dinov2", 56, (16, 384, 5), 3, (16, 384), "blocks.3"),
    ("tf_efficientnet_lite0", 64, (4, 1280, 0), 4, (16, 112), "blocks.4"),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0])
def test_families(tmp_path: Path, photo: Image.Image, family: tuple[Any, ...]) -> None:
    """Stored half-precision tokens are within 1e-3 of timm's own forward pass in eval mode."""
    architecture, size, (s, d, n_prefix), layer, inner_shape, block = family
    timm = import_timm()
    torch.manual_seed(0)
    sized = {"img_size": size} if timm.get_pretrained_cfg(architecture).fixed_input_size else {}
    model = timm.create_model(architecture, **sized).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    spec = f"timm:{architecture}@{tmp_path / 'weights.safetensors'}"
    seen = {}
    model.get_submodule(block).register_forward_hook(lambda _m, _i, output: seen.update(inner=output))
    with torch.no_grad():
        seen["final"] = model.forward_features(reference_input(model, photo, size))

    folder = tmp_path / "photos" / "class"
    folder.mkdir(parents=True)
    photo.save(folder / "photo.png")
    for name, shape, options in (("final", (s, d), {}), ("inner", inner_shape, {"layer": layer})):
        store = extract(folder.parent, spec, tmp_path / name, image_size=size, standardize=False, **options)
        assert store.shape == (1, *shape)
        assert store.grid[0] == store.grid[1]
        expected = seen[name]
        if expected.ndim == 4:
            channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
            expected = expected.flatten(1, 2) if channels_last else expected.flatten(2).transpose(1, 2)
        got = torch.from_numpy(store.read())
        if n_prefix:
            got = torch.cat([torch.from_numpy(store["train"].prefix(0, 1)).float(), got], dim=1)
        assert got.shape == expected.shape
        assert (got - expected).norm() <= 1e-3 * expected.norm()
    with pytest.raises(InputError, match=r"layer=99: the layers of .* are 0 \.\. "):
        open_backbone(spec, image_size=size, layer=99)


def test_frozen() -> None:
    backbone = open_backbone(LITE0, image_size=64)
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_crop_pct_keeps_the_margin() -> None:
    image = Image.new("RGB", (100, 100))
    image.paste((255, 255, 255), (0, 0, 3, 100))
    assert open_backbone(LITE0, image_size=64).prepare(image)[:, :, 0].max() == 0
    assert open_backbone(LITE0, image_size=64, crop_pct=1).prepare(image)[:, :, 0].min() > 200


def test_patches(photo: Image.Image) -> None:
    backbone = open_backbone("patches:4", image_size=12)
    image = backbone.prepare(photo)
    batch = backbone(image[None])
    assert batch.tokens.shape == (1, 9, 48)
    assert batch.grid == (3, 3)
    pixels = image.permute(1, 2, 0)[4:8, 8:12].reshape(-1) / 255  # row 1, column 2 of the grid
    torch.testing.assert_close(batch.tokens[0, 5], pixels)
    with pytest.raises(InputError, match="multiple of 4"):
        backbone(torch.zeros(1, 3, 12, 10, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("tim:resnet18", {}, "did you mean 'timm'"),
        ("resnet18", {}, "unknown backbone"),
        ("packaged:efficientnet-lite1", {}, "did you mean 'efficientnet-lite0'"),
        ("timm:resnet1888", {}, "did you mean 'resnet18"),
        ("timm:resnet18.nothing", {}, "nothing"),
        ("timm:resnet18@/nowhere.safetensors", {}, "no weights file"),
        ("patches:x", {}, "patch size"),
        ("patches:0", {}, "patch size"),
        ("patches:4", {"layer": 1}, "no inner layers"),
        (LITE0, {"layer": 7}, r"layer=7.* are 0 \.\. 6"),
        (LITE0, {"layer": -1}, "layer=-1"),
        (LITE0, {"image_size": 0}, "image_size=0"),
        (LITE0, {"crop_pct": 1.5}, "crop_pct=1.5"),
    ],
)
def test_errors(spec: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_backbone(spec, **options)  # type: ignore[arg-type]


def test_weight_files_that_do_not_fit(tmp_path: Path) -> None:
    spec = random_weights(tmp_path, "resnet18")
    file = tmp_path / "weights.safetensors"
    with pytest.raises(FileFormatError, match="do not fit"):
        open_backbone(f"timm:resnet34@{file}")
    state = load_file(file)
    del state["layer4.1.bn2.bias"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(FileFormatError, match=r"layer4\.1\.bn2\.bias"):
        open_backbone(f"timm:resnet18@{tmp_path / 'less.safetensors'}")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        open_backbone(spec)
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        open_backbone(f"timm:resnet18@{__file__}")


def test_classifier_of_another_size_is_accepted(tmp_path: Path) -> None:
    model = import_timm().create_model("resnet18", num_classes=7)
    save_file(model.state_dict(), tmp_path / "seven.safetensors")
    backbone = open_backbone(f"timm:resnet18@{tmp_path / 'seven.safetensors'}", image_size=64)
    assert backbone(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).tokens.shape == (2, 4, 512)


@pytest.mark.usefixtures("lost_hub")
def test_an_unreachable_hub_is_asked_once() -> None:
    with pytest.raises(HubError, match=r"cannot be reached.*@FILE\.safetensors"):
        open_backbone("timm:resnet18")


def test_timm_imports_whatever_torchvision_is_there() -> None:
    """In a fresh process: a matching torchvision gets no declaration, another one gets one."""
    code = """
import torch
from convexhead.tokens.backbones.timm_import import _declared, import_timm
import_timm(); import_timm()
from torchvision.extension import _has_ops
assert len(_declared) == (0 if _has_ops() else 1), _declared
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
