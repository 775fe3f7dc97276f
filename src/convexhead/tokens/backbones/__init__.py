"""Frozen networks that make tokens of images."""

from convexhead.tokens.backbones.open import Backbone, open_backbone

__all__ = ["Backbone", "open_backbone"]
