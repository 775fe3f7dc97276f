"""From images to tokens: sources, frozen backbones, reductions and the on-disk token store."""

from convexhead.tokens.backbones import Backbone, open_backbone
from convexhead.tokens.extract import extract
from convexhead.tokens.manifest import StoreWriteError
from convexhead.tokens.reduce import Reduction
from convexhead.tokens.sources import BrokenImageError, ImageSource, open_source
from convexhead.tokens.store import TokenStore
from convexhead.tokens.view import SplitView

__all__ = [
    "Backbone",
    "BrokenImageError",
    "ImageSource",
    "Reduction",
    "SplitView",
    "StoreWriteError",
    "TokenStore",
    "extract",
    "open_backbone",
    "open_source",
]
