"""Transformers backbones, with small random models in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convexhead.errors import FileFormatError, HubError, InputError
from convexhead.tokens import extract, open_backbone, open_source
from convexhead.tokens.backbones.hf_preprocessing import choose_pixels
from hf_models import library

pytestmark = pytest.mark.slow  # transformers takes seconds to import
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}


def save(folder: Path, kind: str) -> torch.nn.Module:
    """Save a random model and its image processor; return the model in eval mode."""
    torch.manual_seed(0)
    processor = library().BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 28, "width": 28})
    if kind == "vit":
        model = library().ViTModel(library().ViTConfig(image_size=32, patch_size=8, **SMALL))
        processor = library().ViTImageProcessor(size={"height": 32, "width": 32})
    elif kind == "dinov2":
        config = library().Dinov2WithRegistersConfig(image_size=28, patch_size=14, num_register_tokens=4, **SMALL)
        model = library().Dinov2WithRegistersModel(config)
    else:
        sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
        model = library().ConvNextModel(library().ConvNextConfig(**sizes))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((130, 90))


@pytest.mark.parametrize(
    ("kind", "grid", "n_prefix"), [("vit", (4, 4), 1), ("dinov2", (2, 2), 5), ("convnext", (3, 3), 0)]
)
@pytest.mark.parametrize("layer", [None, 1])
def test_tokens_are_the_models(
    tmp_path: Path, photo: Image.Image, kind: str, grid: tuple[int, int], n_prefix: int, layer: int | None
) -> None:
    model = save(tmp_path / "model", kind)
    (tmp_path / "photos" / "a").mkdir(parents=True)
    photo.save(tmp_path / "photos" / "a" / "photo.png")
    backbone = open_backbone(f"hf:{tmp_path / 'model'}", layer=layer)
    store = extract(tmp_path / "photos", backbone, tmp_path / "out", standardize=False)
    assert store.manifest.n_prefix == n_prefix
    x = backbone.prepare(photo)[None]
    scaled = (x / 255 - torch.tensor(backbone.preprocessing["mean"]).reshape(3, 1, 1)) / torch.tensor(
        backbone.preprocessing["std"]
    ).reshape(3, 1, 1)
    with torch.no_grad():
        output = model(pixel_values=scaled, output_hidden_states=True)
    expected = output.last_hidden_state if layer is None else output.hidden_states[layer + 1]
    if expected.ndim == 4:
        expected = expected.flatten(2).transpose(1, 2)
    got = torch.from_numpy(store.read())
    if n_prefix:
        got = torch.cat([torch.from_numpy(store["train"].prefix(0, 1)).float(), got], dim=1)
    assert got.shape == expected.shape
    assert (got - expected).norm() <= 1e-3 * expected.norm()
    if layer is None or kind != "convnext":
        assert store.grid == grid


def test_inner_layers_in_several_threads(tmp_path: Path, photos: Path) -> None:
    """Hidden states of one batch must not get into another's."""
    save(tmp_path / "model", "dinov2")
    backbone = open_backbone(f"hf:{tmp_path / 'model'}", layer=1)
    store = extract(photos, backbone, tmp_path / "out", batch_size=1, dtype="float32", standardize=False)
    source = open_source(photos)
    with torch.inference_mode():
        for i in range(22):
            expected = backbone(backbone.prepare(source.load("train", i))[None]).tokens[0].numpy()
            np.testing.assert_allclose(store["train"][i], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_preprocessing_is_the_processors(tmp_path: Path, photo: Image.Image, kind: str) -> None:
    save(tmp_path, kind)
    processor = library().AutoImageProcessor.from_pretrained(tmp_path)
    expected = processor(photo, return_tensors="np", do_normalize=False, do_rescale=False)["pixel_values"][0]
    got = open_backbone(f"hf:{tmp_path}").prepare(photo).numpy()
    assert got.shape == expected.shape
    # The processor may resize with another library: a level more or less.
    assert np.abs(got - np.asarray(expected, dtype=float)).max() <= 2
    larger = open_backbone(f"hf:{tmp_path}", image_size=56).prepare(photo)
    assert larger.shape == (3, 56, 56)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layer": 3}, r"layer=3: the layers of .* are 0 \.\. 2"), ({"crop_pct": 0.9}, "omit crop_pct")],
)
def test_errors(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    save(tmp_path, "vit")
    with pytest.raises(InputError, match=message):
        open_backbone(f"hf:{tmp_path}", **options)


def test_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileFormatError, match="as a vision model"):
        open_backbone(f"hf:{tmp_path}")


@pytest.mark.usefixtures("lost_hub")
def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch, no_retries: Callable[..., None]) -> None:
    transformers = pytest.importorskip("transformers")
    for client in (transformers.AutoImageProcessor, transformers.AutoModel):
        monkeypatch.setattr(client, "from_pretrained", no_retries)
    with pytest.raises(HubError, match=r"cannot be reached.*hf:FOLDER"):
        open_backbone("hf:facebook/dinov2-small")


SQUARE = {"height": 32, "width": 32}
# Processors (class, settings), and whether our own bytes are as good.
PROCESSORS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "squares": ("ViTImageProcessor", {"size": SQUARE}, True),
    "crop": ("CLIPImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": SQUARE}, True),
    "crop-pct": ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 0.5}, False),
    "blue-first": ("MobileViTImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": SQUARE}, False),
    "no-normalisation": ("ViTImageProcessor", {"size": SQUARE, "do_normalize": False}, True),
    "no-rescaling": ("ViTImageProcessor", {"size": SQUARE, "do_rescale": False, "do_normalize": False}, False),
    "another-scale": (
        "ViTImageProcessor",
        {"size": SQUARE, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3},
        True,
    ),
    "nearest": ("ViTImageProcessor", {"size": SQUARE, "resample": 0}, None),
    "longest-edge": ("YolosImageProcessor", {"size": {"shortest_edge": 32, "longest_edge": 48}}, False),
    "larger-crop": ("BitImageProcessor", {"size": {"shortest_edge": 24}, "crop_size": SQUARE}, None),
    "padded": ("ViTImageProcessor", {"size": SQUARE, "do_pad": True, "pad_size": {"height": 40, "width": 40}}, False),
    "levit": ("LevitImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": SQUARE}, None),
    "mobilenet": ("MobileNetV2ImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": SQUARE}, None),
    "efficientnet": ("EfficientNetImageProcessor", {"size": SQUARE}, None),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_network_sees_the_processors_pixels(tmp_path: Path, kind: str) -> None:
    name, settings, ours = PROCESSORS[kind]
    processor = getattr(library(), name)(**settings)
    pixels = choose_pixels("hf:here", processor, None, 32)
    if ours is not None:
        assert ("processor" not in pixels.settings) == ours
    assert json.loads(json.dumps(pixels.settings)) == pixels.settings
    rng = np.random.default_rng(0)
    for width, height in ((130, 90), (40, 77), (64, 64), (33, 20), (60, 100)):
        noise = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        image = noise.resize((width, height), Image.Resampling.BICUBIC)
        expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
        prepared = pixels.prepare(image)
        seen = prepared if prepared.is_floating_point() else (prepared.float() - pixels.mean) / pixels.std
        assert seen.shape == expected.shape
        assert (seen - expected).abs().max() <= 0.05


@pytest.mark.parametrize("kind", ["squares", "crop", "crop-pct", "blue-first", "efficientnet"])
def test_image_size_scales_the_processors_pixels(kind: str) -> None:
    name, settings, _ = PROCESSORS[kind]
    pixels = choose_pixels("hf:here", getattr(library(), name)(**settings), 64, 32)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    assert pixels.prepare(image).shape == (3, 64, 64)
    assert pixels.size == (64, 64)


@pytest.mark.parametrize(
    ("name", "settings", "image_size", "message"),
    [
        ("Siglip2ImageProcessor", {}, None, "cut images into patches or tiles"),
        ("LlavaNextImageProcessor", {}, None, "cut images into patches or tiles"),
        ("Idefics3ImageProcessor", {}, None, "cut images into patches or tiles"),
        ("VideoMAEImageProcessor", {}, None, "cut images into patches or tiles"),
        ("YolosImageProcessor", {"size": {"shortest_edge": 32, "longest_edge": 48}}, 64, "omit image_size"),
        (
            "ViTImageProcessor",
            {"size": SQUARE, "do_pad": True, "pad_size": {"height": 40, "width": 40}},
            36,
            "image_size",
        ),
    ],
)
def test_processors_of_other_things_are_refused(
    name: str, settings: dict[str, Any], image_size: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        choose_pixels("hf:here", getattr(library(), name)(**settings), image_size, 32)


def test_stores_of_a_processors_own_pixels(tmp_path: Path, photos: Path) -> None:
    """ConvNeXt's store holds what the model makes of its processor's pixels, and says that they are its."""
    model = save(tmp_path / "model", "convnext")
    processor = library().ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.7)
    processor.save_pretrained(tmp_path / "model")
    store = extract(photos, f"hf:{tmp_path / 'model'}", tmp_path / "out", standardize=False, dtype="float32")
    assert store.manifest.config["preprocessing"]["processor"]["crop_pct"] == 0.7
    x = processor(images=open_source(photos).load("train", 3), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=x).last_hidden_state.flatten(2).transpose(1, 2)[0]
    np.testing.assert_allclose(store["train"][3], expected.numpy(), rtol=1e-3, atol=1e-4)
    again = extract(photos, f"hf:{tmp_path / 'model'}", tmp_path / "out", standardize=False, dtype="float32")
    assert again.manifest == store.manifest
    processor.crop_pct = 0.9
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(FileFormatError, match="preprocessing was"):
        extract(photos, f"hf:{tmp_path / 'model'}", tmp_path / "out", standardize=False, dtype="float32")


def test_a_whole_clip_in_a_folder(tmp_path: Path, photos: Path) -> None:
    sizes = {"image_size": 32, "patch_size": 8, **SMALL}
    text = {**SMALL, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    model = library().CLIPModel(library().CLIPConfig(vision_config=sizes, text_config=text))
    model.save_pretrained(tmp_path / "clip")
    library().CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE).save_pretrained(tmp_path / "clip")
    store = extract(photos, f"hf:{tmp_path / 'clip'}", tmp_path / "out", standardize=False)
    assert (store.grid, store.manifest.n_prefix, store.manifest.shape) == ((4, 4), 1, (16, 32))


# -- images at their own aspect ratio ----------------------------------------------------------------------------------
def shaped(folder: Path) -> Path:
    """A folder of photographs of three shapes."""
    rng = np.random.default_rng(1)
    for i, (width, height) in enumerate([(64, 64), (90, 40), (40, 90)]):
        (folder / "a").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / "a" / f"{i}.png")
    return folder


@pytest.mark.parametrize(("kind", "patch", "longest", "n_prefix"), [("vit", 8, 64, 1), ("dinov2", 14, 56, 5)])
@pytest.mark.parametrize("layer", [None, 1])
def test_images_keep_their_aspect_ratio(
    tmp_path: Path, kind: str, patch: int, longest: int, n_prefix: int, layer: int | None
) -> None:
    model, photos = save(tmp_path / "model", kind), shaped(tmp_path / "photos")
    spec, options = f"hf:{tmp_path / 'model'}", {"image_size": longest, "keep_aspect": True}
    store = extract(photos, spec, tmp_path / "store", layer=layer, dtype="float32", standardize=False, **options)
    view = store["train"]
    backbone = open_backbone(spec, layer=layer, **options)
    mean, std = (torch.tensor(backbone.preprocessing[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    resample = Image.Resampling(backbone.preprocessing["resample"])
    for i, name in enumerate(view.files):
        with Image.open(photos / name) as image:
            h, w = (max(1, round(side * longest / max(image.size) / patch)) for side in image.size[::-1])
            pixels = np.array(image.convert("RGB").resize((w * patch, h * patch), resample))
        assert tuple(view.grids[i]) == (h, w)
        x = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            asked = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
            output = model(pixel_values=x[None], output_hidden_states=True, **asked)
        expected = (output.last_hidden_state if layer is None else output.hidden_states[layer + 1])[0].numpy()
        np.testing.assert_allclose(view[i][: h * w], expected[n_prefix:], atol=1e-4)
        np.testing.assert_allclose(view.prefix(i, i + 1)[0], expected[:n_prefix], atol=1e-4)
        assert not view[i][h * w :].any()
    again = extract(photos, None, tmp_path / "again", like=store.path)
    np.testing.assert_array_equal(again.read(), store.read())


def test_networks_and_processors_that_do_not_keep_it_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "convnext", "convnext")
    save(tmp_path / "vit", "vit")
    model = library().Swinv2Model(library().Swinv2Config(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1],
                                                         num_heads=[1, 2], window_size=4))  # fmt: skip
    model.save_pretrained(tmp_path / "swin")
    library().ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "swin")
    for kind, size, message in (
        ("convnext", 64, r"gives \d+x\d+ tokens .* leave keep_aspect out"),
        ("swin", 64, "leave keep_aspect out|gives no tokens for images"),
        ("vit", 60, "use 56 or 64"),
        ("vit", (64, 32), "one number"),
        ("vit", None, "keep_aspect needs image_size"),
    ):
        with pytest.raises(InputError, match=message):
            open_backbone(f"hf:{tmp_path / kind}", image_size=size, keep_aspect=True)
    processor = json.loads((tmp_path / "vit" / "preprocessor_config.json").read_text())
    odd = {**processor, "size": {"longest_edge": 32}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(odd))
    with pytest.raises(InputError, match="image processor"):
        open_backbone(f"hf:{tmp_path / 'vit'}", image_size=64, keep_aspect=True)
