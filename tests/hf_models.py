"""Small random models of the vision families of transformers, and what is known of their tokens.

Each row: type of the configuration, its settings, image ``(h, w)``, grid, class and other tokens in front of the
patches, and behind them. The numbers come from the architectures' papers, not from our code. A row without a grid
must be refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from convexhead.tokens.backbones.timm_import import import_torchvision


class Family(NamedTuple):
    """One row of the table."""

    kind: str
    settings: dict[str, Any]
    image: tuple[int, int]
    grid: tuple[int, int] | None
    front: int = 0
    back: int = 0


SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZE, "intermediate_size": 64, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
VIT = {**SIZE, "intermediate_size": 64, "image_size": 64, "patch_size": 16}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": 64, "patch_size": 4}
PVT = {**STAGES, "num_attention_heads": [1, 1, 2, 2], "image_size": 128}
QUICK = [
    "vit",
    "mae",
    "clip",
    "whole-clip",
    "whole-siglip",
    "yolos",
    "swin",
    "pvt",
    "convnext",
    "deit",
    "groupvit",
    "siglip2",
]
"""Families that every run of the tests checks."""
SAM = {**SIZE, "image_size": 64, "patch_size": 16, "output_channels": 16, "mlp_dim": 64, "window_size": 2}
FAMILIES = {
    "vit": Family("vit", VIT, (64, 96), (4, 6), 1),
    "deit": Family("deit", VIT, (64, 96), (4, 6), 2),
    "beit": Family("beit", {**VIT, "use_relative_position_bias": True}, (64, 64), (4, 4), 1),
    "data2vec": Family("data2vec-vision", VIT, (64, 64), (4, 4), 1),
    "dinov2": Family("dinov2", {**VIT, "patch_size": 14, "image_size": 56}, (56, 84), (4, 6), 1),
    "registers": Family("dinov2_with_registers", {**VIT, "num_register_tokens": 4}, (64, 96), (4, 6), 5),
    "dinov3": Family("dinov3_vit", {**VIT, "num_register_tokens": 4}, (64, 96), (4, 6), 5),
    "dinov3-convnext": Family("dinov3_convnext", STAGES, (64, 96), None),
    "clip": Family("clip_vision_model", VIT, (64, 64), (4, 4), 1),
    "chinese-clip": Family("chinese_clip_vision_model", VIT, (64, 64), (4, 4), 1),
    "whole-clip": Family("clip", {"text_config": TEXT, "vision_config": VIT}, (64, 64), (4, 4), 1),
    "whole-siglip": Family("siglip", {"text_config": TEXT, "vision_config": VIT}, (64, 64), (4, 4)),
    "whole-altclip": Family("altclip", {"text_config": TEXT, "vision_config": VIT}, (64, 64), (4, 4), 1),
    "whole-chinese-clip": Family("chinese_clip", {"text_config": TEXT, "vision_config": VIT}, (64, 64), (4, 4), 1),
    "whole-blip": Family("blip", {"text_config": TEXT, "vision_config": VIT}, (64, 64), (4, 4), 1),
    "whole-flava": Family(
        "flava", {"image_config": VIT, "text_config": TEXT, "multimodal_config": SIZE}, (64, 64), (4, 4), 1
    ),
    "whole-owlvit": Family("owlvit", {"text_config": TEXT, "vision_config": VIT}, (64, 64), (4, 4), 1),
    "whole-owlv2": Family("owlv2", {"text_config": TEXT, "vision_config": VIT}, (64, 64), (4, 4), 1),
    "whole-xclip": Family("xclip", {"text_config": TEXT, "vision_config": VIT}, (64, 64), None),
    "whole-clipseg": Family("clipseg", {"text_config": TEXT, "vision_config": VIT}, (64, 64), (4, 4), 1),
    "whole-align": Family(
        "align",
        {"text_config": TEXT, "vision_config": {"width_coefficient": 0.2, "depth_coefficient": 0.2}},
        (64, 64),
        (2, 2),
    ),
    "whole-aimv2": Family("aimv2", {"text_config": TEXT, "vision_config": VIT}, (64, 64), (4, 4)),
    "whole-metaclip2": Family("metaclip_2", {"text_config": TEXT, "vision_config": VIT}, (64, 64), (4, 4), 1),
    "whole-siglip2": Family(
        "siglip2", {"text_config": TEXT, "vision_config": {**VIT, "num_patches": 16}}, (64, 64), None
    ),
    "siglip": Family("siglip_vision_model", VIT, (64, 64), (4, 4)),
    "siglip2": Family("siglip2_vision_model", {**VIT, "num_patches": 16}, (64, 64), None),
    "aimv2": Family("aimv2_vision_model", VIT, (64, 64), (4, 4)),
    "mlcd": Family("mlcd_vision_model", VIT, (64, 64), (4, 4), 1),
    "mae": Family("vit_mae", VIT, (64, 64), (4, 4), 1),
    "msn": Family("vit_msn", VIT, (64, 96), (4, 6), 1),
    "ijepa": Family("ijepa", VIT, (64, 96), (4, 6)),
    "pixio": Family("pixio", {**VIT, "n_cls_tokens": 8}, (64, 64), (4, 4), 8),
    "radio": Family("radio", {**VIT, "num_cls_tokens": 3}, (64, 64), (4, 4), 10),
    "tipsv2": Family("tipsv2_vision_model", VIT, (64, 64), (4, 4), 2),
    "sapiens2": Family("sapiens2", VIT, (64, 64), (4, 4), 9),
    "internvl": Family("internvl_vision", {**VIT, "image_size": [64, 64], "patch_size": [16, 16]}, (64, 64), (4, 4), 1),
    "yolos": Family("yolos", {**VIT, "image_size": [64, 96], "num_detection_tokens": 7}, (64, 96), (4, 6), 1, 7),
    "dpt": Family("dpt", {**VIT, "is_hybrid": False}, (64, 64), (4, 4), 1),
    "vitdet": Family(
        "vitdet", {**SIZE, "image_size": 64, "patch_size": 16, "pretrain_image_size": 64}, (64, 96), (4, 6)
    ),
    "sam": Family("sam_vision_model", SAM, (64, 64), (4, 4)),
    "sam-hq": Family("sam_hq_vision_model", SAM, (64, 64), (4, 4)),
    "groupvit": Family(
        "groupvit",
        {
            "text_config": TEXT,
            "vision_config": {
                **VIT,
                "num_hidden_layers": 3,
                "depths": [1, 1, 1],
                "num_group_tokens": [9, 4, 0],
                "num_output_groups": [9, 4, 0],
            },
        },
        (64, 64),
        None,
    ),
    "timesformer": Family("timesformer", VIT, (64, 64), None),
    "videomae": Family("videomae", VIT, (64, 64), None),
    "pixtral": Family("pixtral", {**VIT, "head_dim": 16}, (64, 64), None),
    "swin": Family("swin", SWIN, (64, 96), (8, 12)),
    "swinv2": Family("swinv2", SWIN, (64, 96), (8, 12)),
    "donut": Family("donut-swin", SWIN, (64, 96), (8, 12)),
    "maskformer-swin": Family("maskformer-swin", SWIN, (64, 96), (8, 12)),
    "swin2sr": Family(
        "swin2sr", {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "image_size": 16}, (16, 24), (16, 24)
    ),
    "focalnet": Family(
        "focalnet",
        {
            "embed_dim": 8,
            "depths": [1, 1],
            "hidden_sizes": [8, 16],
            "focal_levels": [1, 1],
            "focal_windows": [3, 3],
            "image_size": 64,
        },
        (64, 64),
        (8, 8),
    ),
    "hiera": Family("hiera", {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}, (224, 224), (7, 7)),
    "levit": Family("levit", {"hidden_sizes": [16, 16, 16], "num_attention_heads": [1, 1, 1]}, (224, 224), None),
    "pvt": Family("pvt", {**PVT, "sequence_reduction_ratios": [4, 2, 1, 1]}, (128, 128), (4, 4), 1),
    "pvt2": Family("pvt_v2", PVT, (128, 192), (4, 6)),
    "convnext": Family("convnext", STAGES, (96, 64), (3, 2)),
    "convnext2": Family("convnextv2", STAGES, (96, 64), (3, 2)),
    "resnet": Family("resnet", {**STAGES, "embedding_size": 8, "layer_type": "basic"}, (96, 64), (3, 2)),
    "regnet": Family("regnet", {**STAGES, "embedding_size": 8, "groups_width": 8}, (96, 64), (3, 2)),
    "bit": Family(
        "bit",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [32, 32, 64, 64], "embedding_size": 32, "num_groups": 4},
        (96, 64),
        (3, 2),
    ),
    "mobilenet1": Family("mobilenet_v1", {"depth_multiplier": 0.25}, (96, 64), (3, 2)),
    "mobilenet2": Family("mobilenet_v2", {"depth_multiplier": 0.35}, (96, 64), (3, 2)),
    "mobilevit": Family("mobilevit", {"hidden_sizes": [16, 16, 16], "num_attention_heads": 2}, (128, 64), (4, 2)),
    "mobilevit2": Family("mobilevitv2", {"width_multiplier": 0.25}, (128, 64), (4, 2)),
    "efficientnet": Family(
        "efficientnet", {"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 256}, (96, 64), (3, 2)
    ),
    "poolformer": Family("poolformer", STAGES, (96, 64), (3, 2)),
    "segformer": Family("segformer", {**STAGES, "num_attention_heads": [1, 1, 2, 2]}, (96, 64), (3, 2)),
    "glpn": Family("glpn", {**STAGES, "num_attention_heads": [1, 1, 2, 2]}, (96, 64), (3, 2)),
    "cvt": Family("cvt", {"embed_dim": [8, 16, 24], "num_heads": [1, 1, 2], "depth": [1, 2, 10]}, (96, 64), (6, 4)),
    "swiftformer": Family("swiftformer", {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32]}, (96, 64), (3, 2)),
    "textnet": Family("textnet", {}, (96, 64), (3, 2)),
    "hgnet": Family("hgnet_v2", {}, (96, 64), (3, 2)),
    "timm": Family("timm_wrapper", {"architecture": "vit_tiny_patch16_224"}, (224, 224), (14, 14), 1),
    "timm-resnet": Family("timm_wrapper", {"architecture": "resnet18"}, (96, 64), (3, 2)),
    "detr": Family(
        "detr",
        {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "num_queries": 9,
            "backbone_config": {"model_type": "resnet", "out_features": ["stage4"]},
        },
        (96, 96),
        None,
    ),
    "vivit": Family("vivit", {**SIZE, "intermediate_size": 64, "image_size": 64}, (64, 64), None),
}


def library() -> Any:
    """Transformers, imported when it is first used: that takes seconds."""
    import_torchvision()
    return pytest.importorskip("transformers")


def build(family: Family) -> nn.Module:
    """Return a random model in eval mode."""
    torch.manual_seed(0)
    config = library().AutoConfig.for_model(family.kind, **family.settings)
    return library().AutoModel.from_config(config).eval()
