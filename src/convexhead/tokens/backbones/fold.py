"""Batch normalisation folded into the convolutions before it: the same function in fewer passes over memory."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy of ``model``, in eval mode, without the batch normalisations that a convolution can do.

    With frozen statistics ``γ (w ∗ x − μ) / √(v + ε) + b`` is a convolution with other weights. On a CPU a
    convolutional network spends a fifth of its time in these extra passes.

    A convolution is changed only where it runs once and nothing but the normalisation reads its output. A model
    whose graph `torch.fx` cannot follow is returned as it is.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    try:
        nodes = list(_Tracer().trace(model).nodes)
    except Exception:  # the model's own code runs on symbols, which may break it anywhere
        return model
    folded = copy.deepcopy(model)
    calls = [node for node in nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
    for node in calls:
        norm, before = folded.get_submodule(str(node.target)), node.args[0] if node.args else None
        if not isinstance(norm, nn.BatchNorm2d) or not isinstance(before, fx.Node) or before not in calls:
            continue
        convolution = folded.get_submodule(str(before.target))
        alone = len(before.users) == targets.count(before.target) == targets.count(node.target) == 1
        if not alone or not isinstance(convolution, nn.Conv2d) or norm.running_mean is None or norm.running_var is None:
            continue
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        # timm joins the activation to the normalisation.
        folded.set_submodule(str(node.target), getattr(norm, "act", nn.Identity()))
    return folded


class _Tracer(fx.Tracer):
    """Takes convolutions and normalisations whole, also those that timm derives from torch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kinds: Any = (nn.Conv2d, nn.BatchNorm2d)
        return isinstance(m, kinds) or super().is_leaf_module(m, module_qualified_name)
