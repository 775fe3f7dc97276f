"""Folding batch normalisation: the same function, fewer modules, and nothing folded that must not be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from convexhead.tokens.backbones.fold import fold_batch_norm
from convexhead.tokens.backbones.timm_import import import_timm


def normalizations(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def with_statistics(model: nn.Module) -> nn.Module:
    """Give every normalisation statistics that matter, as training does."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    return model.eval()


@torch.inference_mode()
def assert_same_function(model: nn.Module, folded: nn.Module, size: int = 64) -> None:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected = model(images)
    assert (folded(images) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "left"), [("resnet18", 0), ("tf_efficientnet_lite0", 0), ("densenet121", 62), ("resnetv2_50", 17)]
)
def test_timm_models_keep_their_function(name: str, left: int) -> None:
    model = with_statistics(import_timm().create_model(name, pretrained=False))
    before = normalizations(model)
    folded = fold_batch_norm(model)
    assert normalizations(folded) == left < before == normalizations(model)
    assert_same_function(model, folded)


class Block(nn.Module):
    """A convolution and a normalisation, put together in some way that `forward` says."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)


class ReadTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) + x


class SharedConvolution(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.other(self.conv(2 * x))


class SharedNormalization(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(x)


class Branching(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.sum() > -1e9 else x


@pytest.mark.parametrize("kind", [ReadTwice, SharedConvolution, SharedNormalization, Branching])
def test_what_must_not_be_folded_is_left(kind: type[Block]) -> None:
    model = with_statistics(kind())
    folded = fold_batch_norm(model)
    assert normalizations(folded) == 2
    assert_same_function(model, folded, 8)


def test_without_affine_weights() -> None:
    norm = nn.BatchNorm2d(4, affine=False)
    assert norm.running_mean is not None
    norm.running_mean.fill_(0.5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm, nn.ReLU()).eval()
    folded = fold_batch_norm(model)
    assert normalizations(folded) == 0
    assert_same_function(model, folded, 8)
