"""Frozen networks that make tokens of images."""

from convexhead.tokens.backbones.base import Backbone, TokenBatch
from convexhead.tokens.backbones.open import open_backbone

__all__ = ["Backbone", "TokenBatch", "open_backbone"]
