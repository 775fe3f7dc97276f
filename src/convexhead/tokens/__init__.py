"""From images to tokens: sources, frozen backbones, reductions and the on-disk token store."""

from convexhead.tokens.backbones.base import Backbone
from convexhead.tokens.backbones.open import open_backbone
from convexhead.tokens.extract import extract
from convexhead.tokens.import_arrays import import_arrays
from convexhead.tokens.progress import Progress
from convexhead.tokens.reduce import Reduction
from convexhead.tokens.sources.base import BrokenImageError, ImageSource
from convexhead.tokens.sources.open import open_source
from convexhead.tokens.store.export import export_store
from convexhead.tokens.store.files import StoreWriteError
from convexhead.tokens.store.fit import whitened
from convexhead.tokens.store.merge import merge_stores
from convexhead.tokens.store.store import TokenStore
from convexhead.tokens.store.view import SplitView

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
    "import_arrays",
    "merge_stores",
    "open_backbone",
    "open_source",
    "whitened",
]
