"""From images to tokens: sources, frozen backbones, reductions and the on-disk token store."""

from convexhead.tokens.backbones import Backbone, open_backbone
from convexhead.tokens.export import export_store
from convexhead.tokens.extract import extract
from convexhead.tokens.files import StoreWriteError
from convexhead.tokens.merge import merge_stores
from convexhead.tokens.progress import Progress
from convexhead.tokens.reduce import Reduction
from convexhead.tokens.sources import BrokenImageError, ImageSource, open_source
from convexhead.tokens.store import TokenStore
from convexhead.tokens.view import SplitView

__all__ = [
    "Backbone",
    "BrokenImageError",
    "ImageSource",
    "Progress",
    "Reduction",
    "SplitView",
    "StoreWriteError",
    "TokenStore",
    "export_store",
    "extract",
    "merge_stores",
    "open_backbone",
    "open_source",
]
