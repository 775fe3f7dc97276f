"""Tokens of what loaders yield, by a module of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from convexhead.errors import InputError
from convexhead.tokens.arrays.imported import Arrangement, ImportedTokens
from convexhead.tokens.arrays.loader import class_names_of
from convexhead.tokens.arrays.roles import find_arrays
from convexhead.tokens.arrays.source import TokenArrays
from convexhead.tokens.backbones.base import Backbone
from convexhead.tokens.sources.open import check_classes


def run_loaders(
    loaders: Mapping[str, Any], backbone: Backbone, device: torch.device
) -> tuple[TokenArrays, ImportedTokens]:
    """Run a backbone over all batches, each once, and return the tokens and what hands them on.

    Raises
    ------
    InputError
        Batches of another form, or on different grids.
    """
    name = getattr(backbone, "name", None)
    if getattr(backbone, "transform", None) is not None:
        raise InputError("a DataLoader transforms its images itself: open the backbone without transform")
    backbone = backbone.to(device)
    seen: set[Arrangement] = set()

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        tokens, prefix, grid = backbone(images.to(device))
        seen.add(Arrangement(grid, prefix.shape[1]))
        if len(seen) > 1:
            raise InputError("the images of the loaders differ in size: bring them to one size")
        return torch.cat([prefix, tokens], 1)

    source = check_classes(TokenArrays(find_arrays(loaders, {}, run), class_names_of(loaders)))
    # A loader prepares images in a way that nobody can see: only the user's word says that two do it alike.
    told = f"unnamed, {source.fingerprint()[:16]}" if name is None else name
    kind = f"{told}, weights {backbone.weights_hash[:16]}"
    return source, ImportedTokens(backbone.spec, kind, seen.pop())
