"""Where tokens lie is measured: toy networks of every order, and every family of the two libraries.

The large tables are run by ``pytest -m table tests/tokens/backbones/test_layout.py``.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_models
from convexhead.errors import InputError
from convexhead.tokens.backbones.layout import Layout, NetworkBackbone, find_layout
from convexhead.tokens.backbones.open import open_backbone
from convexhead.tokens.backbones.timm_import import import_timm

H, W, K = 6, 8, 4


class Toy(nn.Module):
    """Patches, tokens of its own at any places, some mixing, and an order: what a backbone may be."""

    def __init__(
        self,
        order: Callable[[Tensor], Tensor] = lambda grid: grid.flatten(),
        own: dict[int, int] | None = None,
        ending: Callable[[Tensor], Any] = lambda x: x,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Conv2d(3, 16, K, stride=K), nn.LayerNorm(16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
        self.order = order(torch.arange(H * W).reshape(H, W))
        self.own, self.ending = own or {}, ending

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for place, n in self.own.items():
            new = torch.randn(n, 16, generator=torch.Generator().manual_seed(n)).expand(len(x), n, 16)
            x = torch.cat([x[:, :place], new, x[:, place:]], dim=1)
        x = self.block(self.norm(x))
        return self.ending(x if self.own else x[:, self.order])


def measure(model: nn.Module, size: tuple[int, int] = (H * K, W * K)) -> Layout:
    return find_layout(model, model, torch.zeros(3, *size))


def interleaved(grid: Tensor) -> Tensor:
    """The order of Hiera's inner blocks: the halves of the grid before what is in them."""
    return grid.reshape(2, H // 2, 2, W // 2).permute(1, 3, 0, 2).flatten()


def test_rows_are_recognised() -> None:
    assert measure(Toy()) == Layout((H, W))
    assert measure(Toy(), (H * K + 3, W * K + 1)) == Layout((H, W))  # an edge that no patch covers
    maps = Toy(ending=lambda x: x.transpose(1, 2).unflatten(2, (H, W)))
    assert measure(maps) == Layout((H, W), channels_first=True)
    assert measure(Toy(ending=lambda x: x.unflatten(1, (H, W)))) == Layout((H, W))


@pytest.mark.parametrize(
    "order",
    [
        lambda grid: grid.T.flatten(),
        lambda grid: grid.flip(0).flatten(),
        lambda grid: grid.flip(1).flatten(),
        lambda grid: grid.roll(1, 1).flatten(),
        lambda grid: grid.reshape(2, H // 2, 2, W // 2).transpose(1, 2).flatten(),
        interleaved,
        lambda grid: grid.flatten()[torch.randperm(H * W, generator=torch.Generator().manual_seed(0))],
    ],
    ids=["columns", "upside-down", "mirrored", "rolled", "windows", "interleaved", "random"],
)
def test_other_orders_are_refused(order: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(InputError, match="row by row"):
        measure(Toy(order))
    with pytest.raises(InputError, match="row by row"):
        measure(Toy(order, ending=lambda x: x.unflatten(1, (H, W))))


@pytest.mark.parametrize("shift", [1, -1, 3])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_shift_on_a_wide_grid_is_refused(shift: int, axis: int) -> None:
    """There a correlation alone hardly changes: 0.84 is left of 1 on 37 tokens."""

    def run(x: Tensor) -> Tensor:
        return model(x).flatten(2).transpose(1, 2)

    def rolled(x: Tensor) -> Tensor:
        return model(x).roll(shift, axis + 2).flatten(2).transpose(1, 2)

    torch.manual_seed(0)
    model = nn.Conv2d(3, 8, 3 * K, stride=K, padding=K)
    assert find_layout(run, model, torch.zeros(3, 37 * K, 40 * K)) == Layout((37, 40))
    with pytest.raises(InputError, match="row by row"):
        find_layout(rolled, model, torch.zeros(3, 37 * K, 40 * K))


@pytest.mark.slow
@pytest.mark.parametrize("size", [28, 42])
def test_few_tokens_of_a_trained_network(size: int, weights: Path) -> None:
    """A trained network mixes a few tokens so much that one draw of noise does not show their order."""
    spec = f"timm:vit_small_patch14_dinov2@{weights / 'dinov2_vits14_imgfocus_fp16.safetensors'}"
    backbone = open_backbone(spec, image_size=size)
    assert isinstance(backbone, NetworkBackbone)
    for draw in range(3):
        image = torch.randn(3, size, size, generator=torch.Generator().manual_seed(draw))
        assert backbone.layout(image[None]) == Layout((size // 14, size // 14), front=1)

    def turned(x: Tensor) -> Tensor:
        features = backbone.features(x)
        tokens = features[:, 1:].unflatten(1, (size // 14, size // 14))
        return torch.cat([features[:, :1], tokens.transpose(1, 2).flatten(1, 2)], dim=1)

    with pytest.raises(InputError, match="row by row"):
        find_layout(turned, backbone.model, torch.zeros(3, size, size))


@pytest.mark.parametrize(("front", "back"), [(1, 0), (5, 0), (0, 3), (1, 7)])
def test_tokens_that_are_no_patches(front: int, back: int) -> None:
    model = Toy(own={0: front, H * W + front: back})
    layout = measure(model)
    assert layout == Layout((H, W), False, front, back)
    features = model(torch.randn(2, 3, H * K, W * K))
    batch = layout.batch(features)
    assert torch.equal(batch.tokens, features[:, front : front + H * W])
    own = [*range(front), *range(front + H * W, features.shape[1])]
    assert torch.equal(batch.prefix, features[:, own])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Toy(own={5: 1}), "among those of the patches"),
        (Toy(ending=lambda x: x[:, 1:]), "on no grid"),
        (Toy(ending=lambda x: x.mean(1)), "not a map or a sequence"),
        (Toy(ending=lambda x: [x]), "features list, not a map"),
        (Toy(ending=lambda x: {"tokens": x}), "features dict, not a map"),
        (Toy(ending=lambda x: x + torch.randn_like(x)), "other tokens at each call"),
        (Toy(ending=lambda x: x - x.mean(0)), "beside other images"),
        (Toy(ending=lambda x: x * torch.nan), "other tokens at each call"),
        (Toy(ending=lambda x: 0 * x + 1), "row by row"),
    ],
)
def test_what_cannot_be_known_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(model)


def test_other_threads_may_run_the_network() -> None:
    """Sequences of another thread's images are not mistaken for the measured ones."""
    model, stop = Toy(own={0: 1}), threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            model(torch.randn(9, 3, H * K, W * K))

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        assert all(measure(model).front == 1 for _ in range(5))
    finally:
        stop.set()
        thread.join()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


HF = [
    pytest.param(name, marks=pytest.mark.slow if name in hf_models.QUICK else pytest.mark.table)
    for name in hf_models.FAMILIES
]


@pytest.mark.parametrize("name", HF)
def test_transformers(name: str) -> None:
    from convexhead.tokens.backbones.hf_backbone import TransformersBackbone
    from convexhead.tokens.backbones.hf_preprocessing import Pixels

    family = hf_models.FAMILIES[name]
    model, one = hf_models.build(family), torch.ones(3, 1, 1)
    pixels = Pixels(lambda image: torch.empty(0), one, one, {}, family.image)
    if family.grid is None:
        with pytest.raises(InputError, match=rf"'hf:{name}'.*: choose another|'hf:{name}' (has no|is no).*choose a"):
            TransformersBackbone(f"hf:{name}", model, None, pixels)
        return
    backbone = TransformersBackbone(f"hf:{name}", model, None, pixels)
    x = torch.randn(2, 3, *family.image, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, again = backbone(x), backbone(x[1:])
    assert got.grid == family.grid
    s = family.grid[0] * family.grid[1]
    assert got.tokens.shape[:2] == (2, s)
    assert got.prefix.shape == (2, family.front + family.back, got.tokens.shape[2])
    torch.testing.assert_close(again.tokens, got.tokens[1:], rtol=1e-3, atol=1e-4)
    corners(backbone, x, family.grid)
    interpolates = "interpolate_pos_encoding" in inspect.signature(backbone.model.forward).parameters
    plain = backbone.model(pixel_values=x, **({"interpolate_pos_encoding": True} if interpolates else {}))
    expected = plain.last_hidden_state if hasattr(plain, "last_hidden_state") else plain.feature_maps[-1]
    if expected.ndim == 3:
        whole = torch.cat([got.prefix[:, : family.front], got.tokens, got.prefix[:, family.front :]], dim=1)
        if name != "mae":  # it sorts its tokens by new noise at each call
            torch.testing.assert_close(whole, expected)
    else:
        maps = expected if expected.shape[2:] == family.grid else expected.permute(0, 3, 1, 2)
        torch.testing.assert_close(got.tokens, maps.flatten(2).transpose(1, 2))
    try:
        inner = TransformersBackbone(f"hf:{name}", model, 0, pixels)
    except InputError as error:
        assert "choose another" in str(error)  # noqa: PT017
    else:
        with torch.no_grad():
            corners(inner, x, inner(x).grid)


def corners(backbone: nn.Module, x: Tensor, grid: tuple[int, int]) -> None:
    """The token that a changed corner of the image changes most is that corner's, or next to it."""
    h, w = grid
    with torch.no_grad():
        before = backbone(x[:1]).tokens[0]
        if h * w < 16 or (before - backbone(x[1:]).tokens[0]).norm() < 1e-3 * before.norm():
            return
        for i, j in ((0, 0), (0, w - 1), (h - 1, 0), (h - 1, w - 1)):
            changed = x[:1].clone()
            rows, columns = (
                slice(n * k // m, (n + 1) * k // m) for n, k, m in zip((i, j), x.shape[2:], grid, strict=True)
            )
            changed[:, :, rows, columns] = x[1:, :, rows, columns]
            most = int((backbone(changed).tokens[0] - before).norm(dim=1).argmax())
            assert abs(most // w - i) <= 1 + h // 8, (most, i, j)
            assert abs(most % w - j) <= 1 + w // 8, (most, i, j)


# Families whose features are no map or sequence of an RGB image's tokens, or of tokens in no order. Without training
# all tokens of a LeViT are the same.
REFUSED = {"coat": "list", "crossvit": "list", "efficientvim": "list", "levit": "row by row"}


# Families whose smallest model is large: fewer blocks, on smaller images.
CUT = {"deepseek_vit": ({"depth": 2}, 168), "gemma4_vit": ({"depth": 2}, 192)}


@pytest.mark.table
def test_timm() -> None:
    import_timm()
    from timm.models._registry import _module_to_models

    wrong = {}
    for family in sorted(_module_to_models):
        try:
            check_timm(family)
        except Exception as error:
            wrong[family] = repr(error)
    assert not wrong


def near(a: Tensor, b: Tensor) -> None:
    """Equal to rounding in float32, whatever the scale of an untrained network's features."""
    assert a.shape == b.shape
    assert (a - b).norm() <= 1e-3 * b.norm(), float((a - b).norm() / b.norm())


def check_timm(family: str) -> None:
    from timm.models._registry import _module_to_models

    from convexhead.tokens.backbones.timm_backbone import TimmBackbone

    timm = import_timm()
    # The smallest of the first dozen, told by its number of weights without making any.
    sizes = {}
    for name in sorted(_module_to_models[family])[:12]:
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    name = min(sizes, key=sizes.__getitem__)
    torch.manual_seed(0)
    fewer, side = CUT.get(family, ({}, None))
    model = timm.create_model(name, num_classes=0, **fewer).eval()
    config = timm.data.resolve_data_config({"input_size": (3, side, side)} if side else {}, model=model)
    _, h, w = config["input_size"]
    try:
        backbone = TimmBackbone(f"timm:{name}", model, None, config, "")
    except InputError as error:
        assert family in REFUSED, error  # noqa: PT017
        assert REFUSED[family] in str(error)  # noqa: PT017
        return
    assert family not in REFUSED
    x = torch.randint(256, (2, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, again = backbone(x), backbone(x[1:])
        plain = model.forward_features((x.float() - backbone.mean) / backbone.std)
    near(again.tokens, got.tokens[1:])
    if plain.ndim == 3:
        n = getattr(model, "num_prefix_tokens", None)
        assert got.prefix.shape[1] == (n if n is not None else plain.shape[1] - got.grid[0] * got.grid[1])
        near(torch.cat([got.prefix, got.tokens], dim=1), plain)
    else:
        maps = plain.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else plain
        near(got.tokens, maps.flatten(2).transpose(1, 2))
    assert got.grid[0] * got.grid[1] == got.tokens.shape[1]
